# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The page that segments in the browser: its tokenizer against transformers', its label maps against onnxruntime's.

ALIGNZEG_ORT_WEB names a folder with `node_modules/onnxruntime-web`, ALIGNZEG_BROWSER_MODELS one that
`scripts/export.py --browser` wrote; otherwise npm installs the one, and a tiny model becomes the other.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import CLIPTokenizer


PAGE = ROOT / "app" / "static"
NODE = shutil.which("node")
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
    """Edge cases, and drawn strings of letters of many scripts, digits, marks, white space and emoji."""
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
