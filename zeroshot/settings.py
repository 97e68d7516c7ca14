# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Settings of a training: dataclasses with every default, a YAML file that overrides them, flags that override both.

    train.py --config scripts/configs/embedded.yaml --training.steps 100 --model.config.num_queries 50

Model hyper-parameters are not repeated here: `model.config` holds overrides of [`AlignZegConfig`] by name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .files import parse_yaml, read_text, shown


@dataclass
class ModelSettings:
    """Where the model comes from.

    Attributes:
        checkpoint: An AlignZeg checkpoint (folder or hub id) to start from; then `clip` and `config` are not used.
        clip: A CLIP to start from: a folder or hub id of a transformers CLIP, or a model name of open_clip.
        pretrained: With open_clip, the tag or file of the weights.
        random_weights: With open_clip, draw the weights instead: for tests of size and speed, not for training.
        config: Overrides of `AlignZegConfig`, by name.
        image_processor: Overrides of `AlignZegImageProcessor`, by name.
    """

    checkpoint: str | None = None
    clip: str | None = None
    pretrained: str | None = None
    random_weights: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSettings:
    """What to train on.

    Attributes:
        dataset: A name known to `zeroshot.data.benchmarks.load_benchmark`, a hub id or a local folder.
        root: Folder of a named benchmark's files.
        split: Name of a split or a YAML with classes and unseen classes; default: that of `dataset`.
        train_part, validation_part: Parts of the dataset.
        num_train, num_validation: Use the first so many images only (the embedded scenes draw so many).
        image_column, label_column: Columns of a dataset that is not a named benchmark.
        label_folder: Folder of label files, where a benchmark has several.
        context_459_ids: PASCAL Context's label files hold the original ids 1..459 instead of 0..59.
        scene_seed: Seed of the embedded scenes.
        transform: Arguments of `zeroshot.data.transforms.TrainTransform`.
        in_memory: Decode the training images once and keep them.
        cached_epochs: Run the frozen image tower once on the samples of the first N epochs, keep its hidden states in
            memory, and repeat these epochs. 1 is exact where the transform never changes an image; with random crops,
            N is the number of augmented versions of each image. 0 runs the tower in every step.
        validate: Read the whole dataset once, before training, and stop if a file is missing or does not fit.
        pseudo_unseen: Share of the seen classes that play unseen; the real unseen ones then exist nowhere. For choosing
            hyper-parameters and calibration without unseen labels; 0 is the real task.
        pseudo_seed: Chooses them.
        fully_supervised: Train with the labels of all classes: the upper reference, not zero-shot.
        num_workers: Loader processes.
    """

    dataset: str = "embedded_scenes"
    root: str | None = None
    split: str | None = None
    train_part: str = "train"
    validation_part: str = "validation"
    num_train: int | None = None
    num_validation: int | None = None
    image_column: str = "image"
    label_column: str = "label"
    label_folder: str | None = None
    context_459_ids: bool = False
    scene_seed: int = 0
    transform: dict[str, Any] = field(default_factory=dict)
    in_memory: bool = False
    cached_epochs: int = 0
    validate: bool = True
    pseudo_unseen: float = 0.0
    pseudo_seed: int = 0
    fully_supervised: bool = False
    num_workers: int = 0


@dataclass
class TrainingSettings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images per process and micro-step.
        gradient_accumulation_steps: Micro-steps of one optimizer step.
        learning_rate, weight_decay: Of AdamW; no decay on norms, biases, embeddings and queries.
        warmup_steps: Linear warm-up.
        schedule: After it, `"cosine"` to zero, `"poly"` (power 0.9) to zero, or `"constant"`.
        max_grad_norm: Gradients are clipped to it.
        log_every, evaluate_every, save_every: In steps; 0 switches evaluation or checkpoints off, not the log.
        keep_checkpoints: How many checkpoints are kept.
        best_metric: Score on the validation part by which `best` is kept. The default looks at seen classes only:
            labels of unseen classes must not choose a model.
        on_nan: `"stop"` or `"skip"` a step whose loss or gradient is not finite.
        num_threads: Threads of torch on a CPU; 0 leaves them alone.
        tensorboard: Log to TensorBoard beside `metrics.jsonl`.
    """

    steps: int = 60000
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 1500
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    log_every: int = 50
    evaluate_every: int = 5000
    save_every: int = 1000
    keep_checkpoints: int = 2
    best_metric: str = "miou_seen"
    on_nan: str = "stop"
    num_threads: int = 0
    tensorboard: bool = True


@dataclass
class Settings:
    """All settings of one training.

    Attributes:
        output_dir: Folder of the run: checkpoints, logs and the final model.
        seed: Of weights, order, augmentation and every random choice in the objective.
        resume: Continue from the newest complete checkpoint in `output_dir`, if there is one.
    """

    output_dir: str = "runs/alignzeg"
    seed: int = 0
    resume: bool = True
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_TINY = 1e-12  # above zero
_RANGES = (  # names, smallest and largest value
    ("seed data.scene_seed data.pseudo_seed", 0, 2**32 - 1),
    ("data.num_train data.num_validation", 1, math.inf),
    ("data.num_workers data.cached_epochs training.num_threads", 0, 4096),
    ("data.pseudo_unseen", 0, 0.99),
    ("training.steps training.batch_size training.gradient_accumulation_steps", 1, 2**31 - 1),
    ("training.log_every training.keep_checkpoints", 1, 2**31 - 1),
    ("training.warmup_steps training.evaluate_every training.save_every", 0, 2**31 - 1),
    ("training.learning_rate training.max_grad_norm", _TINY, 1e12),
    ("training.weight_decay", 0, 1e12),
)
_CHOICES = {
    "training.schedule": ("cosine", "poly", "constant"),
    "training.best_metric": ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "miou"),
    "training.on_nan": ("stop", "skip"),
}


def load_settings(arguments: list[str]) -> Settings:
    """Settings from command-line `arguments`: `--config FILE` first, then `--name.of.field value` in order.

    Values are read as YAML: `--training.steps 100`, `--data.root null`, `--model.config.fusion_layers "[0, 1]"`.

    Raises:
        ValueError: a flag or a key of the file names no setting, or a value has the wrong type or is out of its range;
            the message says which.
    """
    overrides, config = [], None
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        if not name.startswith("--"):
            raise ValueError(f"{arguments[position]!r} is not an option; options look like --training.steps 100.")
        if not equals:
            position += 1
            if position == len(arguments):
                raise ValueError(f"The option {name} needs a value.")
            value = arguments[position]
        position += 1
        if name == "--config":
            config = value
        else:
            overrides.append((name[2:].replace("-", "_"), value))
    values: dict[str, Any] = {}
    if config is not None:
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"`--config` names {config!r}, which is not a file.")
        values = parse_yaml(read_text(path), config) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{config} must hold names and values, such as `seed: 0`.")
    for name, text in overrides:
        node, parts = values, name.split(".")
        for depth, part in enumerate(parts[:-1], 1):
            if node.get(part) is None:  # absent, or an empty section of the file
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                where = ".".join(parts[:depth])
                raise ValueError(
                    f"`--{name}` cannot be set: `{where}` is {shown(node)} and holds no names and values."
                )
        try:
            node[parts[-1]] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            node[parts[-1]] = text
        except RecursionError:
            raise ValueError(f"`--{name}` is nested too deeply.") from None
    settings = _build(Settings, values, "")
    _check_ranges(settings)
    return settings


def take_option(arguments: list[str], name: str, default: str | None = None) -> str | None:
    """Removes the option `name` and its value from the arguments; the last value, or the default.

    Raises:
        ValueError: The option has no value.
    """
    kept = []
    while arguments:
        option, equals, value = arguments.pop(0).partition("=")
        if option != name:
            kept.append(f"{option}{equals}{value}")
            continue
        if not equals and not arguments:
            raise ValueError(f"The option {name} needs a value.")
        default = value if equals else arguments.pop(0)
    arguments[:] = kept
    return default


def _check_ranges(settings: Settings) -> None:
    parts = {"": settings, "data.": settings.data, "training.": settings.training}
    values = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in vars(part).items()}
    for names, least, most in _RANGES:
        for name in names.split():
            value = values[name]
            if value is not None and not least <= value <= most:
                expected = f"from {least} on" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"`{name}` is {value}; expected a number {expected}.")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ValueError(f"`{name}` is {shown(values[name])}; expected {', '.join(choices)}.")


def _build(cls, values: dict[str, Any], prefix: str):
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"`{prefix.rstrip('.')}` must hold names and values, got {shown(values)}.")
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ValueError(
            f"There is no setting `{prefix}{str(unknown[0])[:60]}`; known are {', '.join(prefix + h for h in hints)}."
        )
    arguments = {}
    for name, value in values.items():
        kind = hints[name]
        if value is None and (dataclasses.is_dataclass(kind) or kind == dict[str, Any]):
            value = {}  # an empty section of a file
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{name}.")
        elif kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-4 as a string
                value = float(value)
            except ValueError:
                raise ValueError(f"`{prefix}{name}` is {shown(value)}; expected a number.") from None
        elif kind in (int, bool, float, str) and type(value) is not kind:
            raise ValueError(f"`{prefix}{name}` is {shown(value)}; expected {kind.__name__}.")
        elif kind == dict[str, Any] and not isinstance(value, dict):
            raise ValueError(f"`{prefix}{name}` is {shown(value)}; expected names and values.")
        elif kind == (int | None) and not (value is None or type(value) is int):
            raise ValueError(f"`{prefix}{name}` is {shown(value)}; expected a whole number or null.")
        elif kind == (str | None) and not (value is None or isinstance(value, str)):
            raise ValueError(f"`{prefix}{name}` is {shown(value)}; expected a text or null.")
        arguments[name] = value
    return cls(**arguments)
