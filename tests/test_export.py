# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exported and compiled models against the model itself, at sizes that the export has not seen."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import tiny_checkpoint, tiny_model

from modeling_alignzeg import AlignZegModel
from zeroshot.export import INPUTS, OUTPUTS, ImageTowerAndHead, export_onnx, export_program


SIZES = [(1, 32, 32, 3), (3, 80, 48, 7), (2, 48, 64, 40)]  # batch, height, width, classes; 32: CLIP's own grid


def inputs(batch: int, height: int, width: int, classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "text_prototypes": F.normalize(torch.randn(classes, 24, generator=generator), dim=-1),
        "seen_class_mask": torch.arange(classes) % 3 != 0,
    }


@pytest.fixture(scope="module")
def model() -> AlignZegModel:
    return tiny_model()


def assert_equal_outputs(found, model: AlignZegModel, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = model(**values)
    assert len(found) == len(OUTPUTS)
    for output, name in zip(found, OUTPUTS):
        torch.testing.assert_close(torch.as_tensor(output), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_exported_program_equals_the_model_at_any_size(model: AlignZegModel) -> None:
    trainable = [p.requires_grad for p in model.parameters()]
    program = export_program(model).module()
    assert [p.requires_grad for p in model.parameters()] == trainable
    for size in SIZES:
        values = inputs(*size)
        with torch.no_grad():
            assert_equal_outputs(program(*(values[name] for name in INPUTS)), model, values)
    with pytest.raises((AssertionError, RuntimeError)):  # no whole number of tokens
        program(*inputs(1, 40, 32, 3).values())


@pytest.mark.slow
def test_onnx_equals_the_model_at_any_size(model: AlignZegModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which runs the exported file, is not installed")
    export_onnx(model, tmp_path / "model.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "model.onnx", options)
    assert [value.name for value in session.get_inputs()] == list(INPUTS)
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)
    for size in SIZES:
        values = inputs(*size)
        assert_equal_outputs(session.run(None, {k: v.numpy() for k, v in values.items()}), model, values)


@pytest.mark.slow
def test_export_script_writes_a_program_and_its_prototypes(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    flags = ["--model", checkpoint, "--output", tmp_path / "model.pt2", "--prototypes", tmp_path / "names.npz"]
    command = [sys.executable, ROOT / "scripts" / "export.py", *flags, "--classes", "grass, red striped, brick"]
    command += ["--unseen", "brick"]
    subprocess.run([str(part) for part in command], check=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    stored, model = np.load(tmp_path / "names.npz"), AlignZegModel.from_pretrained(checkpoint).eval()
    values = {**inputs(1, 48, 48, 3), **{name: torch.from_numpy(stored[name]) for name in INPUTS[1:]}}
    assert stored["names"].tolist() == ["grass", "red striped", "brick"]
    assert values["seen_class_mask"].tolist() == [True, True, False]
    with torch.no_grad():
        assert_equal_outputs(program(*(values[name] for name in INPUTS)), model, values)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "model.bin"], ".onnx or .pt2"),
        (["--output", "a.pt2", "--classes", "a"], ".npz"),
        (["--output", "a.pt2", "--classes", "a", "--prototypes", "a.npz", "--unseen", "b"], "'b'"),
        (["--output", "a.pt2", "--model", "no/such/folder"], "no/such/folder"),
        (["--output", "a.pt2", "--classes", "a,a", "--prototypes", "a.npz"], "both 'a'"),
        (["--output", "/dev/null/a.pt2"], "/dev/null"),
    ],
)
def test_wrong_arguments_of_the_script_are_named(flags: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), *flags]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1 and words in finished.stderr and "Traceback" not in finished.stderr


def test_export_has_no_unseen_logits_without_an_indicator() -> None:
    model = tiny_model(bias_correction=False)
    outputs = ImageTowerAndHead(model)(*inputs(1, 32, 32, 4).values())
    assert ImageTowerAndHead(model).outputs == OUTPUTS[:2] and len(outputs) == 2


@pytest.mark.slow
def test_compiled_model_is_one_graph_for_all_sizes(model: AlignZegModel) -> None:
    """Two graphs, for torch makes batches of one a case of its own; the first image is not square, or torch would take
    height and width for one number."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)  # fullgraph: a break is an error
    for size in [(2, 48, 64, 40), (3, 80, 48, 7), (2, 64, 64, 5), (5, 96, 32, 9), (1, 64, 96, 11), (1, 48, 48, 6)]:
        values = inputs(*size)
        with torch.no_grad():
            assert_equal_outputs([compiled(**values)[name] for name in OUTPUTS], model, values)
    torch._dynamo.reset()
    assert len(graphs) <= 2
