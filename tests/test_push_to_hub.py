# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""scripts/push_to_hub.py against a stand-in for the Hub: it uploads a loadable model and a Space."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_standin import hub_standin
from huggingface_hub import ModelCard, SpaceCard
from tiny import tiny_checkpoint

from zeroshot.data.splits import load_split
from zeroshot.hub import card_files, checkpoint_files, space_files
from zeroshot.settings import DataSettings, ModelSettings, Settings
from zeroshot.training.card import trained_card


ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

def predict(source):
    model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(images=Image.open(IMAGE), return_tensors="pt"))
    return outputs.class_queries_logits, outputs.masks_queries_logits

result = [torch.equal(*pair) for pair in zip(predict("tester/alignzeg"), predict(ROOT))]
"""


def push(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(command, env=kept | (environment or {}), capture_output=True, text=True, timeout=600)


def test_model_and_space_arrive(tmp_path: Path) -> None:
    from test_remote_code import run_alone

    with hub_standin() as hub:
        environment = hub.environment() | {"HF_HOME": str(tmp_path / "home")}
        run = push("--model", "tester/alignzeg", "--space", "tester/demo", "--message", "New", environment=environment)
        assert run.returncode == 0, run.stderr
        values = {"IMAGE": str(ROOT / "app" / "examples" / "scene_148.png"), "ROOT": str(ROOT)}
        assert run_alone(LOAD, tmp_path / "process", hub.environment(), **values) == [True, True]
        model, space = (hub.repositories[name] for name in ("tester/alignzeg", "spaces/tester/demo"))
        assert hub.commits == [("tester/alignzeg", "New"), ("spaces/tester/demo", "New")]

    code = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "modeling_alignzeg").glob("*.py")}
    plain = {name: ROOT / name for name in ("config.json", "model.safetensors", "tokenizer.json", "LICENSE")}
    for name, path in (code | plain).items():
        assert model[name] == path.read_bytes(), name
    assert not [name for name in model if name.startswith(("scripts", "tests", ".", "app/app"))]
    card = ModelCard(model["README.md"].decode())
    original = ModelCard.load(ROOT / "model_card.md")
    assert card.data.to_dict() == original.data.to_dict()
    assert 'checkpoint = "tester/alignzeg"' in card.text and 'checkpoint = "."' in original.text
    assert "app/examples/scene_148.png" in model, "the card's example opens it"

    readme, shown = (ROOT / "app" / "README.md").read_text(), space.pop("README.md").decode()
    assert space == {name: (ROOT / "app" / name).read_bytes() for name in space}
    assert SpaceCard(shown).data.models == ["tester/alignzeg"]
    old = yaml.safe_load(readme.split("---")[1])["models"][0]
    assert shown == readme.replace(old, "tester/alignzeg", 1)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Runs the script in this process, so that errors are raised unchanged."""
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "push_to_hub.py"))["main"]()


def test_a_space_has_the_files_that_the_demo_opens_and_no_others(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(ROOT / "app", app, ignore=shutil.ignore_patterns("__pycache__", "static", "*.pyi"))
    expected = {path.relative_to(app).as_posix() for path in app.rglob("*") if path.is_file()}
    expected = {name for name in expected if not name.startswith("integrations/")}
    for name in (".env", "app.pyi", "notes.txt", "static/models/m.onnx", "examples/.hidden", "examples/more/a.png"):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text("not for the Hub")
    files = space_files(app, None)
    assert set(files) == expected
    opened = set(re.findall(r'HERE / "([\w.]+)"', (app / "app.py").read_text(encoding="utf-8"))) - {"examples"}
    assert {"viewer.js", "style.css"} <= opened <= set(files)
    (app / "README.md").write_text("# A demo\n")
    with pytest.raises(ValueError, match="README.md has no model"):
        space_files(app, "tester/alignzeg")


def test_a_space_alone_says_whose_code_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (model,) = SpaceCard.load(ROOT / "app" / "README.md").data.models
    run_here(monkeypatch, "--space", "tester/demo", "--dry_run")
    assert f"tester/demo will load the model {model} of app/README.md and run its code" in capsys.readouterr().out
    run_here(monkeypatch, "--space", "tester/demo", "--model", "tester/alignzeg", "--dry_run")
    assert model not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "card", "attached"),
    [
        (
            "",
            "model_card.md",
            {
                "LICENSE",
                "app/examples/scene_148.png",
                "docs/results/ablation.json",
                "docs/results/shipped_checkpoint.json",
            },
        ),
        ("checkpoints/photos", "README.md", {"app/examples/pagoda.jpg"}),
    ],
)
def test_links_of_the_shipped_cards_lead_somewhere(folder: str, card: str, attached: set[str]) -> None:
    checkpoint = checkpoint_files(ROOT / folder)
    files = card_files(ROOT / folder / card, "tester/alignzeg", ROOT, checkpoint)
    assert set(files) == {"README.md"} | attached
    before, text = (ROOT / folder / card).read_text(encoding="utf-8"), files["README.md"].decode()
    code = r"```.*?```"
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(code, "", text, flags=re.DOTALL)):
        assert target.startswith("https://") or target in {*files, *checkpoint}, target
    unlinked = re.sub(r"\[([^\]]*)\]\((?:\.\./|docs/\w+\.md)[^)]*\)", r"\1", before)
    assert before != unlinked and text == re.sub(r"(?m)^checkpoint = .*$", 'checkpoint = "tester/alignzeg"', unlinked)


def test_links_that_would_be_dead_become_text(tmp_path: Path) -> None:
    (tmp_path / "clone").mkdir()
    folder = tmp_path / "clone" / "tiny"
    folder.mkdir()
    for name in ("curve.png", "two words.json", "NOTES.md", "../secret.json"):
        (folder / name).touch()
    (tmp_path / "clone" / "x").touch()  # in the clone, not in the card's folder
    kept = [
        "[paper](https://arxiv.org/abs/1)",
        "[mail](mailto:a@b.c)",
        "[above](#use)",
        "[this](README.md#use)",
        "![curve](curve.png 'The curve')",
        "[two](two%20words.json)",
        "[two](<two words.json>)",
        "[![curve](./curve.png)](https://example.com)",
        "[config](config.json?download=true)",
        "[code](modeling_alignzeg/)",
        "`rows[0](x)`",
        "```python\nrows[0](x)\n```",
    ]
    dropped = {
        "[notes](NOTES.md)": "notes",
        "![gone](gone.png)": "gone",
        "[up](../secret.json)": "up",
        "[up](a/../../secret.json)": "up",
        "[`code`](x)": "`code`",
        "[![curve](curve.png)](gone.html)": "![curve](curve.png)",
    }
    metadata = "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\nlicense: mit\nnote: '[a](b)'\n---\n"
    (folder / "README.md").write_text(metadata + "\n".join([*kept, *dropped]))
    others = ["config.json", "modeling_alignzeg/modeling_alignzeg.py"]
    files = card_files(folder / "README.md", "tester/tiny", tmp_path / "clone", others)
    assert files.pop("README.md").decode() == metadata + "\n".join([*kept, *dropped.values()])
    assert files == {name: folder / name for name in ("curve.png", "two words.json")}


def test_another_checkpoint_with_its_own_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    card = tmp_path / "card.md"
    metadata = "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\nlicense: {}\n---\n# Tiny\n"
    for licence, ours in (("apache-2.0", {"LICENSE"}), ("other", set())):
        card.write_text(metadata.format(licence))
        run_here(monkeypatch, "--model", "tester/tiny", "--checkpoint", checkpoint, "--card", card, "--dry_run")
        names = {line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
        assert names == {path.name for path in checkpoint.iterdir()} | {"README.md"} | ours


def test_a_trained_checkpoint_brings_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    settings = Settings(model=ModelSettings(checkpoint=str(checkpoint)))
    text = str(trained_card(settings, load_split("embedded_scenes"), 12, 3, {}))
    assert "`tiny`" in text and str(tmp_path) not in text, "no paths of this machine"
    (checkpoint / "README.md").write_text(text)
    arguments = ("--model", "tester/tiny", "--checkpoint", checkpoint, "--dry_run")
    with pytest.raises(ValueError, match="README.md has no licence"):
        run_here(monkeypatch, *arguments)
    chosen = text.replace("license: other\nlicense_name: to-be-chosen\n", "license: mit\n")
    (checkpoint / "README.md").write_text(chosen)
    run_here(monkeypatch, *arguments)
    names = {line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert names == {path.name for path in checkpoint.iterdir()}
    files = card_files(checkpoint / "README.md", "tester/tiny", ROOT)
    assert list(files) == ["README.md"] and b'checkpoint = "tester/tiny"' in files["README.md"]


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ({"clip": "scripts/assets/small_clip"}, {}, ("apache-2.0", None)),
        ({"clip": "scripts/assets/small_clip"}, {"dataset": "voc2012", "root": "/data"}, ("other", None)),
        (
            {"clip": "ViT-B-16", "pretrained": "laion2b_s34b_b88k"},
            {},
            ("other", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ),
        ({"clip": "ViT-B-16", "random_weights": True}, {}, ("other", None)),
        ({"clip": "openai/clip-vit-base-patch16"}, {}, ("other", "openai/clip-vit-base-patch16")),
        ({"checkpoint": "someone/alignzeg"}, {"dataset": "someone/data"}, ("other", "someone/alignzeg")),
    ],
)
def test_metadata_of_a_trained_checkpoint(model: dict, data: dict, expected: tuple) -> None:
    settings = Settings(model=ModelSettings(**model), data=DataSettings(**data))
    scores = {"miou_seen": 59.504, "miou_unseen": float("nan"), "hiou": 57.0, "pixel_accuracy": 85.0}
    split = load_split("embedded_scenes")
    card = ModelCard(str(trained_card(settings, split, 12, 3, scores)))
    values = card.data.to_dict()
    assert (values["license"], values.get("base_model")) == expected
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "image-segmentation"
    assert values["datasets"] == [settings.data.dataset] and "arxiv:2404.05667" in values["tags"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"miou_seen": 59.5, "hiou": 57.0, "pixel_accuracy": 85.0}, "what is not a number is left out"
    assert all(f"`{name}`" in card.text for name in split.classes) and "https://arxiv.org/abs/2404.05667" in card.text
    assert f"{len(split.unseen)} unseen classes" in card.text
    compile(card.text.split("```python")[1].split("```")[0], "example", "exec")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model or --space"),
        (["--model", "tester/x", "--checkpoint", "EMPTY"], "its own card with --card"),
        (["--model", "tester/x", "--checkpoint", "EMPTY", "--card", "CARD"], "has no model.safetensors"),
        (["--model", "tester/x", "--card", "EMPTY"], "is not a file"),
        (["--model", "tester/x", "--card", "BARE"], "`library_name` and `pipeline_tag`"),
        (["--model", "tester/x", "--card", "BROKEN"], "cannot be read"),
        (["--model", "tester/x", "--card", "LATIN"], "is not UTF-8 text"),
        (["--model", "bad name!!"], "bad name!!"),
        (["--space", ""], "''"),
        (["--model", "tester/x", "--checkpoint", "CUT", "--card", "CARD"], "model.safetensors is damaged"),
        (["--model", "tester/x", "--checkpoint", "LIST", "--card", "CARD"], "config.json contains [1]"),
    ],
)
def test_what_cannot_be_uploaded_is_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CARD").write_text("---\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n")
    (tmp_path / "LATIN").write_bytes(b"\xe9")
    tiny_checkpoint(tmp_path / "CUT")
    shutil.copytree(tmp_path / "CUT", tmp_path / "LIST")
    (tmp_path / "CUT" / "model.safetensors").write_bytes(b"")
    (tmp_path / "LIST" / "config.json").write_text("[1]")
    (tmp_path / "BARE").write_text("# No metadata\n")
    (tmp_path / "BROKEN").write_text("---\ntags: [\n---\n")
    with pytest.raises((ValueError, SystemExit)) as error:  # argparse prints and exits
        run_here(monkeypatch, *(tmp_path / part if part.isupper() else part for part in arguments))
    assert words in f"{error.value} {capsys.readouterr().err}"


def test_refusals_of_the_hub_are_sentences(tmp_path: Path) -> None:
    with hub_standin() as hub:
        environment = hub.environment() | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url + "/nothing"}
        run = push("--model", "tester/alignzeg", environment=environment)
    assert run.returncode == 1 and "the Hub rejected" in run.stderr and "Traceback" not in run.stderr
