# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Settings: defaults, a YAML file over them, flags over both, and an answer to every slip."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor
from zeroshot.settings import DataSettings, ModelSettings, Settings, TrainingSettings, load_settings, take_option


CONFIGS = sorted((Path(__file__).resolve().parent.parent / "scripts" / "configs").glob("*.yaml"))
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


BOMB = b"training:\n- &a [x]\n" + b"".join(
    b"- &%c [%s]\n" % (c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghij"
)
POSITIVE = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints", "max_grad_norm")
POSITIVE += ("learning_rate", "weight_decay", "warmup_steps", "save_every", "evaluate_every")  # four: or zero


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_nothing_given_is_all_defaults() -> None:
    assert load_settings([]) == Settings(model=ModelSettings(), data=DataSettings(), training=TrainingSettings())


def test_a_file_overrides_defaults_and_flags_override_the_file(file: str) -> None:
    settings = load_settings(
        ["--training.steps", "20", "--config", file, "--model.config.mask_dim", "8", "--model.config.num_queries=7"]
        + ["--data.root", "null", "--resume=false", "--training.tensorboard", "no", "--data.num_train", "12"]
    )
    assert settings.seed == 3 and settings.model.clip == "some/folder"
    assert settings.training.steps == 20  # wherever it stands
    assert settings.model.config == {"num_queries": 7, "fusion_layers": [0, 3], "mask_dim": 8}
    assert settings.data == dataclasses.replace(DataSettings(), num_train=12)
    assert settings.resume is False and settings.training.tensorboard is False
    untouched = {f.name for f in dataclasses.fields(TrainingSettings)} - {
        "steps",
        "learning_rate",
        "weight_decay",
        "tensorboard",
    }
    assert all(getattr(settings.training, name) == getattr(TrainingSettings(), name) for name in untouched)


def test_numbers_are_numbers(file: str) -> None:
    """YAML reads 1e-4 as a text; a whole number will do where a fraction is meant."""
    training = load_settings(["--config", file, "--training.max_grad_norm", "2"]).training
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (1e-4, 1.0, 2.0)
    assert all(
        type(value) is float for value in (training.learning_rate, training.weight_decay, training.max_grad_norm)
    )
    for text in ("3e-4", "3.0e-4", "0.0003", "3E-4"):
        assert load_settings(["--training.learning_rate", text]).training.learning_rate == pytest.approx(3e-4)


def test_of_two_flags_the_later_counts() -> None:
    assert load_settings(["--seed", "1", "--seed=2"]).seed == 2
    settings = load_settings(["--model.config.a", "1", "--model.config", "{b: 2}", "--model.config.c", "3"])
    assert settings.model.config == {"b": 2, "c": 3}


def test_hyphens_do_for_underscores() -> None:
    assert load_settings(["--training.batch-size", "3", "--output-dir", "some-folder"]).output_dir == "some-folder"
    assert load_settings(["--training.batch-size", "3"]).training.batch_size == 3


def test_values_of_flags_are_yaml() -> None:
    arguments = ["--model.config.fusion_layers", "[0, 1]", "--data.transform", "{crop_size: null, scale: [0.5, 2]}"]
    settings = load_settings([*arguments, "--model.config.nested.deep.value", "text", "--output_dir", "-runs"])
    assert settings.model.config == {"fusion_layers": [0, 1], "nested": {"deep": {"value": "text"}}}
    assert settings.data.transform == {"crop_size": None, "scale": [0.5, 2]}
    assert settings.output_dir == "-runs"  # a value may begin with a hyphen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stepz", "1"], "`training.stepz`.*`?training.steps"),
        (["--stepz", "1"], "`stepz`.*seed"),
        (["--training", "5"], "`training`"),
        (["--training.steps", "many"], "`training.steps` is 'many'; expected"),
        (["--training.steps", "1.5"], "`training.steps` is 1.5"),
        (["--training.steps", "true"], "`training.steps` is True"),
        (["--training.steps", "null"], "`training.steps` is None"),
        (["--training.learning_rate", "fast"], "`training.learning_rate` is 'fast'"),
        (["--training.learning_rate", "true"], "`training.learning_rate` is True"),
        (["--training.learning_rate", "null"], "`training.learning_rate` is None"),
        (["--training.learning_rate", "[1]"], r"`training.learning_rate` is \[1\]"),
        (["--resume", "1"], "`resume` is 1"),
        (["--resume", "maybe"], "`resume` is 'maybe'"),
        (["--data.num_train", "1.5"], "`data.num_train` is 1.5"),
        (["--data.num_train", "true"], "`data.num_train` is True"),
        (["--data.root", "5"], "`data.root` is 5"),
        (["--data.dataset", "null"], "`data.dataset` is None"),
        (["--model.config", "[1]"], r"`model.config` is \[1\]"),
        (["--model.config", "5"], "`model.config` is 5"),
        (["--seed.deep", "1"], "`seed`"),
        (["--training.steps"], "--training.steps needs a value"),
        (["training.steps", "5"], "'training.steps' is not an option"),
        (["--config", "nowhere.yaml"], "`--config` names 'nowhere.yaml'"),
        (["--seed", "-1"], "`seed` is -1; expected a number from 0"),
        (["--seed", str(10**26)], "`seed` is 1000"),
        (["--data.num_train", "0"], "`data.num_train` is 0; expected a number from 1 on"),
        (["--data.pseudo_unseen", "nan"], "`data.pseudo_unseen` is nan"),
        *(([f"--training.{name}", "-1"], f"`training.{name}` is -1") for name in POSITIVE),
        *(([f"--training.{name}", "0"], f"`training.{name}` is 0") for name in POSITIVE[:-4]),
        (["--training.best_metric", "foo"], "`training.best_metric` is 'foo'; expected miou_seen, "),
        (["--training.on_nan", "foo"], "`training.on_nan` is 'foo'; expected stop, skip"),
        (["--training.schedule", "step"], "`training.schedule` is 'step'"),
        (["--model.config.x", "[" * 3000], "`--model.config.x` is nested too deeply"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_slips_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "must hold names and values"),
        ("just words", "must hold names and values"),
        ("seed: [1", "not valid YAML"),
        ("training: {step: 5}", "`training.step`"),
        ("training: 5", "`training`"),
        ("steps: 5", "`steps`"),
        ("1: 5", "`1`"),
    ],
)
def test_files_that_make_no_sense_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_settings(["--config", str(tmp_path / "settings.yaml")])


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\nmodel:\n", "model:\n  config:\n"])
def test_empty_sections_are_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    assert load_settings(["--config", str(tmp_path / "settings.yaml")]) == Settings()


@pytest.mark.parametrize("text", ["training:\n", "seed: 3\n", "model: {config: }\n", "model: 5\n"])
def test_flags_below_a_file_that_has_no_such_section(text: str, tmp_path: Path) -> None:
    """An empty section is filled, a value in the way is named."""
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    config = ["--config", str(tmp_path / "settings.yaml")]
    if text in ("seed: 3\n", "model: 5\n"):
        name = text.split(":")[0]
        with pytest.raises(ValueError, match=f"`{name}`"):
            load_settings([*config, f"--{name}.config.num_queries", "1"])
    else:
        arguments = ["--training.steps", "5", "--model.config.num_queries", "6"]
        settings = load_settings([*config, *arguments])
        assert settings.training.steps == 5 and settings.model.config == {"num_queries": 6}


def test_settings_survive_a_round_trip(file: str, tmp_path: Path) -> None:
    settings = load_settings(["--config", file, "--data.num_train", "5"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings.as_dict()), encoding="utf-8")
    assert load_settings(["--config", str(tmp_path / "again.yaml")]) == settings


def documented(cls: type) -> set[str]:
    """Names before the colons of the section "Attributes" of a docstring."""
    lines = (cls.__doc__ or "").split("Attributes:")[1].splitlines()
    heads = [line for line in lines if line.startswith(" " * 8) and not line.startswith(" " * 9) and ":" in line]
    return {name.strip() for head in heads for name in head.partition(":")[0].split(",")}


@pytest.mark.parametrize("cls", [ModelSettings, DataSettings, TrainingSettings])
def test_every_setting_is_documented(cls: type) -> None:
    assert {f.name for f in dataclasses.fields(cls)} <= documented(cls)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_name_things_that_exist(path: Path) -> None:
    """Every file that is a training's settings: fields of the config and options of the image processor too."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not set(values) & {"model", "training", "data"}:
        pytest.skip("holds no settings of a training")
    settings = load_settings(["--config", str(path)])
    known = set(AlignZegConfig().to_dict())
    assert set(settings.model.config) <= known
    assert set(settings.model.image_processor) <= set(AlignZegImageProcessor().to_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: \xff\xfe", "is no UTF-8 text"),
        (b"[" * 3000, "nested too deeply"),
        (b"{: :", "is not valid YAML"),
        (b"- 1", "must hold names and values"),
        (BOMB, "`training` must hold names and values"),
    ],
)
def test_damaged_files_are_named_in_a_short_message(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_settings(["--config", str(tmp_path / "own.yaml")])
    assert len(str(raised.value)) < 20_000


def test_options_of_a_script_are_taken_from_those_of_the_training() -> None:
    arguments = ["--folds", "2", "--seed", "--folds=3", "--folds", "--x=--folds"]
    with pytest.raises(ValueError, match="--x needs a value"):
        take_option(["--x"], "--x")
    assert take_option(arguments, "--folds") == "--x=--folds" and arguments == ["--seed"]
    assert take_option(arguments, "--output", "none") == "none"
