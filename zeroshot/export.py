# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exports a checkpoint to ONNX or `torch.export`, with the vocabulary as an input."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from modeling_alignzeg.processing_alignzeg import check_class_names

from .checkpoints import load_checkpoint
from .files import atomic_file, check_output
from .onnx_folder import Weights, check_folder, export_folders


INPUTS = ("pixel_values", "text_prototypes", "seen_class_mask")
OUTPUTS = ("masks_queries_logits", "class_queries_logits", "unseen_logits")


class ImageTowerAndHead(nn.Module):
    """AlignZeg without its text tower: tensors in, tensors out."""

    def __init__(self, model: AlignZegModel):
        super().__init__()
        self.model = model

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS if self.model.indicator is not None else OUTPUTS[:-1]

    def forward(self, pixel_values: Tensor, text_prototypes: Tensor, seen_class_mask: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(
            pixel_values=pixel_values, text_prototypes=text_prototypes, seen_class_mask=seen_class_mask
        )
        return tuple(outputs[name] for name in self.outputs)


def export_program(model: AlignZegModel) -> torch.export.ExportedProgram:
    """`model`, in evaluation mode, as a `torch.export` program with dynamic batch, height, width and class count."""
    config, device, dtype = model.config, model.device, model.dtype
    divisor = config.size_divisor
    sides = [divisor * torch.export.Dim(name, min=2, max=4096) for name in ("rows", "columns")]
    classes = torch.export.Dim("classes", min=2, max=2**24)
    example = (
        torch.zeros(2, 3, 3 * divisor, 4 * divisor, device=device, dtype=dtype),
        torch.eye(5, config.projection_dim, device=device, dtype=dtype),
        torch.tensor([True, True, False, True, True], device=device),
    )
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096), 2: sides[0], 3: sides[1]}, {0: classes}, {0: classes})
    wanted = {p for p in model.parameters() if p.requires_grad}
    try:
        model.requires_grad_(False)
        with torch.no_grad():
            return torch.export.export(ImageTowerAndHead(model).eval(), example, dynamic_shapes=shapes, strict=False)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def export_onnx(model: AlignZegModel, path: str | Path) -> None:
    """Writes `model` to an ONNX file, and to an external data file if its weights exceed 2 GB.

    Raises:
        ImportError: `onnx` or `onnxscript` is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX export needs onnx and onnxscript: pip install onnx onnxscript") from error
    program = torch.onnx.export(
        export_program(model),
        dynamo=True,
        input_names=list(INPUTS),
        output_names=list(ImageTowerAndHead(model).outputs),
        verbose=False,
    )
    assert program is not None  # only the old exporter returns None
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because the ONNX file refers to the weights by file name.
    with TemporaryDirectory(prefix=".partial", dir=path.parent) as folder:
        program.save(str(Path(folder) / path.name), external_data=size > 1.9e9)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            os.replace(file, path.parent / file.name)


def export_checkpoint(
    source: str,
    output: str | None,
    classes: list[str] | None,
    unseen: list[str] | None,
    prototypes: str | None,
    browser: str | None = None,
    int8: bool = False,
) -> None:
    """Exports the checkpoint `source` to `output`, the text prototypes of `classes` to the .npz file `prototypes`, and the
    files for the page in app/static to the folder `browser`. With `int8`, `output` is a folder whose image model
    multiplies in 8-bit integers.

    Raises:
        ValueError: An argument is invalid or contradicts another.
    """
    if not (output or browser):
        raise ValueError("Neither `--output` nor `--browser` is given: pass a path to write to.")
    suffix = Path(output).suffix if output else ""
    if suffix not in (".onnx", ".pt2", ""):
        raise ValueError(f"`--output` is {output}; expected the extension .onnx or .pt2, or none for a folder.")
    if classes and not prototypes:
        raise ValueError("`--classes` needs `--prototypes`, the .npz file to write; pass both.")
    if int8 and (suffix or not output):
        raise ValueError(
            f"`--int8` is for a folder, and `--output` is {output or 'not given'}: pass a path without extension."
        )
    for file in filter(None, (output if suffix else None, prototypes)):
        check_output(file)
    folders: dict[str | Path, Weights] = {}
    if output and not suffix:
        folders[output] = "int8" if int8 else "float32"
    if browser:
        folders[browser] = "browser"
    for folder in folders:
        check_folder(folder)
    names = check_class_names(classes) if classes else []
    unseen = check_class_names(unseen) if unseen else []
    if unknown := [name for name in unseen if name not in names]:
        raise ValueError(f"`--unseen` contains {unknown[0]!r}, which is not in `--classes`.")
    model, processor = load_checkpoint(source)
    if output and suffix:
        _export_file(model, Path(output))
    if folders:
        export_folders(model, processor, folders)
    for folder in folders:
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"Exported: {folder} ({size / 1e6:.1f} MB).")
    if prototypes:
        _export_prototypes(model, processor, names, unseen, prototypes)


def _export_file(model: AlignZegModel, path: Path) -> None:
    if path.suffix == ".onnx":
        export_onnx(model, path)
    else:
        program = export_program(model)
        with atomic_file(path) as partial:
            torch.export.save(program, partial)
    print(f"Exported: {path}. Image sides: multiples of {model.config.size_divisor}.")


def _export_prototypes(
    model: AlignZegModel, processor: AlignZegProcessor, names: list[str], unseen: list[str], file: str
) -> None:
    """Writes the text prototypes of `names`, or of the checkpoint's own vocabulary, to a .npz file."""
    if names:
        vectors = model.get_text_prototypes(processor, names)
        seen = torch.tensor([name not in unseen for name in names])
    else:
        names = list(model.config.id2label.values())
        vectors, seen = model.class_text_embeds, model.seen_class_mask
    with atomic_file(file) as partial, open(partial, "wb") as stream:  # np.savez appends .npz to file names
        np.savez(stream, text_prototypes=vectors, seen_class_mask=seen, names=np.array(names))
    print(f"Text prototypes of {len(names)} classes: {file}")
