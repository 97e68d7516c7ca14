#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Uploads a checkpoint with its code, processor and card to the Hub, and the demo to a Space.

    hf auth login
    python scripts/push_to_hub.py --model USER/alignzeg --space USER/alignzeg-demo

The Hub shows a repository's README.md as its card, so model_card.md is uploaded under that name. For another --checkpoint,
the card is the one that training wrote; choose a licence in it first. The example in the card loads the uploaded model.
Files in the card's folder to which it links are uploaded with it; links to others become plain text.
Each repository is created if it does not exist and gets one commit. --dry_run lists the files and uploads nothing.
"""

from __future__ import annotations

from pathlib import Path

from zeroshot.cli import command_parser, run_command


ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--model", help="repository of the model, USER/NAME; without it no model is uploaded")
    options.add_argument("--space", help="repository of the demo, USER/NAME; without it no Space is uploaded")
    options.add_argument("--checkpoint", type=Path, default=ROOT, help="folder of the checkpoint")
    options.add_argument(
        "--card",
        type=Path,
        help="model card; default: model_card.md for the checkpoint of this clone, README.md in the folder of another one",
    )
    options.add_argument("--message", default="Upload AlignZeg", help="commit message")
    options.add_argument("--private", action="store_true", help="create new repositories as private")
    options.add_argument("--dry_run", action="store_true", help="list the files, upload nothing")
    args = options.parse_args()
    if args.model is None and args.space is None:
        options.error("pass a repository with --model or --space")
    card = args.card or (
        ROOT / "model_card.md" if args.checkpoint.resolve() == ROOT else args.checkpoint / "README.md"
    )
    if args.model is not None and args.card is None and not card.is_file():
        options.error(f"there is no {card}, which training writes; give the checkpoint its own card with --card")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from zeroshot.hub import Files, card_files, checkpoint_files, push, space_files, space_model

    for repository in filter(None, (args.model, args.space)):
        validate_repo_id(repository)
    uploads: list[tuple[str, str, Files]] = []
    if args.model is not None:
        checkpoint = checkpoint_files(args.checkpoint)
        files = card_files(card, args.model, ROOT, checkpoint) | checkpoint
        uploads.append((args.model, "model", files))
    if args.space is not None:
        uploads.append((args.space, "space", space_files(ROOT / "app", args.model)))
        if args.model is None:
            print(
                f"{args.space} will load the model {space_model(ROOT / 'app')} of app/README.md and run its code; "
                "pass --model to upload a model and load that one."
            )
    for repository, kind, files in uploads:
        if args.dry_run:
            print(f"{kind} {repository}:")
            print("\n".join(f"  {name}" for name in sorted(files)))
        else:
            print(push(HfApi(), repository, kind, files, args.message, args.private))


if __name__ == "__main__":
    run_command(main)
