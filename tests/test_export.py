# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exported and compiled models against the model itself, at sizes that were not used for the export."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from tiny import tiny_checkpoint, tiny_model, tiny_processor

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel, AlignZegProcessor
from zeroshot.data.scenes import draw_scene
from zeroshot.export import INPUTS, OUTPUTS, ImageTowerAndHead, export_checkpoint, export_onnx, export_program
from zeroshot.onnx_folder import (
    FILES,
    check_folder,
    export_folders,
    pixels_graph,
    readout_graph,
    store_small,
    write_quantized,
)


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
    with pytest.raises((AssertionError, RuntimeError)):  # not a whole number of tokens
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
        ([], "`--output`"),
        (["--browser", str(ROOT)], "would be lost"),
        (["--output", "a.onnx", "--int8"], "`--int8` is for a folder"),
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
    """Two graphs, because torch specialises on a batch size of one. The first image is not square, because torch would
    otherwise assume equal height and width."""
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


# --- the folder for onnxruntime alone ------------------------------------------------------------------------------

IMAGE_SIZES = [(1, 97, 150), (2, 128, 128), (2, 181, 90)]  # batch, height, width


def session(graph: Any):
    """An inference session of a graph or a file, on one thread."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which runs the exported file, is not installed")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(graph if isinstance(graph, Path) else graph.SerializeToString(), options)


def scenes(batch: int, height: int, width: int) -> list[Image.Image]:
    return [Image.fromarray(draw_scene(0, "test", i, 256).image).resize((width, height)) for i in range(batch)]


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 64, "longest_edge": 200}},
        {"size": {"shortest_edge": 96}, "resample": 2, "image_mean": 0.5, "image_std": [0.4, 0.5, 0.6]},
        {"size": {"height": 50, "width": 70}, "do_normalize": False},
        {"do_resize": False, "do_rescale": False},
    ],
)
def test_onnx_prepares_images_as_pil_does(settings: dict[str, Any]) -> None:
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    processor = AlignZegImageProcessor(size_divisor=16, **settings)
    prepare = session(pixels_graph(processor, 16))
    std = np.broadcast_to(processor.image_std if processor.do_normalize else 1, 3).reshape(3, 1, 1)
    step = (processor.rescale_factor if processor.do_rescale else 1) / std  # of one 8-bit value
    for height, width in [(97, 150), (64, 64), (40, 300), (300, 40), (33, 39), (201, 200)]:
        image = np.asarray(scenes(1, height, width)[0])
        found, content = prepare.run(None, {"image": image[None]})
        expected = processor(image, return_tensors="np")
        mask = expected["pixel_mask"][0].astype(bool)
        assert content.tolist() == [mask.any(1).sum(), mask.any(0).sum()]
        rows, columns = mask.shape
        assert found.shape == (1, 3, max(rows, 32), max(columns, 32))
        difference = np.abs(found[0, :, :rows, :columns] - expected["pixel_values"][0]) / step
        many_halves = (height, width) == (64, 64) and rows == 96  # PIL's fixed-point errors decide their rounding
        assert difference.max() < 2.001 and (difference > 0.5).mean() < (0.1 if many_halves else 0.02)


@pytest.mark.parametrize(("stride", "weight"), [(4, 0.0), (8, 0.3), (8, 0.5), (8, 1.0)])
def test_onnx_reads_out_the_best_class(stride: int, weight: float) -> None:
    """Content of whole cells, so that torch's own interpolation is the reference."""
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    generator = torch.Generator().manual_seed(stride)
    scores, cells = torch.rand(2, 7, 20, 28, generator=generator), torch.rand(2, 7, 10, 14, generator=generator)
    feeds = {"scores": scores.numpy(), "content": np.array([16 * stride, 20 * stride])}
    feeds |= {"cells": cells.numpy()} if weight else {}
    found = session(readout_graph(stride, weight)).run(None, {**feeds, "image": np.zeros((2, 61, 87, 3), np.uint8)})[0]

    def enlarged(values: torch.Tensor) -> torch.Tensor:
        return F.interpolate(values, size=(61, 87), mode="bilinear", align_corners=False)

    expected = enlarged(scores[..., :16, :20]) ** (1 - weight) * enlarged(cells[..., :8, :10]) ** weight
    assert found.dtype == np.int32 and (found == expected.argmax(1).numpy()).mean() > 0.999


@pytest.mark.parametrize(
    ("coarse", "weight"), [((13, 17), 0.0), ((6, 8), 0.5), ((5, 4), 0.3), ((13, 17), 0.7), ((4, 6), 1.0)]
)
def test_onnx_leaves_out_only_classes_that_win_nowhere(coarse: tuple[int, int], weight: float) -> None:
    """Most of the 60 classes win nowhere; some win between cells only."""
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    generator = torch.Generator().manual_seed(0)
    run = session(readout_graph(8, weight))
    for _ in range(20):
        scores, cells = (
            (0.2 + torch.rand(1, 60, *size, generator=generator)) * torch.rand(1, 60, 1, 1, generator=generator) ** 4
            for size in ((13, 17), coarse)
        )
        feeds = {"scores": scores.numpy(), "content": np.array([13 * 8, 17 * 8])}
        feeds |= {"cells": cells.numpy()} if weight else {}
        found = run.run(None, {**feeds, "image": np.zeros((1, 130, 160, 3), np.uint8)})[0]

        def enlarged(values: torch.Tensor) -> torch.Tensor:
            return F.interpolate(values.double(), size=(130, 160), mode="bilinear", align_corners=False)

        expected = enlarged(scores) ** (1 - weight) * enlarged(cells) ** weight
        assert (found == expected.argmax(1).numpy()).mean() > 0.9999


def test_a_filter_that_onnx_lacks_is_named() -> None:
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    with pytest.raises(ValueError, match="`resample` of the image processor is 1"):
        pixels_graph(AlignZegImageProcessor(resample=1), 32)
    with pytest.raises(ValueError, match="max_height"):
        pixels_graph(AlignZegImageProcessor(size={"max_height": 64, "max_width": 64}), 32)


@pytest.mark.parametrize("bits", [16, 8])
def test_weights_are_stored_in_fewer_bits(bits: int) -> None:
    """float16, or int8 with a scale per row; the graph computes with the rounded weights."""
    onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weights[0, 0], weights[1] = 1e-3, 0
    large = np.full((1, 64, 64), 1e6, np.float32)  # float16 ends at 65504, and int8 is for matrices only
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[n, 64] x) => (float[1, n, 64] y) '
        "{ z = MatMul (x, w)  y = MatMul (z, v) }"
    )
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for a, name in ((weights, "w"), (large, "v")))
    size = graph.ByteSize()
    store_small(graph, bits)
    assert size - graph.ByteSize() == pytest.approx((32 - bits) / 8 * weights.size, abs=500)
    if bits == 16:
        rounded = weights.astype(np.float16).astype(np.float32)
    else:
        steps = np.array([max(abs(row)) / 127 or 1 for row in weights])[:, None]
        rounded = np.round(weights / steps) * steps
    found = session(graph).run(None, {"x": np.eye(64, dtype=np.float32)})[0]
    np.testing.assert_allclose(found, rounded @ large, rtol=1e-4, atol=100)


def test_large_matrices_are_multiplied_in_integers(tmp_path: Path) -> None:
    """Against the same product with weights of 7 bits per column and activations of 8 bits; small matrices stay float32."""
    onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    random = np.random.default_rng(0)
    weights = random.normal(size=(128, 128)).astype(np.float32) * np.linspace(0.01, 3, 128, dtype=np.float32)
    small = random.normal(size=(128, 8)).astype(np.float32)
    graph = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]> g (float[n, 128] x) => (float[n, 128] y, float[n, 8] z)
        { t = Transpose <perm=[1, 0]> (w)  h = MatMul (x, t)  y = MatMul (h, t)  z = MatMul (x, v) }
        """)
    for number, node in enumerate(graph.graph.node):
        node.name = f"node {number}"
    transposed = np.ascontiguousarray(weights.T)
    graph.graph.initializer.extend(
        onnx.numpy_helper.from_array(a, name) for a, name in ((transposed, "w"), (small, "v"))
    )
    write_quantized(graph, tmp_path / "quantized.onnx")

    def product(left: np.ndarray) -> np.ndarray:
        step = (max(left.max(), 0) - min(left.min(), 0)) / 255
        columns = np.abs(weights).max(0) / 63.5
        return np.round(left / step) * step @ (np.round(weights / columns) * columns)

    x = random.normal(size=(300, 128)).astype(np.float32)
    y, z = session(tmp_path / "quantized.onnx").run(None, {"x": x})
    np.testing.assert_allclose(z, x @ small, rtol=1e-4, atol=1e-4)
    rounding = np.abs(product(product(x)) - x @ weights @ weights).mean()
    assert 0.3 * rounding < np.abs(y - x @ weights @ weights).mean() < 2 * rounding
    assert (tmp_path / "quantized.onnx").stat().st_size < weights.size + 4 * small.size + 10_000


def test_a_folder_with_other_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"contains thesis\.tex"):
        check_folder(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / FILES[0]).write_text("old")
    assert check_folder(tmp_path / "new") == (tmp_path / "new").resolve()


def assert_same_label_maps(
    folder: Path,
    model: AlignZegModel,
    processor: AlignZegProcessor,
    prototypes: torch.Tensor,
    share: float = 0.999,
) -> None:
    network, seen = session(folder / "image.onnx"), torch.arange(len(prototypes)) % 3 != 0
    assert [value.name for value in network.get_inputs()] == ["image", *INPUTS[1:]]
    for batch, height, width in IMAGE_SIZES:
        images = scenes(batch, height, width)
        feeds = {"image": np.stack(images), "text_prototypes": prototypes.numpy(), "seen_class_mask": seen.numpy()}
        with torch.no_grad():
            outputs = model(
                **processor(images=images, return_tensors="pt"), text_prototypes=prototypes, seen_class_mask=seen
            )
        expected = processor.post_process_semantic_segmentation(outputs, [(height, width)] * batch)
        found = network.run(None, feeds)[0]
        assert found.shape == (batch, height, width) and len(np.unique(found)) > 1
        assert (found == torch.stack(expected).numpy()).mean() >= share


@pytest.mark.slow
@pytest.mark.parametrize("evidence", [["frozen", "adapted"], ["cells"]], ids="+".join)
def test_folder_of_a_convolutional_model_gives_its_label_maps(evidence: list[str], tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="convolutional towers need timm")
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    from test_convolutional import conv_model

    seed = 4 if evidence == ["cells"] else 0  # their label maps have several classes
    model = conv_model(seed=seed, indicator_evidence=evidence)
    processor = tiny_processor(
        size={"shortest_edge": 96, "longest_edge": 160},
        correction_gamma=2.0,
        correction_threshold=0.5,
        correction_on_scores=True,
        dense_weight=0.4,
    )
    export_folders(model, processor, {tmp_path / "onnx": "float32"})
    prototypes = F.normalize(torch.randn(12, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert_same_label_maps(tmp_path / "onnx", model, processor, prototypes)


@pytest.mark.slow
def test_benchmark_runs_the_same_model_in_torch_and_onnxruntime() -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    from zeroshot.evaluation.benchmark_onnx import label_maps

    prototypes = F.normalize(torch.randn(12, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad():
        seen = torch.ones(12, dtype=torch.bool)
        functions, megabytes = label_maps(tiny_model(), tiny_processor().image_processor, prototypes, seen)
        maps = {name: function(np.asarray(scenes(1, 97, 150)[0])) for name, function in functions.items()}
    assert maps["torch"].shape == (97, 150) and megabytes["int8"] <= megabytes["float32"]
    for name in ("float32", "int8"):  # all matrices of this model are small, so none is quantized
        assert (maps[name] == maps["torch"]).mean() >= 0.999


@pytest.mark.slow
def test_example_of_the_documents_needs_no_torch(tmp_path: Path) -> None:
    """Exports the repository's checkpoint, then runs the code of docs/onnx.md in a Python without torch."""
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    if not (ROOT / "model.safetensors").is_file():
        pytest.skip("no checkpoint in the repository")
    export_checkpoint(str(ROOT), str(tmp_path / "onnx"), None, None, None)
    export_checkpoint(str(ROOT), str(tmp_path / "int8"), None, None, None, int8=True)
    model = AlignZegModel.from_pretrained(ROOT).eval()
    processor = AlignZegProcessor.from_pretrained(ROOT)
    names, unseen = ["grass", "red striped", "water"], ["water"]
    prototypes = model.get_text_prototypes(processor, [*names, "blue dotted", "wood"])
    assert_same_label_maps(tmp_path / "onnx", model, processor, prototypes)
    assert_same_label_maps(tmp_path / "int8", model, processor, prototypes, share=0.95)

    image = scenes(1, 200, 170)[0]
    image.save(tmp_path / "scene.png")
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    blocked = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n" + code[1]
    subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, check=True)
    model.set_vocabulary(names, unseen, processor)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, [(200, 170)])[0]
    found = np.asarray(Image.open(tmp_path / "labels.png"))
    assert (found == expected.numpy()).mean() >= 0.999
