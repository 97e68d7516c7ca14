# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""README, model card and tutorial work as described.

- Python blocks run in a new process, in a copy of the clone. Blocks that use the demo run while it is running (slow).
  - Shell blocks run there too, unless the comment `<!-- no-test: reason -->` follows the block. For these and in the other
  documents, every command of this repository is checked: its script or make target, its flags and settings, and the
  files of the repository that it uses must exist.
  - YAML blocks load as splits. Relative links, and paths of this repository in backticks, exist.
  - The card's metadata matches huggingface_hub's format and the measured results.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from demo_server import serve_demo
from huggingface_hub import ModelCard, SpaceCard
from transformers.pipelines import PIPELINE_REGISTRY

from zeroshot.data.splits import load_split
from zeroshot.settings import load_settings


ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = "docs/usage.md"  # its blocks continue each other
PHOTO_CARD = "checkpoints/photos/README.md"
EXECUTED = ("README.md", "model_card.md", PHOTO_CARD, TUTORIAL)
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
CHECKED = ("app/README.md", *(name for name in DOCUMENTS if name not in EXECUTED))
DEMO = "http://127.0.0.1:7860"


@dataclass
class Block:
    """A code block: its position, its language, and the reason for not running it (`None`: it runs)."""

    file: str
    line: int
    language: str
    code: str
    no_test: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.language}"


def blocks_of(name: str) -> Iterator[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\s*<!-- no-test: (.*?) -->)?", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(text):
        yield Block(name, text[: match.start()].count("\n") + 1, match[1], match[2], match[3])


BLOCKS = [block for name in (*EXECUTED, *CHECKED) for block in blocks_of(name)]


def chosen(*languages: str, run: bool) -> list:
    """Blocks in these languages to run, or to check only."""
    return [
        pytest.param(block, id=str(block))
        for block in BLOCKS
        if block.language in languages and (block.file in EXECUTED and block.no_test is None) == run
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files of the repository, in which blocks may write."""
    folder = tmp_path_factory.mktemp("clone") / "alignzeg"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "predictions"):
            (folder / path.name).symlink_to(path)
    programs = folder.parent / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)
    return folder


def run(clone: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(clone.parent / "modules"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{clone.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def run_python(clone: Path, blocks: list[Block], change: tuple[str, str] = ("", "")) -> str:
    """Runs blocks in sequence in one process, each with its own namespace; blocks of the tutorial share one."""
    script = "shared = {'__name__': '__main__'}\n"
    for block in blocks:
        assert change[0] in block.code
        code = block.code.replace(*change) if change[0] else block.code
        names = "shared" if block.file == TUTORIAL else "{'__name__': '__main__'}"
        script += f"exec(compile({code!r}, {str(block)!r}, 'exec'), {names})\n"
    return run(clone, sys.executable, "-c", script)


# --- blocks that are run


@pytest.mark.parametrize("name", EXECUTED)
def test_python_blocks_run(name: str, clone: Path) -> None:
    blocks = [block for block in blocks_of(name) if block.language == "python" and DEMO not in block.code]
    assert blocks and all(block.no_test is None for block in blocks)
    output = run_python(clone, blocks)
    assert len(output.splitlines()) >= sum("print(" in block.code for block in blocks)


@pytest.mark.slow
def test_python_blocks_that_talk_to_the_demo_run(clone: Path, tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if block.language == "python" and DEMO in block.code]
    assert blocks
    with serve_demo(ROOT, tmp_path / "demo") as server:
        run_python(clone, blocks, (DEMO, server.url))


@pytest.mark.parametrize("block", chosen("bash", "sh", "shell", run=True))
def test_shell_blocks_run(block: Block, clone: Path) -> None:
    run(clone, "bash", "-euo", "pipefail", "-c", block.code)


def test_yaml_blocks_are_splits(tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if block.language == "yaml" and block.code.startswith("classes:")]
    assert blocks
    for block in blocks:
        (tmp_path / "my_classes.yaml").write_text(block.code, encoding="utf-8")
        split = load_split(tmp_path / "my_classes.yaml")
        values = yaml.safe_load(block.code)
        assert list(split.classes) == values["classes"] and list(split.unseen) == values.get("unseen", [])


# --- blocks that are checked


@cache
def help_of(script: str) -> str:
    """The output of a script with --help."""
    arguments, output = sys.argv, io.StringIO()
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = arguments
    assert output.getvalue(), f"{script} --help prints nothing"
    return output.getvalue()


def check_command(words: list[str]) -> bool:
    """Checks one command line; returns whether it runs something of this repository."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment variables
        words = words[1:]
    if words[:1] == ["make"]:
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return True
    scripts = [word for word in words if re.fullmatch(r"(\./)?(scripts|app)/[\w/]+\.py", word)]
    for word in words:
        if re.match(r"(scripts|app|docs|tests|modeling_alignzeg|zeroshot)/", word):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if not scripts:
        return False
    arguments = words[words.index(scripts[0]) + 1 :]
    if Path(scripts[0]).name == "train.py" and arguments != ["--help"]:
        with contextlib.chdir(ROOT):
            load_settings(arguments)
    else:
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}(?![\w-])", help_of(scripts[0])), f"{scripts[0]} has no {flag}"
    return True


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
        for word in words:  # `sbatch --wrap "…"`, `bash -c "… && …"`
            yield from (shlex.split(part) for part in word.split(" && ") if " scripts/" in part)


@pytest.mark.parametrize("block", chosen("bash", "sh", "shell", run=False))
def test_commands_that_are_not_run_exist(block: Block) -> None:
    checked = [check_command(words) for words in commands(block.code)]
    assert any(checked), f"{block} has no command of this repository"


@pytest.mark.parametrize("name", [*EXECUTED, *CHECKED])
def test_links_paths_and_commands_in_the_text_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"
    for code in re.findall(r"`([^`\n]+)`", text):
        words = shlex.split(code) if code.startswith(("python ", "make ")) else []
        if words:
            check_command(words)
        elif re.fullmatch(r"(scripts|app|docs|tests|modeling_alignzeg|zeroshot)/[\w/.-]*", code):
            assert (ROOT / code).exists(), f"{name} names {code}"


def test_the_checks_find_what_is_wrong() -> None:
    for line in (
        "python scripts/evaluate.py --modell .",
        "python scripts/nothing.py",
        "accelerate launch scripts/train.py --training.step 3",
        "accelerate launch --config_file scripts/configs/none.yaml scripts/train.py",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_command(shlex.split(line))
    with pytest.raises(subprocess.CalledProcessError):
        check_command(["make", "nothing"])
    assert not check_command(["pip", "install", "torch"])


# --- the cards


def test_model_card_metadata() -> None:
    card = ModelCard.load(ROOT / "model_card.md")
    data = card.data
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert data.library_name == "transformers" and data.license == "apache-2.0" and data.language == "en"
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert "AutoModelForSemanticSegmentation" in config["auto_map"], "what that pipeline needs"
    for values in (data.tags, data.datasets, data.metrics):
        assert values and all(re.fullmatch(r"[\w./-]+", value) for value in values)
    report = json.loads((ROOT / "docs" / "results" / "shipped_checkpoint.json").read_text(encoding="utf-8"))
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"miou_seen", "miou_unseen", "hiou", "pixel_accuracy"}
    for name, result in results.items():
        assert result.metric_value == pytest.approx(report[name], abs=0.005)
        assert result.task_type == data.pipeline_tag and result.dataset_type in data.datasets
    again = ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict(), "what huggingface_hub writes, it reads"
    assert card.text.strip().startswith("# ") and "## Intended use" in card.text


def test_space_card_metadata() -> None:
    data = SpaceCard.load(ROOT / "app" / "README.md").data
    assert data.sdk == "gradio" and (ROOT / "app" / data.app_file).is_file()
    pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert data.sdk_version == pinned and data.license == "apache-2.0" and len(data.short_description) <= 60


def test_generated_figures_are_up_to_date() -> None:
    make_docs = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))
    for name in make_docs["FILES"]:
        path = ROOT / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            assert make_docs["fill"](text) == text, f"{name}: run python scripts/make_docs.py"
