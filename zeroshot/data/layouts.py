# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Where benchmarks keep their files that are read like a plain folder: Cityscapes as downloaded, ADE20K-Full and PASCAL
Context-459 as detectron2's users prepare them, and MESS (Blumenstiel et al., NeurIPS 2023) as its own scripts do."""

from __future__ import annotations

from .folders import FolderLayout


_PREPARED = FolderLayout("images_detectron2/{part}", "annotations_detectron2/{part}")

MESS = {  # 19 of its 22 datasets; the others have no parts, or masks that overlap
    "atlantis": _PREPARED,
    "bdd100k": FolderLayout("images/10k/{part}", "annotations_detectron2/{part}"),
    "chase_db1": _PREPARED,
    "cub_200": _PREPARED,
    "cwfid": FolderLayout("images", "annotations_detectron2/{part}", "_image", "_annotation"),
    "dark_zurich": FolderLayout(
        "rgb_anon/{part}/night/GOPR0356", "annotations_detectron2/{part}", "_rgb_anon", "_gt_labelIds"
    ),
    "deepcrack": FolderLayout("{part}_img", "annotations_detectron2/{part}"),
    "dram": _PREPARED,
    "floodnet": _PREPARED,
    "foodseg103": FolderLayout("Images/img_dir/{part}", "Images/ann_dir/{part}"),
    "isaid": _PREPARED,
    "isprs_potsdam": FolderLayout("images_detectron2/{part}/irrg", "annotations_detectron2/{part}"),
    "kvasir_instrument": _PREPARED,
    "mhp_v1": _PREPARED,
    "pst900": FolderLayout("{part}/thermal", "{part}/labels"),
    "suim": FolderLayout("TEST/images", "annotations_detectron2/{part}"),
    "uavid": _PREPARED,
    "worldfloods": FolderLayout("images_detectron2/{part}/irrg", "annotations_detectron2/{part}"),
    "zerowaste": FolderLayout("splits_final_deblurred/{part}/data", "splits_final_deblurred/{part}/sem_seg"),
}
LAYOUTS = {
    "ade20k_847": _PREPARED,
    "pascal_context_459": FolderLayout("JPEGImages", "annotations_detectron2/pc459_{part}"),
    "cityscapes": FolderLayout("leftImg8bit/{part}", "gtFine/{part}", "_leftImg8bit", "_gtFine_labelIds"),
    "cityscapes_train_ids": FolderLayout(
        "leftImg8bit/{part}", "gtFine/{part}", "_leftImg8bit", "_gtFine_labelTrainIds"
    ),
    **{f"mess_{name}": layout for name, layout in MESS.items()},
}
