# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Coverage-guided fuzzing of user-supplied input: image files, arrays and class names.

    pip install atheris
    python tests/fuzz.py -max_total_time=600

It fails on an exception other than `ValueError`, and on a result with the wrong shape or non-finite values. Arguments are
those of libFuzzer; without a corpus folder, it starts from small files of several formats. The tests do not need atheris.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import atheris


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import numpy as np
import torch
from PIL import Image


with atheris.instrument_imports(include=["modeling_alignzeg", "PIL"]):
    from modeling_alignzeg import AlignZegImageProcessor, AlignZegProcessor
    from modeling_alignzeg.processing_alignzeg import check_class_names

import tiny


MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "La",
)
DTYPES = (
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)
PROCESSOR = AlignZegImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, size_divisor=16)
NAMES = AlignZegProcessor(PROCESSOR, tiny.tiny_tokenizer())
warnings.simplefilter("ignore")
Image.MAX_IMAGE_PIXELS = 2**22  # a header may claim any size; larger images are rejected


def check_pixels(image: object) -> None:
    try:
        inputs = PROCESSOR(image, return_tensors="pt")
    except ValueError as error:
        assert str(error)[-1] == "." and len(str(error)) > 20, f"no sentence: {error}"
        return
    assert inputs.pixel_values.shape[:2] == (1, 3) and max(inputs.pixel_values.shape[2:]) <= 32
    assert inputs.pixel_values.isfinite().all() and inputs.pixel_mask.any()


def fuzz_file(data: atheris.FuzzedDataProvider) -> None:
    """Any bytes as an image file."""
    try:
        image = Image.open(io.BytesIO(data.ConsumeBytes(data.remaining_bytes())))
    except Exception:  # raised by PIL, not by our code
        return
    check_pixels(image)


def fuzz_picture(data: atheris.FuzzedDataProvider) -> None:
    """A PIL image of any mode, with any EXIF orientation and transparency."""
    mode = data.PickValueInList(list(MODES))
    size = data.ConsumeIntInRange(1, 40), data.ConsumeIntInRange(1, 40)
    exif, transparency = data.ConsumeIntInRange(0, 300), data.ConsumeIntInRange(-1, 255)
    image = Image.new(mode, size)
    pixels = data.ConsumeBytes(len(image.tobytes()))
    with_pixels = pixels.ljust(len(image.tobytes()), b"\x07")
    image.frombytes(with_pixels)
    image.getexif()[0x0112] = exif
    if transparency >= 0 and mode in ("L", "P", "1"):
        image.info["transparency"] = transparency
    check_pixels(image)


def fuzz_array(data: atheris.FuzzedDataProvider) -> None:
    """An array or tensor of any type, shape and layout, with a label map of its size."""
    shape = [data.ConsumeIntInRange(0, 9) for _ in range(data.ConsumeIntInRange(0, 4))]
    dtype = np.dtype(data.PickValueInList(list(DTYPES)))
    wanted = int(np.prod(shape)) * dtype.itemsize
    content = data.ConsumeBytes(wanted).ljust(wanted, b"\0")
    if dtype.kind == "b":
        content = bytes(byte % 2 for byte in content)
    values = np.frombuffer(content, dtype).reshape(shape)
    image = torch.from_numpy(values.copy()) if data.ConsumeBool() else values
    labels = data.ConsumeBool()
    try:
        inputs = PROCESSOR(image, image if labels else None, return_tensors="pt")
    except ValueError as error:
        assert len(str(error)) > 20, f"no sentence: {error}"
        return
    assert inputs.pixel_values.isfinite().all() and inputs.pixel_values.shape[1] == 3


def fuzz_names(data: atheris.FuzzedDataProvider) -> None:
    """Any list of class names."""
    names = [data.ConsumeUnicode(data.ConsumeIntInRange(0, 80)) for _ in range(data.ConsumeIntInRange(0, 6))]
    try:
        cleaned = check_class_names(names)
    except ValueError as error:
        assert "lass name" in str(error)
        return
    assert len(set(cleaned)) == len(names) and check_class_names(cleaned) == cleaned
    ids = NAMES(text=names, return_tensors="pt").input_ids
    assert ids.shape[0] == len(names) and ids.shape[1] <= 32
    assert (ids == NAMES.tokenizer.eos_token_id).any(1).all()


TARGETS = (fuzz_file, fuzz_picture, fuzz_array, fuzz_names)


def fuzz(content: bytes) -> None:
    data = atheris.FuzzedDataProvider(content)
    TARGETS[data.ConsumeIntInRange(0, len(TARGETS) - 1)](data)


def write_seeds(folder: Path) -> None:
    """Small image files; their last byte selects `fuzz_file`."""
    picture = Image.fromarray(np.arange(150, dtype=np.uint8).reshape(5, 10, 3))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA"):
        for mode in ("RGB", "P", "L"):
            file = io.BytesIO()
            with contextlib.suppress(OSError):  # not every format has every mode
                picture.convert(mode).save(file, kind)
                (folder / f"{kind}-{mode}").write_bytes(file.getvalue() + bytes([TARGETS.index(fuzz_file)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if all(argument.startswith("-") for argument in sys.argv[1:]):
        sys.argv.append(tempfile.mkdtemp())
        write_seeds(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
