#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes docs/fine_tuning.ipynb from docs/fine_tuning.py and runs it; its results go to docs/results/fine_tuning.json.

    python scripts/make_notebook.py --photos FOLDER

The notebook runs in a temporary folder, where its relative paths lead to the checkpoint and the photographs. If a cell
fails, nothing is written. Run python scripts/make_docs.py afterwards.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from zeroshot.cli import command_parser, run_command
from zeroshot.files import atomic_write_text


ROOT = Path(__file__).resolve().parent.parent
SOURCE, NOTEBOOK = ROOT / "docs" / "fine_tuning.py", ROOT / "docs" / "fine_tuning.ipynb"
RESULTS = ROOT / "docs" / "results" / "fine_tuning.json"
LARGEST = 200_000  # bytes


def cells_of(source: str) -> list[tuple[str, str]]:
    """Kind (`markdown` or `code`) and text of the cells of a script in percent format."""
    cells = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        header, _, body = part.partition("\n")
        if "[markdown]" in header:
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", body.strip()))
    return cells


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--photos", required=True, type=Path, help="folder of the parquet files")
    options.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "photos", help="model to fine-tune")
    args = options.parse_args()
    for name, folder in (("photos", args.photos), ("checkpoint", args.checkpoint)):
        if not folder.is_dir():
            raise ValueError(f"`--{name}` is {str(folder)!r}, but there is no such folder. Check the spelling.")
    import nbformat
    from nbclient import NotebookClient

    from zeroshot.evaluation.evaluator import library_versions

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make[kind](text) for kind, text in cells_of(SOURCE.read_text(encoding="utf-8"))]
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"  # random ids would change with every run
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    with tempfile.TemporaryDirectory() as folder:
        for path, target in (("docs", None), ("checkpoints/photos", args.checkpoint), ("data/photos", args.photos)):
            place = Path(folder, path)
            place.parent.mkdir(exist_ok=True)
            place.mkdir() if target is None else place.symlink_to(target.resolve(), target_is_directory=True)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": f"{folder}/docs"}}).execute()
        results = json.loads(Path(folder, "runs", "fine_tuning", "results.json").read_text(encoding="utf-8"))
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":  # stderr has progress bars and warnings
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    text = nbformat.writes(notebook) + "\n"
    for found in (str(ROOT), folder, str(args.photos.resolve()), str(Path.home())):
        if len(found) > 1 and found in text:
            raise ValueError(f"The notebook's outputs contain the path {found!r}; print relative names instead.")
    if len(text.encode()) > LARGEST:
        raise ValueError(f"The notebook has {len(text.encode())} bytes, expected at most {LARGEST}; print less.")
    atomic_write_text(NOTEBOOK, text)
    report = {**results, "versions": library_versions(), "made_by": "python scripts/make_notebook.py"}
    atomic_write_text(RESULTS, json.dumps(report, indent=2) + "\n")
    print(f"{NOTEBOOK} and {RESULTS}")


if __name__ == "__main__":
    run_command(main)
