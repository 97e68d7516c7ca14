# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The ablation's tables, made from artificial cells with known means."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_convolutional import tower_config
from tiny import tiny_checkpoint, tiny_model

from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split
from zeroshot.evaluation import ablation
from zeroshot.evaluation.ablation import (
    ORACLE_GAMMAS,
    PENALTIES,
    ROWS,
    SCORES,
    TRAININGS,
    rescore_cell,
    run_cell,
    summarize,
)
from zeroshot.evaluation.evaluator import Readout, evaluate_model, evaluation_batches
from zeroshot.settings import load_settings
from zeroshot.training.setup import train_only


ROOT = Path(__file__).resolve().parent.parent


def cell(row: str, seed: int, best_constant: float) -> dict:
    def scores(value: float) -> dict:
        return dict(zip(SCORES, (value + 10, value - 10, value + seed, 90.0)))

    readouts = {"plain": scores(40), "queries": scores(30), "pbc 1.0/0.3": scores(45), "pbc 2.0/0.5": scores(80)}
    readouts |= {f"constant {p}": scores(44 if p == best_constant else 41) for p in PENALTIES}
    curve = [{"step": s, "miou_seen": s / 10 + seed, "miou_unseen": s / 20, "hiou": s / 15} for s in (100, 200)]
    return {
        "row": row,
        "seed": seed,
        "scores": readouts,
        "indicator_roc_auc": 0.9,
        "curve": curve,
        "seconds": 1,
        "settings": {"training": {"steps": 200}},
        "versions": {},
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "cells").mkdir()
    (folder / "calibration.json").write_text(json.dumps({"gamma": 1.0, "threshold": 0.3}))
    for row, seeds in (("baseline", 3), ("full", 3), ("without_bds", 1)):
        for seed in range(seeds):
            path = folder / "cells" / f"{row}-{seed}.json"
            path.write_text(json.dumps(cell(row, seed, PENALTIES[2])))
    summarize(folder / "cells", folder)
    return folder


def test_every_row_reads_its_own_readout(report: Path) -> None:
    rows = {row["name"]: row for row in json.loads((report / "ablation.json").read_text())["rows"]}
    assert set(rows) == {
        "baseline",
        "baseline_constant",
        "full",
        "plus_bds",
        "without_pbc",
        "blind_constant",
        "without_bds",
        "without_bds_plain",
        "queries_only",
        "baseline_queries_only",
    }
    readouts = {name: row["readout"] for name, row in rows.items()}
    assert readouts["baseline"] == readouts["plus_bds"] == readouts["without_pbc"] == "plain"
    assert readouts["without_bds_plain"] == "plain" and rows["without_bds_plain"]["title"] == "full − PBC − BDS"
    assert readouts["queries_only"] == readouts["baseline_queries_only"] == "queries"
    assert readouts["full"] == readouts["without_bds"] == "pbc 1.0/0.3"  # the calibrated one, not the best one
    assert readouts["blind_constant"] == readouts["baseline_constant"] == f"constant {PENALTIES[2]}"
    assert rows["full"]["hiou"] == [45, 46, 47] and rows["full"]["miou_unseen"] == [35, 35, 35]
    assert rows["blind_constant"]["hiou"] == [44, 45, 46]
    assert rows["full"]["seeds"] == [0, 1, 2] and rows["without_bds"]["seeds"] == [0]


def test_the_table_has_means_and_standard_errors(report: Path) -> None:
    error = statistics.stdev([45, 46, 47]) / 3**0.5
    table = (report / "ablation.md").read_text()
    assert f"| {ROWS['full'].title} | 55.0 ± 0.0 | 35.0 ± 0.0 | 46.0 ± {error:.1f} | 3 |" in table
    assert f"| {ROWS['without_bds'].title} | 55.0 | 35.0 | 45.0 | 1 |" in table
    for name in ("ablation.png", "misalignment.png"):
        assert (report / name).stat().st_size > 10_000


def test_rows_without_cells_are_said(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps({"gamma": 0.0, "threshold": 0.5}))
    with pytest.raises(FileNotFoundError, match="no finished cell"):
        summarize(tmp_path / "cells", tmp_path)


def test_rows_share_trainings_of_rows_that_have_them() -> None:
    assert {"baseline", "full"} <= set(TRAININGS)
    assert all(row.cells in TRAININGS and not row.overrides for row in ROWS.values() if row.cells)
    assert ROWS["baseline"].seeds >= 5 and ROWS["full"].seeds >= 5 and min(ROWS[name].seeds for name in TRAININGS) >= 3


@pytest.mark.parametrize("flags", [["--rows", "full,nonsense"], ["--cell", "plus_bds"]])
def test_unknown_rows_are_refused(flags: list[str]) -> None:
    run = subprocess.run([sys.executable, "scripts/ablate.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and flags[-1].split(",")[-1] in run.stderr and "baseline" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("row", ["baseline", "full", "pbc", "plus_fes"])
@pytest.mark.parametrize("convolutional", [False, True])
def test_a_cell_is_read_out_in_all_ways(row: str, convolutional: bool, tmp_path: Path, monkeypatch) -> None:
    """Scores without a suffix equal the evaluator's, whatever other readouts use the same forward pass."""
    settings = {
        "data.dataset": "embedded_scenes",
        "data.num_train": 4,
        "data.transform": "{crop_size: 32, scale_range: [0.25, 0.5]}",
        "model.image_processor.dense_weight": 0,
        "training.steps": 1,
        "training.batch_size": 2,
        "training.evaluate_every": 0,
        "training.log_every": 1,
    }
    if convolutional:
        pytest.importorskip("timm", reason="convolutional towers need timm")
    first = ROWS[row].start or row
    start = tiny_checkpoint(tmp_path / "start", **(tower_config() if convolutional else {}), **ROWS[first].overrides)
    settings["model.checkpoint"] = start
    opened = ablation.open_part
    monkeypatch.setattr(ablation, "open_part", lambda data, part, count: opened(data, "validation", 2))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    found = run_cell(row, 0, str(tmp_path), flags, [(1.0, 0.5)])

    names = {"plain"} | ({"pbc 1.0/0.5", "pbc 8.0/0.5"} if row in ("full", "pbc") else set())
    if row in ("baseline", "full"):  # other rows are not read out in these ways
        names |= {"queries", *(f"constant {p}" for p in PENALTIES), *(f"oracle {gamma}" for gamma in ORACLE_GAMMAS)}
    with_cells = {f"{name} with cells" for name in names - {"queries"}} if convolutional else set()
    assert set(found["scores"]) == names | with_cells
    assert row in ("pbc", "plus_fes") or found["scores"]["constant 0.0"] == found["scores"]["plain"]
    assert (found["indicator_roc_auc"] is not None) == (row in ("full", "pbc")) and 0 <= found["recall_unseen"] <= 100
    model, processor = load_checkpoint(tmp_path / f"{row}-0" / "final")
    split = load_split("embedded_scenes")
    part = SegmentationDataset(opened(load_settings(flags).data, "validation", 2), split, training=False)
    prototypes = model.get_text_prototypes(processor, list(split.classes))
    arguments = (evaluation_batches(part, processor, 2), split, prototypes, {"default": Readout(gamma=0.0)})
    expected = evaluate_model(model, processor.image_processor, *arguments)["default"]
    assert found["scores"]["plain"] == pytest.approx({name: expected[name] for name in SCORES}, nan_ok=True)
    stale = {**found, "scores": {}, "recall_seen": 0.0}
    again = rescore_cell(stale, str(tmp_path), [*flags, "--training.log_every=5"], [(1.0, 0.5)])
    assert json.dumps(again) == json.dumps(found)  # as text, because nan is not equal to itself
    with pytest.raises(ValueError, match=f"{row} 0 was trained with training.batch_size 2"):
        rescore_cell(found, str(tmp_path), [*flags, "--training.batch_size=1"], [])
    if row == "pbc":  # the indicator was added, and nothing else was trained
        before = load_checkpoint(tmp_path / "baseline-0" / "final")[0].state_dict()
        after = model.state_dict()
        added = {"indicator.mlp.layers.0.weight", "indicator.mlp.layers.0.bias"}
        added |= {"indicator.mlp.layers.1.weight", "indicator.mlp.layers.1.bias"}
        assert after.keys() - before.keys() == added
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_row_without_its_calibration_is_left_out(tmp_path: Path, capsys) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "pbc-0.json").write_text(json.dumps(cell("pbc", 0, PENALTIES[2])))
    summarize(tmp_path / "cells", tmp_path)
    assert "calibration_pbc.json is missing" in capsys.readouterr().err
    assert "pbc" not in [row["name"] for row in json.loads((tmp_path / "ablation.json").read_text())["rows"]]


@pytest.mark.parametrize(
    "parts", [["indicator"], ["classifier.adapter", "side_network.query_embeddings"]], ids="+".join
)
def test_only_the_named_parts_are_trained(parts: list[str]) -> None:
    model = tiny_model()
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train_only(model, parts)
    after = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert after == {name for name in before if name in parts or any(name.startswith(f"{part}.") for part in parts)}
    assert after


@pytest.mark.parametrize("part", ["indicatr", "text_encoder", "side"])
def test_parts_that_cannot_be_trained_are_named(part: str) -> None:
    with pytest.raises(ValueError, match=rf"`training.trainable` contains '{part}'; expected some of .*indicator"):
        train_only(tiny_model(), [part])
