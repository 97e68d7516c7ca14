# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Collects the files of a model and of its demo, and uploads them to the Hub."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .checkpoints import CODE_FOLDER, REFERENCES, TOKENIZER, WEIGHTS, check_weights, read_object
from .files import read_text


Files = dict[str, bytes | Path]
PLACEHOLDER = "to-be-chosen"  # `license_name` of a card without a licence
OUR_LICENCE = "apache-2.0"
# What is not a link although it may look like one (metadata, fenced and inline code), or a link with its text and target.
# The text may contain a linked image, as badges do.
LINK = re.compile(
    r"\A---\n.*?^---$"
    r"|^[ \t]*(?P<fence>`{3,}|~{3,}).*?^[ \t]*(?P=fence)"
    r"|(?P<ticks>`+)(?:(?!\n\n).)+?(?P=ticks)"
    r"|!?\[(?P<text>(?:!\[[^\[\]]*\]\([^()]*\)|[^\[\]])*)\]\((?P<target><[^<>\n]+>|[^()\s]+)(?:\s[^()]*)?\)",
    re.DOTALL | re.MULTILINE,
)
SPACE = ("app.py", "README.md", "requirements.txt", "style.css", "viewer.html", "viewer.js")  # and the folder examples
SPACE_MODEL = re.compile(r"^(models:\s*\n\s*-\s*)(\S+)", re.MULTILINE)


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


def card_files(card: Path, model: str, root: Path, others: Collection[str] = ()) -> Files:
    """The card as README.md with `model` in its example, the files that it shows, and LICENSE if the card is Apache-2.0.

    Files in the card's folder to which it links are uploaded with it, except for documents (.md), which have links of
    their own. So are the images in its example, from the clone `root`. Links to what is not uploaded become plain text.

    Args:
        card: The card, in Markdown.
        model: The repository of the model, USER/NAME.
        root: A clone of this repository.
        others: Paths of the other files in the repository.

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
    images = re.findall(r"\"([\w/.-]+\.(?:png|jpg))\"", text)
    files: Files = {name: root / name for name in images if _is_file_in(root, name)}
    if metadata.get("license") == OUR_LICENCE:
        files["LICENSE"] = root / "LICENSE"
    text = LINK.sub(lambda link: _uploadable(link, card, files, others), text)
    return {"README.md": text.encode(), **files}


def _uploadable(link: re.Match[str], card: Path, files: Files, others: Collection[str]) -> str:
    """A match of `LINK` in a card, without its target if that is not uploaded; a file of the card's folder joins `files`."""
    target = (link["target"] or "#").strip("<>")
    if re.match(r"[a-z][a-z0-9+.-]*:|/|#", target, re.IGNORECASE):  # a URL, a place in the card, or no link at all
        return link[0]
    name = posixpath.normpath(unquote(re.split(r"[?#]", target)[0]))
    if _is_file_in(card.parent, name) and not name.endswith(".md"):
        files.setdefault(name, card.parent / name)
    uploaded = {*files, *others} | ({"README.md"} if card.name == "README.md" else set())
    if any(f"{path}/".startswith(f"{name}/") for path in uploaded):  # also a folder
        return link[0]
    return LINK.sub(lambda inner: _uploadable(inner, card, files, others), link["text"])


def _is_file_in(folder: Path, name: str) -> bool:
    """Whether the relative path `name` leads to a file below `folder`."""
    return not name.startswith("/") and ".." not in name.split("/") and (folder / name).is_file()


def space_model(app: Path) -> str:
    """The model repository that the demo in the folder `app` loads as a Space.

    Raises:
        ValueError: Its README.md has no model.
    """
    found = SPACE_MODEL.search(read_text(app / "README.md"))
    if found is None:
        raise ValueError(f"{app / 'README.md'} has no model: its metadata needs `models:` with one entry.")
    return found[2]


def space_files(app: Path, model: str | None) -> Files:
    """The demo's files as the root of a Space, without the static page and the integrations.

    Args:
        app: The demo's folder.
        model: The model repository that the Space loads. Default: the one in README.md of the folder.

    Raises:
        ValueError: README.md has no model.
    """
    examples = [path for path in (app / "examples").iterdir() if path.is_file() and not path.name.startswith(".")]
    files: Files = {name: app / name for name in SPACE}
    files |= {path.relative_to(app).as_posix(): path for path in sorted(examples)}
    old = space_model(app)
    readme = SPACE_MODEL.sub(rf"\g<1>{model or old}", read_text(app / "README.md"), count=1)
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
