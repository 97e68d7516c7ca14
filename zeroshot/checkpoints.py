# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Creates untrained AlignZeg checkpoints on any CLIP, and writes checkpoints that `from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from modeling_alignzeg import AlignZegConfig, AlignZegModel, AlignZegProcessor

from .files import atomic_file, atomic_folder, check_output, read_text, shown


CODE_FOLDER = "modeling_alignzeg"
CARD = "README.md"
WEIGHTS = (".safetensors", ".safetensors.index.json")
TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
REFERENCES = ("processor_config.json", "tokenizer_config.json", "config.json")  # files that may refer to code


def load_config(source: str | Path, argument: str = "--model", config: dict[str, Any] | None = None) -> AlignZegConfig:
    """The configuration of [`load_checkpoint`] with its arguments, without reading weights.

    Raises:
        ValueError: There is no such checkpoint, its configuration is damaged, or `config` contains an unknown field or an
            invalid value.
    """
    if not Path(source).exists() and str(source).count("/") != 1:  # not a Hub id: do not ask the network
        raise ValueError(
            f"`{argument}` is {str(source)!r}, but there is no such folder, and a Hub id has the form USER/NAME. Check the "
            "spelling."
        )
    check_config_names(config or {}, f"{argument}_config")
    with _explained(source, argument):
        stored, _ = AlignZegConfig.get_config_dict(source)
        if (kind := stored.get("model_type")) != AlignZegConfig.model_type:
            raise ValueError(f"its `model_type` is {kind!r}; to build on a CLIP, use `model.clip` or `--clip`")
        values = AlignZegConfig.from_pretrained(source)
    try:
        return AlignZegConfig.from_dict(values.to_dict() | config) if config else values
    except StrictDataclassError as error:
        raise ValueError(f"`{argument}_config` is invalid. {error}") from error


def check_config_names(config: Mapping[str, Any], argument: str) -> None:
    """
    Raises:
        ValueError: `config`, given as `argument`, contains a name that is not a field of `AlignZegConfig`.
    """
    known = [field.name for field in dataclasses.fields(AlignZegConfig)]
    for name in config:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"`{argument}` contains {name!r}, which is not a field of AlignZegConfig{hint}")


def load_checkpoint(
    source: str | Path, argument: str = "--model", config: dict[str, Any] | None = None
) -> tuple[AlignZegModel, AlignZegProcessor]:
    """Loads the model, in evaluation mode, and the processor from `source`, a folder or hub id passed as `argument`.

    With overrides of its configuration, `config`, parts that it lacks or that have another shape get new weights.

    Raises:
        ValueError: As [`load_config`], or its weights are damaged.
    """
    changed = load_config(source, argument, config)
    changes: dict[str, Any] = {"config": changed, "ignore_mismatched_sizes": True} if config else {}
    with _explained(source, argument):
        model = AlignZegModel.from_pretrained(source, **changes)
        return model.eval(), AlignZegProcessor.from_pretrained(source)


@contextmanager
def _explained(source: str | Path, argument: str) -> Iterator[None]:
    """Turns errors of transformers into one sentence."""
    try:
        yield
    except Exception as error:  # transformers raises errors of all types for damaged files
        reason = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
        if Path(source).exists():
            why = f"which cannot be loaded as an AlignZeg checkpoint ({reason})"
        else:
            why = f"but there is no such folder, and the Hub does not provide it ({reason}). Check the spelling"
        raise ValueError(f"`{argument}` is {str(source)!r}, {why}.") from error


def check_replaceable(folder: str | Path) -> None:
    """Checks that [`save_checkpoint`] would replace nothing but an earlier checkpoint.

    Raises:
        ValueError: `folder` contains other files.
    """
    folder = Path(os.path.realpath(folder))
    check_output(folder / "config.json")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    try:
        is_ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "alignzeg"
    except (OSError, ValueError, TypeError, KeyError):
        is_ours = False
    unexpected = [name for name in names if (folder / name).is_dir() and name != "__pycache__"]
    if not is_ours or unexpected:
        raise ValueError(
            f"{folder} contains {(unexpected or names)[0]!r}, which is not part of an AlignZeg checkpoint. "
            "Everything in it would be replaced: choose a new folder."
        )


def save_checkpoint(
    model: AlignZegModel, processor: AlignZegProcessor, folder: str | Path, card: str | None = None
) -> Path:
    """Writes model, processor, tokenizer and their code; an existing checkpoint is replaced as a whole.

    `card` is the text of its model card, README.md.

    Raises:
        ValueError: As [`check_replaceable`].
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as partial:
        processor.save_pretrained(partial)
        model.save_pretrained(partial)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint.

    Raises:
        ValueError: It does not contain names and values.
    """
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): save the checkpoint again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains {shown(values)}; expected names and values. Save the checkpoint again.")
    return values


def check_weights(checkpoint: Path) -> None:
    """Opens all weights files.

    Raises:
        ValueError: A file is damaged, or a file in the index is missing.
    """
    files = {path.name for path in checkpoint.glob("*.safetensors")}
    for index in checkpoint.glob("*.safetensors.index.json"):
        files |= set(read_object(index).get("weight_map", {}).values())
    for name in sorted(files):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{checkpoint / name} is damaged or missing ({error}): save the checkpoint again."
            ) from error


def install_as_root(checkpoint: str | Path, root: str | Path, half: bool = False) -> list[Path]:
    """Installs `checkpoint` in `root`, where it loads with the code in the folder `modeling_alignzeg`.

    Copies its weights and JSON files. All files are written under temporary names and renamed when the last one is
    complete; weights of an earlier checkpoint are removed.

    Args:
        checkpoint: A folder that [`save_checkpoint`] wrote.
        root: A clone of this repository, or a folder with a link to the code.
        half: Store matrices and kernels as float16. They load as float32, the dtype in the config.

    Returns:
        The files that were written.

    Raises:
        ValueError: `checkpoint` is not an AlignZeg checkpoint or is damaged, or `root` is not a clone.
    """
    checkpoint, root = Path(checkpoint), Path(root)
    if not (root / CODE_FOLDER / "modeling_alignzeg.py").is_file():
        raise ValueError(f"`root` is {str(root)!r}, which has no folder {CODE_FOLDER} with the model's code.")
    weights = sorted(file.name for file in checkpoint.glob("*") if file.name.endswith(WEIGHTS))
    present = {file.name for file in checkpoint.glob("*.json")}
    missing = [name for name in ("config.json", "processor_config.json", "tokenizer.json") if name not in present]
    if missing or not weights:
        raise ValueError(f"`checkpoint` is {str(checkpoint)!r}, which has no {(missing or ['model.safetensors'])[0]}.")
    check_weights(checkpoint)
    names = [*weights, *sorted(name for name in present if name in REFERENCES or name in TOKENIZER)]
    with ExitStack() as stack:
        for name in names:
            partial = stack.enter_context(atomic_file(root / name))
            if name in REFERENCES:
                values = _in_code_folder(read_object(checkpoint / name))
                partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            elif half and name.endswith(".safetensors"):
                weights_as_half = {
                    key: value.half() if value.is_floating_point() and value.ndim >= 2 else value
                    for key, value in load_file(checkpoint / name).items()
                }
                save_file(weights_as_half, partial, metadata={"format": "pt"})
            else:
                shutil.copyfile(checkpoint / name, partial)
    for file in root.glob("*"):
        if file.name.endswith(WEIGHTS) and file.name not in weights:
            file.unlink()
    return [root / name for name in names]


def _in_code_folder(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a JSON file, with every reference to code, `file.Class`, changed to point into the code's folder."""

    def moved(reference: str) -> str:
        return reference if "/" in reference else f"{CODE_FOLDER}/{reference}"

    result = {key: _in_code_folder(value) if isinstance(value, dict) else value for key, value in values.items()}
    if "auto_map" in result:
        result["auto_map"] = {auto: moved(reference) for auto, reference in result["auto_map"].items()}
    for pipeline in result.get("custom_pipelines", {}).values():
        pipeline["impl"] = moved(pipeline["impl"])
    return result
