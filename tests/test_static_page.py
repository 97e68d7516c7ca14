# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The page that segments in the browser: its tokenizer against transformers', its label maps against onnxruntime's.

Set ALIGNZEG_ORT_WEB to a folder with `node_modules/onnxruntime-web`, and ALIGNZEG_BROWSER_MODELS to an output of
`scripts/export.py --browser`. By default, npm installs the former, and the latter is exported from a tiny model.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import CLIPTokenizer

from zeroshot.data.scenes import draw_scene


PAGE = ROOT / "app" / "static"
NODE, NPM = shutil.which("node"), shutil.which("npm")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 300  # seconds; machines that also train are slow
NAMES = ("red striped", "blue dotted", "grass", "brick")
EDGES = (
    "",
    " \t\n ",
    "don't we've it's I'M she'll they'd you're",
    "!'s ''s '''re 's",
    "<|startoftext|> and <|endoftext|>",
    "Straße ΣΊΣΥΦΟΣ İstanbul ŒUVRE ﬁn ǅ",
    "e\u0301 \u00e9 A\u030a \uac00 \u1100\u1161",
    "a\u0085b\u00a0c\u1680d\u2003e\u2028f\u3000g\ufeffh\u200bi",
    "猫と犬 кошка قط बिल्ली แมว 고양이 חתול",
    "👩‍👩‍👧 🏳️‍🌈 😀😀 ☂",
    "x² ½ ٣٤ Ⅷ 12345 3.14 1st",
    "a_b-c/d\\e{}[]()<>|@#$%^&*~`",
    "word " * 60,
    "supercalifragilisticexpialidocious" * 4,
    "\u0000\u0007\u001b end",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀 𐐨",
)


def texts(count: int = 200) -> list[str]:
    """Edge cases, and random strings of letters in many scripts, digits, marks, white space and emoji."""
    source = random.Random(0)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0x61, 0x7B), (0xA0, 0x250), (0x370, 0x500), (0x5D0, 0x5EB), (0x900, 0x980)]
    ranges += [
        (0x300, 0x330),
        (0x2000, 0x2070),
        (0x3040, 0x3100),
        (0x4E00, 0x4F00),
        (0x1F600, 0x1F640),
        (0xAC00, 0xAD00),
    ]
    drawn = [
        "".join(chr(source.randrange(*source.choice(ranges))) for _ in range(source.randrange(1, 40)))
        for _ in range(count - len(EDGES))
    ]
    return [*EDGES, *drawn]


@pytest.mark.skipif(NODE is None, reason="node, which runs the page's tokenizer, is not installed")
def test_the_pages_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ROOT)
    shutil.copy(PAGE / "alignzeg.js", tmp_path / "alignzeg.mjs")
    (tmp_path / "texts.json").write_text(json.dumps(texts()))
    (tmp_path / "run.mjs").write_text(
        """
        import { readFileSync } from "node:fs";
        import { Tokenizer } from "./alignzeg.mjs";
        const [file, texts] = process.argv.slice(2).map((name) => JSON.parse(readFileSync(name, "utf8")));
        const tokenizer = new Tokenizer(file);
        console.log(JSON.stringify(texts.map((text) => tokenizer.encode(text, 32))));
        """
    )
    command = [NODE, tmp_path / "run.mjs", ROOT / "tokenizer.json", tmp_path / "texts.json"]
    found = json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout)
    expected = tokenizer(texts(), split_special_tokens=True, truncation=True, max_length=32)["input_ids"]
    wrong = {text: pair for text, *pair in zip(texts(), found, expected) if pair[0] != pair[1]}
    assert len(found) == 200 and not wrong


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("ALIGNZEG_BROWSER_MODELS"):
        return Path(given)
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    from zeroshot.onnx_folder import export_folders

    folder = tmp_path_factory.mktemp("models") / "models"
    export_folders(tiny_model(), tiny_processor(), {folder: "browser"})
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `dist` folder of the onnxruntime-web version that the page uses."""
    version = re.search(r"onnxruntime-web@([\d.]+)/", (PAGE / "index.html").read_text(encoding="utf-8"))
    assert version is not None
    folder = Path(os.environ.get("ALIGNZEG_ORT_WEB") or tmp_path_factory.mktemp("npm"))
    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    if not dist.is_dir():
        if NPM is None:
            pytest.skip("npm, which installs onnxruntime-web, is not installed")
        command = [NPM, "install", "--ignore-scripts", f"onnxruntime-web@{version[1]}"]
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install onnxruntime-web: {installed.stderr[-300:]}")
    return dist


@pytest.fixture
def site(models: Path, library: Path, tmp_path: Path) -> Iterator[str]:
    """URL of the page, served with its models and its own copy of the library."""
    folder = tmp_path / "site"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("models"))
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(re.sub(r"https://cdn\.jsdelivr[^\"]*", "ort/", page), encoding="utf-8")
    (folder / "models").symlink_to(models.resolve())
    (folder / "ort").symlink_to(library.resolve())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    size = os.environ.get("ALIGNZEG_WINDOW", "1280,900")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        f"user-data-dir={tmp_path / 'profile'}",
        f"window-size={size}",
    ):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    opened.set_script_timeout(PATIENCE)
    yield opened
    opened.quit()


def wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)
    return value


@pytest.mark.slow
def test_the_page_gives_the_label_map_of_onnxruntime(site: str, driver: Any, models: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, the reference, is not installed")
    image = Image.open(given) if (given := os.environ.get("ALIGNZEG_PICTURE")) else None
    image = image or Image.fromarray(draw_scene(0, "test", 5, 256).image).crop((0, 0, 256, 200))
    image.save(tmp_path / "scene.png")
    names = os.environ.get("ALIGNZEG_NAMES", ", ".join(NAMES)).split(", ")
    driver.get(site)
    find = lambda name: driver.find_element("id", name)
    find("file").send_keys(str(tmp_path / "scene.png"))
    find("names").send_keys(", ".join(names))
    wait(lambda: find("start").is_enabled() or find("error").text, "the models")
    assert not find("error").text
    find("start").click()
    wait(lambda: find("map").is_displayed() or find("error").text, "the segmentation")
    assert not find("error").text
    labels, seconds, prototypes = driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        import(new URL("alignzeg.js", document.baseURI)).then(async ({ state }) => {
          const { data } = await state.segmenter.textPrototypes(state.names);
          done([Array.from(state.labels), state.seconds, Array.from(data)]);
        });
        """
    )
    print(f"\n{image.size}: {seconds:.2f} s")
    if folder := os.environ.get("ALIGNZEG_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / "static_page.png"))

    settings = json.loads((models / "alignzeg.json").read_text(encoding="utf-8"))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "tokenizer.json"))
    tokenizer.enable_padding()
    prompts = [template.replace("{}", name) for name in names for template in settings["templates"]]
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(prompts)]).reshape(len(names), -1)
    ids = ids.reshape(len(names), len(settings["templates"]), -1)
    expected = runtime.InferenceSession(models / "text.onnx").run(None, {"input_ids": ids})[0]
    np.testing.assert_allclose(np.reshape(prototypes, expected.shape), expected, atol=1e-4)
    seen = np.array([name in settings["classes"] and name not in settings["unseen"] for name in names])
    feeds = {"image": np.asarray(image)[None], "text_prototypes": expected, "seen_class_mask": seen}
    label_map = runtime.InferenceSession(models / "image.onnx").run(None, feeds)[0][0]
    assert (np.reshape(labels, label_map.shape) == label_map).mean() >= 0.99

    find("save-labels").click()
    saved = wait(lambda: next(tmp_path.glob("labels.png"), None), "the download")
    grey = np.asarray(Image.open(saved).convert("L"))
    assert (grey == np.reshape(labels, label_map.shape)).all()
    legend = [entry.text for entry in driver.find_elements("css selector", "#legend li")]
    assert [any(name in text for text in legend) for name in names] == [i in labels for i in range(len(names))]

    find("names").send_keys(", grass, grass")
    find("start").click()
    assert "occurs twice" in wait(lambda: find("error").text, "the message")
    outside = driver.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        ".filter((name) => !/^(data|blob):/.test(name) && new URL(name).host !== location.host)"
    )
    assert outside == []


@pytest.mark.slow
def test_missing_models_are_a_sentence(site: str, driver: Any, tmp_path: Path) -> None:
    (tmp_path / "site" / "models").unlink()
    driver.get(site)
    message = wait(lambda: driver.find_element("id", "error").text, "the message")
    assert "alignzeg.json is missing" in message and "scripts/export.py --browser" in message
