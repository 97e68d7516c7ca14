# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Settings: defaults, presets, options, their precedence, and error messages."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor
from zeroshot.settings import DataSettings, Settings, SettingsParser, load_settings, read_preset


ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
TEXT = """
seed: 3
model:
  clip: some/folder
  config: {num_queries: 50, fusion_layers: [0, 3]}
training:
  steps: 10
  learning_rate: 1e-4
  weight_decay: 1
"""
POSITIVE = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints", "max_grad_norm")
OR_ZERO = ("weight_decay", "warmup_steps", "save_every", "evaluate_every", "num_threads")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_nothing_given_is_all_defaults() -> None:
    assert load_settings([]) == Settings()


def test_a_preset_overrides_defaults_and_options_override_the_preset(file: str) -> None:
    settings = load_settings(
        ["--config", file, "--training.steps", "20", "--model.config.mask_dim", "8", "--model.config.num_queries=7"]
        + ["--data.root", "null", "--resume=false", "--training.tensorboard", "no", "--data.num_train", "12"]
    )
    assert settings.seed == 3 and settings.model.clip == "some/folder" and settings.training.steps == 20
    assert settings.model.config == {"num_queries": 7, "fusion_layers": [0, 3], "mask_dim": 8}
    assert settings.data == dataclasses.replace(DataSettings(), num_train=12)
    assert settings.resume is False and settings.training.tensorboard is False
    assert (settings.training.learning_rate, settings.training.weight_decay) == (1e-4, 1.0)  # YAML reads 1e-4 as text
    assert isinstance(settings.training.weight_decay, float)


def test_of_two_options_the_later_counts() -> None:
    assert load_settings(["--seed", "1", "--seed=2"]).seed == 2
    settings = load_settings(["--model.config", "{b: [0, 1]}", "--model.config.c", "3"])
    assert settings.model.config == {"b": [0, 1], "c": 3}


def test_presets_build_on_others(file: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "own.yaml").write_text(
        "base: [../settings.yaml, steps.yaml]\nmodel: {config: {num_queries: 5}}\n"
    )
    (tmp_path / "more" / "steps.yaml").write_text("training: {steps: 7}\n")
    settings = load_settings(["--config", str(tmp_path / "more" / "own.yaml")])
    assert settings.seed == 3 and settings.training.steps == 7 and settings.training.learning_rate == 1e-4
    assert settings.model.config == {"num_queries": 5, "fusion_layers": [0, 3]}
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ValueError, match="builds on itself"):
        read_preset(tmp_path / "loop.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stepz", "1"], "no setting `training.stepz`; did you mean `training.steps`?"),
        (["--training.step", "1"], "did you mean `training.steps`?"),
        (["--steps", "1"], "did you mean `training.steps`?"),
        (["--folds", "2"], "no setting `folds`"),
        (["--training.steps", "many"], "training.steps"),
        (["--training.steps", "1.5"], "training.steps"),
        (["--training.steps", "null"], "training.steps"),
        (["--training.learning_rate", "fast"], "training.learning_rate"),
        (["--resume", "maybe"], "resume"),
        (["--data.num_train", "0"], "data.num_train"),
        (["--model.config", "[1]"], "model.config"),
        (["--training.steps"], "training.steps"),
        (["training.steps", "5"], "training.steps"),
        (["--config", "nowhere.yaml"], "`--config` refers to 'nowhere.yaml'"),
        (["--seed", "-1"], "seed"),
        (["--data.pseudo_unseen", "nan"], "data.pseudo_unseen"),
        *(([f"--training.{name}", "-1"], f"training.{name}") for name in (*POSITIVE, *OR_ZERO)),
        *(([f"--training.{name}", "0"], f"training.{name}") for name in POSITIVE),
        (["--training.best_metric", "foo"], "training.best_metric"),
        (["--training.on_nan", "foo"], "training.on_nan"),
        (["--training.schedule", "step"], "cosine.*poly.*constant"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_settings(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "expected names and values"),
        (b"just words", "expected names and values"),
        (b"seed: [1", "not valid YAML"),
        (b"seed: 1\nseed: 2", "'seed' occurs more than once"),
        (b"training: {steps: 1, steps: 2}", "'steps' occurs more than once"),
        (b"training: {step: 5}", "`training.step`; did you mean `training.steps`"),
        (b"training: 5", "`training`"),
        (b"steps: 5", "`steps`; did you mean `training.steps`"),
        (b"1: 5", "`1`"),
        (b"base: none.yaml", "none.yaml"),
        (b"seed: \xff\xfe", "is not UTF-8 text"),
        (b"[" * 3000, "nested too deeply"),
    ],
)
def test_unusable_presets_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_settings(["--config", str(tmp_path / "own.yaml")])
    assert len(str(raised.value)) < 2_000


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\nmodel:\n"])
def test_empty_sections_are_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    assert load_settings(["--config", str(tmp_path / "settings.yaml")]) == Settings()


def test_settings_survive_a_round_trip(file: str, tmp_path: Path) -> None:
    settings = load_settings(["--config", file, "--data.num_train", "5"])
    (tmp_path / "again.yaml").write_text(json.dumps(settings.as_dict()), encoding="utf-8")
    assert load_settings(["--config", str(tmp_path / "again.yaml")]) == settings


def test_help_explains_every_setting() -> None:
    missing = [
        action.dest for action in SettingsParser()._actions if not action.help or action.help.startswith("(type")
    ]
    assert not missing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_presets_name_things_that_exist(path: Path) -> None:
    settings = load_settings(["--config", str(path)])
    assert set(settings.model.config) <= set(AlignZegConfig().to_dict())
    assert set(settings.model.image_processor) <= set(AlignZegImageProcessor().to_dict())


@pytest.mark.parametrize("name", [*SCRIPTS, "../app/app.py"])
def test_help_and_mistakes_are_answered_before_torch_is_imported(name: str) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for option, statuses in (("--help", {0}), ("--no_such_option=1", {1, 2})):
        command = [sys.executable, "-c", code, str(ROOT / "scripts" / name), option]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode in statuses and "Traceback" not in result.stderr, result.stderr
