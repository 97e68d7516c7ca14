# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Two small benchmarks of photographs: MSRC v2 (Shotton et al., 2006) and COCO panoptic (Kirillov et al., 2019).

Both are read from parquet files `<benchmark>_<part>.parquet` with the columns `name`, `image` and `label`, or MSRC from its
original folder, with `Images/*.bmp` and the colour-coded `GroundTruth/*_GT.bmp`. MSRC has no official parts. By position in
the sorted file names, modulo 10, images 0, 2, 4, 6, 8 are for training, 3 for validation, and 1, 5, 7, 9 for testing.
"""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from .colors import UnknownColorError, colors_to_ids, voc_palette


MSRC_PARTS = {"train": (0, 2, 4, 6, 8), "validation": (3,), "test": (1, 5, 7, 9)}
# MSRC uses the colours of PASCAL VOC's palette, but skips two of them before "road".
MSRC_PALETTE_IDS = [*range(19), *range(21, 26)]


COCO_REPEATS = 3  # balances MSRC, which has three times as many photographs and fewer classes per image
MSRC_OFFSET = 210  # added to MSRC's ids if they are combined with COCO's, which go up to 200
ENCODED = datasets.Image(decode=False)


def load_photos(benchmark: str, part: str, root: Path) -> datasets.Dataset:
    """One part of `"msrc"`, `"coco_panoptic"` or both (`"photos"`) with the columns `image`, `label` (raw ids) and `name`.
    In `"photos"`, MSRC's ids start at [`MSRC_OFFSET`], after COCO's, and COCO's photographs are repeated
    [`COCO_REPEATS`] times.

    Raises:
        FileNotFoundError: `root` contains neither the parquet file nor, for MSRC, the original folders.
    """
    if benchmark == "photos":
        features = datasets.Features({"image": ENCODED, "label": ENCODED, "name": datasets.Value("string")})
        coco, msrc = (load_photos(name, part, root).cast(features) for name in ("coco_panoptic", "msrc"))
        msrc = msrc.map(
            lambda row: {"label": {"bytes": _shifted(row["label"]["bytes"]), "path": None}}, features=features
        )
        both = datasets.concatenate_datasets([*[coco] * COCO_REPEATS, msrc])
        return both.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
    file = root / f"{benchmark}_{part}.parquet"
    if file.is_file():
        rows = datasets.Dataset.from_parquet(str(file))
        return rows.select_columns(["image", "label", "name"])
    if benchmark == "msrc" and (root / "Images").is_dir() and part in MSRC_PARTS:
        return _original_msrc(root, part)
    present = sorted(path.name for path in root.glob(f"{benchmark}_*.parquet"))
    raise FileNotFoundError(
        f"{root} has no {file.name}; it has {', '.join(present) or 'no such files'}"
        f"{', and no folder Images of MSRC v2' if benchmark == 'msrc' else ''}."
    )


def _encode(ids: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(ids).save(encoded, "PNG")
    return encoded.getvalue()


def _shifted(label: bytes) -> bytes:
    return _encode(np.asarray(Image.open(io.BytesIO(label))) + np.uint8(MSRC_OFFSET))


def _original_msrc(root: Path, part: str) -> datasets.Dataset:
    palette = voc_palette(26)[MSRC_PALETTE_IDS]
    paths = sorted((root / "Images").glob("*.bmp"), key=lambda path: path.stem)
    columns: dict[str, list] = {"image": [], "label": [], "name": []}
    for path in (path for position, path in enumerate(paths) if position % 10 in MSRC_PARTS[part]):
        label = root / "GroundTruth" / f"{path.stem}_GT.bmp"
        if not label.is_file():
            raise FileNotFoundError(f"{label} does not exist; MSRC's label map of {path.name} is missing.")
        try:
            ids = colors_to_ids(np.asarray(Image.open(label).convert("RGB")), palette).astype(np.uint8)
        except UnknownColorError as error:
            raise ValueError(f"{label}: {error}.") from error
        columns["image"].append(str(path))
        columns["label"].append({"bytes": _encode(ids), "path": None})
        columns["name"].append(path.stem)
    features = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
