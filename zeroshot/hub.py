# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Collects the files of a model and of its demo, and uploads them to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .checkpoints import CODE_FOLDER, REFERENCES, TOKENIZER, WEIGHTS, check_weights, read_object
from .files import read_text


Files = dict[str, bytes | Path]
PLACEHOLDER = "to-be-chosen"  # `license_name` of a card without a licence


def code_files(values: object) -> set[str]:
    """The code files that a config refers to: `folder/file.Class` in `auto_map` and `custom_pipelines`."""
    if not isinstance(values, dict):
        return set()
    nested = (code_files(value) for value in values.values())
    references = [*values.get("auto_map", {}).values(), *filter(None, [values.get("impl")])]
    return {f"{reference.rpartition('.')[0]}.py" for reference in references}.union(*nested)


def checkpoint_files(checkpoint: Path) -> Files:
    """Weights, config, processor, tokenizer and code of a checkpoint, by their paths in the repository.

    Raises:
        ValueError: The folder is not a complete AlignZeg checkpoint.
    """
    names = [path.name for path in checkpoint.glob("*") if path.name.endswith(WEIGHTS)]
    if not names:
        raise ValueError(f"`--checkpoint` is {str(checkpoint)!r}, which has no model.safetensors.")
    names += [name for name in (*REFERENCES, *TOKENIZER) if (checkpoint / name).is_file()]
    code = checkpoint / CODE_FOLDER if (checkpoint / CODE_FOLDER).is_dir() else checkpoint
    names += [path.relative_to(checkpoint).as_posix() for path in code.glob("*.py")]
    needed = {"config.json", "processor_config.json", "tokenizer.json"}
    for name in REFERENCES:
        if name in names:
            needed |= code_files(read_object(checkpoint / name))
    check_weights(checkpoint)
    missing = sorted(needed - set(names))
    if missing:
        raise ValueError(f"`--checkpoint` is {str(checkpoint)!r}, which lacks {', '.join(missing)}: save it again.")
    return {name: checkpoint / name for name in sorted(names)}


def card_files(card: Path, model: str, root: Path) -> Files:
    """The card as README.md, with `model` in its example, and the files of the clone `root` to which it links.

    Raises:
        ValueError: The file is missing, has no metadata, or its licence is still the placeholder.
    """
    if not card.is_file():
        raise ValueError(f"`--card` is {str(card)!r}, which is not a file.")
    text = re.sub(r'(?m)^checkpoint = ".*"$', f'checkpoint = "{model}"', read_text(card))
    try:
        metadata = ModelCard(text).data.to_dict()
    except Exception as error:  # YAML errors, and values that the Hub's classes reject
        raise ValueError(f"The metadata of {card} cannot be read: {error}") from error
    if not metadata.get("library_name") or not metadata.get("pipeline_tag"):
        raise ValueError(f"{card} needs metadata with `library_name` and `pipeline_tag` at its top.")
    if metadata.get("license_name") == PLACEHOLDER:
        raise ValueError(
            f"{card} has no licence: at its top, replace `license: other` and `license_name: {PLACEHOLDER}` by a "
            "licence that the pretrained weights and the data allow."
        )
    names = re.findall(r"\]\(([^)#]+)\)|\"([\w/.-]+\.(?:png|jpg))\"", text)
    linked = {name for pair in names for name in pair if name and (root / name).is_file()}
    return {"README.md": text.encode(), **{name: root / name for name in sorted(linked)}}


def space_files(app: Path, model: str | None) -> Files:
    """The demo's folder as the root of a Space with `model`."""
    files: Files = {
        path.relative_to(app).as_posix(): path
        for path in sorted(app.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    readme = (app / "README.md").read_text(encoding="utf-8")
    if model is not None:
        readme, count = re.subn(r"^(models:\s*\n\s*-\s*)\S+", rf"\g<1>{model}", readme, count=1, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"{app / 'README.md'} has no model: its metadata needs `models:` with one entry.")
    return {**files, "README.md": readme.encode()}


def push(api: HfApi, repository: str, kind: str, files: Files, message: str, private: bool) -> str:
    """Creates the repository if it does not exist and commits `files`; returns its URL."""
    try:
        address = api.create_repo(
            repository, repo_type=kind, private=private, exist_ok=True, space_sdk="gradio" if kind == "space" else None
        )
        api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            repo_type=kind,
        )
    except LocalTokenNotFoundError as error:
        raise RuntimeError(
            "You are not logged in; run `hf auth login`, or set HF_TOKEN to a token with write access."
        ) from error
    except HfHubHTTPError as error:
        raise RuntimeError(
            f"the Hub rejected it ({error}). Check the repository's name and the token's permissions."
        ) from error
    return str(address)
