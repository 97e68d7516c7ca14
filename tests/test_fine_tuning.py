# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""docs/fine_tuning.py, the source of the notebook, on tiny checkpoints and synthetic scenes, and what is made of it."""

from __future__ import annotations

import json
import math
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint
from transformers import AutoModel

from zeroshot.data.benchmarks import load_benchmark


ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "fine_tuning.py"
NOTEBOOK = ROOT / "docs" / "fine_tuning.ipynb"
MAKE = runpy.run_path(str(ROOT / "scripts" / "make_notebook.py"))
CELLS = MAKE["cells_of"](SOURCE.read_text(encoding="utf-8"))
LORA = CELLS.index(next(cell for cell in CELLS if cell[1].startswith("## LoRA")))
TOWERS = {
    "vit": {},
    "convolutional": {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "test_efficientnet"},
        "clip_input_scale": 1.0,
        "fusion_layers": [2, 3],
    },
}
FROZEN = ("recognizer.vision_model", "text_encoder", "logit_scale")


def execute(cells: list[tuple[str, str]], names: dict[str, Any]) -> None:
    """Runs code cells; the cell of settings is followed by the settings of the test, `names["settings"]`."""
    for kind, text in cells:
        if kind == "code":
            exec(compile(text, str(SOURCE), "exec"), names)
            if "CHECKPOINT, PHOTOS, RUNS =" in text:
                names.update(names["settings"])


@pytest.fixture(scope="module", params=TOWERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables of the notebook before LoRA."""
    if request.param == "convolutional":
        pytest.importorskip("timm", reason="convolutional towers need timm")
    folder = tmp_path_factory.mktemp("fine_tuning")
    settings = {
        "CHECKPOINT": str(tiny_checkpoint(folder / "checkpoint", **TOWERS[request.param])),
        **{"PHOTOS": None, "RUNS": folder / "runs", "DATASET": "embedded_scenes", "SPLIT": "embedded_scenes"},
        "load_benchmark": partial(load_benchmark, num_scenes=4),  # drawing all scenes takes minutes
        **{"NUM_TRAIN": 4, "NUM_TEST": 2, "CROP_SIZE": 32, "BATCH_SIZE": 2, "STEPS": 2},
    }
    names: dict[str, Any] = {"__name__": "__main__", "settings": settings}
    execute(CELLS[:LORA], names)
    return names


def check_weights(names: dict[str, Any], model: torch.nn.Module) -> None:
    before = names["load"]().state_dict()
    frozen = [name for name in before if name.startswith(FROZEN)]
    after = model.state_dict()
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen), "towers are frozen"
    assert any(not torch.equal(after[name], before[name]) for name in before), "nothing was trained"


def test_trainer(trained: dict[str, Any]) -> None:
    for row in ("trainer", "trainer_without_fes"):
        losses = trained["results"][row]["losses"]
        assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert trained["model"].classifier.feature_expansion is None, "FES is disabled in the second run"
    assert trained["load"]().classifier.feature_expansion is not None
    check_weights(trained, trained["model"])


def test_lora(trained: dict[str, Any]) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    pytest.importorskip("IPython", reason="the notebook shows its table with IPython")
    execute(CELLS[LORA:], trained)
    run, adapted, merged = trained["run"], trained["adapted"], trained["merged"]
    assert all(map(math.isfinite, run["losses"])) and run["trainable_percent"] < 50
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trainable)
    for part in ("encoder_layers", "refinement_layers", "mask_head", "classifier.adapter"):
        assert any(part in name for name in trainable), f"{part} has no adapter"
    has_cells = any("cell_classifier" in name for name in trainable)
    assert has_cells == (trained["load"]().cell_classifier is not None)
    check_weights(trained, merged)

    assert list(merged.config.id2label.values()) == trained["names"] + trained["outside"]
    reloaded = AutoModel.from_pretrained(trained["RUNS"] / "merged", trust_remote_code=True)
    with torch.no_grad():
        logits = [model(**trained["inputs"]).class_queries_logits for model in (merged.eval(), reloaded.eval())]
    assert torch.equal(*logits)
    report = json.loads((trained["RUNS"] / "results.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == list(trained["TITLES"])


# --- what is made of the source


def test_the_notebook_is_up_to_date() -> None:
    if not NOTEBOOK.exists():
        pytest.skip("docs/fine_tuning.ipynb was not made yet: run python scripts/make_notebook.py")
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == CELLS, "run scripts/make_notebook.py"
    assert len(text.encode()) <= MAKE["LARGEST"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs and all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"[\"' ](/[\w.-]+){2,}", json.dumps(outputs)), "an output contains a path of the machine"


def test_the_guide_quotes_the_source() -> None:
    guide = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    source = [line.strip() for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    missing = [line for block in blocks for line in block.splitlines() if line.strip() not in source]
    assert blocks and not missing, "docs/fine_tuning.py does not contain these lines"
