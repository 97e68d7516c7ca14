# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""User-supplied image files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zeroshot.data.images import MAX_PIXELS, open_image


def claim(path: Path, width: int, height: int) -> Path:
    """A tiny PNG file whose header claims many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_mode_opens_as_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (7, 5)).save(tmp_path / f"image.{suffix}")
    image = open_image(tmp_path / f"image.{suffix}")
    assert image.mode == "RGB" and image.size == (7, 5)
    np.asarray(image)  # still readable after its file is closed


def test_photos_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 5)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (5, 7)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file .*missing.png"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just text", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "convert it to PNG"),
        (b"BM" + b"\xff" * 60, "cannot be read"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"image.png .*{message}"):
        open_image(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"image.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"image.{kind} cannot be"):
        open_image(path)


def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bomb.png .*scale it down"):
        open_image(claim(tmp_path / "bomb.png", 200_000, 200_000))
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS:,}|exceeds limit"):
        open_image(claim(tmp_path / "bomb.png", MAX_PIXELS, 2))
    with pytest.raises(ValueError, match="has 20 x 30 pixels, more than 500; scale it down"):
        open_image(claim(tmp_path / "small.png", 20, 30), max_pixels=500)
