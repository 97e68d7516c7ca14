# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The recipe of the public benchmarks: its commands, and a run on a small tree on the CPU."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_trees import voc_tree
from tiny import tiny_checkpoint

from zeroshot.settings import load_settings


RECIPE = runpy.run_path(str(ROOT / "scripts" / "reproduce.py"))
plain_run = subprocess.run


def reproduce(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "scripts" / "reproduce.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


MODELS = {"vitb16": "ViT-B-16", "vitl14": "ViT-L-14", "convnext_base_w": "convnext_base_w"}


@pytest.mark.parametrize("processes", [1, 2, 8, 16])
@pytest.mark.parametrize("clip", RECIPE["TOWERS"])
def test_every_training_has_the_same_batch_and_a_known_preset(processes: int, clip: str, tmp_path: Path) -> None:
    for name, folder in RECIPE["DATA"].items():
        (training, _), *evaluations = RECIPE["commands"](name, clip, processes, tmp_path, tmp_path / "out")
        flags = training[training.index("scripts/train.py") + 1 :]
        settings = load_settings(flags)
        assert settings.training.batch_size * settings.training.gradient_accumulation_steps * processes == 32
        assert settings.data.root == str(tmp_path / folder) and settings.model.clip == MODELS[clip]
        assert len({report for _, report in evaluations}) == 2
        for command, report in evaluations:
            options = dict(zip(command, command[1:]))
            assert options["--model"] == f"{settings.output_dir}/final" and options["--output"] == str(report)
            assert (options["--dataset"], options["--part"]) == (settings.data.dataset, settings.data.validation_part)
            assert options["--root"] == settings.data.root


def test_dry_run_prints_the_commands_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--data_root", tmp_path / "missing", "--output_dir", tmp_path / "out", "--dry_run")
    assert reproduce(monkeypatch, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("scripts/")[2].split()[0] for line in lines] == ["train.py", "evaluate.py", "evaluate.py"] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--benchmarks", "voc2012,imagenet"], "'imagenet'; expected some of voc2012"),
        (["--num_processes", "3"], "`--num_processes` is 3; expected a divisor"),
        ([], "no folder 'VOCdevkit/VOC2012', which voc2012 needs"),
    ],
)
def test_what_cannot_work_is_refused(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert reproduce(monkeypatch, "--data_root", tmp_path, "--output_dir", tmp_path / "out", *flags) == 1
    assert words in capsys.readouterr().err


def test_a_small_tree_is_trained_evaluated_and_tabled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a tiny model on one CPU process in place of eight GPUs; the second run repeats no evaluation."""
    voc_tree(tmp_path / "VOCdevkit" / "VOC2012")
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text((lists / "train.txt").read_text())
    start, ran = tiny_checkpoint(tmp_path / "start"), []
    smaller = f"--model.clip null --model.pretrained null --model.checkpoint {shlex.quote(str(start))}"
    smaller += " --data.transform.crop_size 32 --data.num_workers 0 --training.steps 1 --training.batch_size 2"
    smaller += " --training.gradient_accumulation_steps 1 --training.warmup_steps 0 --training.tensorboard false"

    def on_the_cpu(command: list[str], **options):
        first = next(i for i, word in enumerate(command) if word.endswith(".py"))
        ran.append(command[first])
        extra = shlex.split(smaller) if command[first] == "scripts/train.py" else []
        return plain_run([sys.executable, *command[first:], *extra], **options)

    monkeypatch.setattr(subprocess, "run", on_the_cpu)
    flags = ("--data_root", tmp_path, "--output_dir", tmp_path / "out", "--benchmarks", "voc2012")
    assert reproduce(monkeypatch, *flags) == 0
    assert ran == ["scripts/train.py", "scripts/evaluate.py", "scripts/evaluate.py"]
    reports = [
        json.loads((tmp_path / "out" / "voc2012_vitb16" / name).read_text())
        for name in ("report.json", "report_without_pbc.json")
    ]
    assert reports[0]["protocol"]["gamma"] > 0 and reports[1]["protocol"]["gamma"] == 0
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[2].startswith("| voc2012_vitb16 | ") and table[3].startswith("| voc2012_vitb16, without PBC | ")
    assert [f"{reports[0][key]:.1f}" for key in ("miou_seen", "hiou")] == [table[2].split(" | ")[i] for i in (1, 3)]
    assert reproduce(monkeypatch, *flags) == 0
    assert ran[3:] == ["scripts/train.py"]
