# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Class lists, unseen classes and the three kinds of ids."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroshot.data.scenes import CLASSES, COLORS, PATTERNS, STUFF
from zeroshot.data.splits import (
    SHIPPED_SPLITS,
    SPLITS_FOLDER,
    SegmentationSplit,
    load_split,
    pseudo_unseen_split,
    split_by_training_names,
)


SIZES = {  # seen and unseen classes of the protocols
    "voc2012": (15, 5),
    "coco_stuff": (156, 15),
    "pascal_context_59": (49, 10),
    "pascal_context_60": (50, 10),
    "ade20k": (150, 0),
    "embedded_scenes": (52, 18),
    "msrc": (16, 5),
    "msrc_a": (16, 5),
    "msrc_b": (16, 5),
    "msrc_c": (16, 5),
    "coco_panoptic": (120, 13),
    "photos": (134, 0),
    "cityscapes": (19, 0),
    "coco_object": (81, 0),
    "cityscapes_train_ids": (19, 0),
    "ade20k_847": (847, 0),
    "pascal_context_459": (459, 0),
    **dict.fromkeys(["mess_bdd100k", "mess_mhp_v1"], (19, 0)),
    **dict.fromkeys(["mess_chase_db1", "mess_deepcrack", "mess_kvasir_instrument"], (2, 0)),
    **dict.fromkeys(["mess_cwfid", "mess_worldfloods"], (3, 0)),
    **dict.fromkeys(["mess_pst900", "mess_zerowaste"], (5, 0)),
    **dict.fromkeys(["mess_suim", "mess_uavid"], (8, 0)),
    "mess_isprs_potsdam": (6, 0),
    "mess_floodnet": (10, 0),
    "mess_dram": (12, 0),
    "mess_isaid": (16, 0),
    "mess_dark_zurich": (20, 0),
    "mess_atlantis": (56, 0),
    "mess_foodseg103": (104, 0),
    "mess_cub_200": (201, 0),
}


@pytest.fixture(params=SHIPPED_SPLITS)
def shipped(request):
    with open(SPLITS_FOLDER / SHIPPED_SPLITS[request.param], encoding="utf-8") as file:
        return load_split(request.param), json.load(file), SIZES[request.param]


def test_shipped_splits_have_the_classes_of_their_protocols(shipped):
    split, facts, (num_seen, num_unseen) = shipped
    assert (len(split.seen), len(split.unseen)) == (num_seen, num_unseen)
    assert set(split.seen).isdisjoint(split.unseen) and set(split.seen) | set(split.unseen) == set(facts["classes"])
    assert [split.classes[i] for i in split.unseen_ids] == facts["unseen"]
    assert [split.classes[i] for i in split.seen_ids] == list(split.seen)
    assert [i for i, is_seen in enumerate(split.seen_class_mask) if is_seen] == facts["seen_ids"]


def test_shipped_raw_ids_are_mapped_as_a_plain_loop_does(shipped):
    split, facts, _ = shipped
    raw = np.array([int(key) for key in facts["raw_id_to_contiguous"]], np.uint16).reshape(1, -1)
    mapped = split.map_raw(raw)
    assert mapped.dtype == np.int64 and mapped.shape == raw.shape
    assert mapped.tolist() == [[facts["raw_id_to_contiguous"][str(i)] for i in raw[0]]]
    ignored = 65535 if len(split.classes) > 255 else 255  # 16 bits a pixel, or 8
    assert split.map_raw(np.array([ignored])) == (0 if split.name == "coco_object_81" else ignored)


def test_published_ids_of_single_classes():
    voc, coco = load_split("voc2012"), load_split("coco_stuff")
    assert voc.map_raw(np.array([0, 1, 20, 255])).tolist() == [255, 0, 19, 255]
    assert voc.classes[voc.map_raw(np.array([15]))[0]] == "person"
    assert coco.classes[coco.map_raw(np.array([181]))[0]] == "wood"
    assert [coco.classes[i] for i in coco.map_raw(np.array([20, 171]))] == ["cow", "wall-concrete"]
    streets, objects = load_split("cityscapes"), load_split("coco_object")
    assert [streets.classes[i] for i in streets.map_raw(np.array([7, 26, 33]))] == ["road", "car", "bicycle"]
    assert streets.map_raw(np.array([0, 6, 9, 30, 255])).tolist() == [255] * 5
    names = [objects.classes[i] for i in objects.map_raw(np.array([0, 20, 89, 91, 181, 255]))]
    assert names == ["person", "cow", "toothbrush", *["background"] * 3]
    with pytest.raises(ValueError, match=r"raw ids \[11, 90\]"):
        coco.map_raw(np.array([[10, 11], [90, 255]]))


def test_context_459_ids():
    for name, background in (("pascal_context_59", 255), ("pascal_context_60", 0)):
        usual, original = load_split(name), load_split(name, context_459_ids=True)
        assert usual.classes == original.classes
        mapped = original.map_raw(np.array([0, 2, 458, 1, 255, 459], np.uint16))  # 1, 255 and 459 are rare categories
        names = [usual.classes[i] for i in mapped[1:3]]
        assert names == ["aeroplane", "wood"]
        assert mapped[[0, 3, 4, 5]].tolist() == [background] * 4
        with pytest.raises(ValueError, match=r"raw ids \[460\]"):
            original.map_raw(np.array([460]))
    with pytest.raises(ValueError, match="context_459_ids"):
        load_split("voc2012", context_459_ids=True)


def test_unseen_classes_across_benchmarks_are_those_whose_names_the_training_did_not_know():
    voc, coco = load_split("voc2012"), load_split("coco_stuff")
    split = split_by_training_names(voc, [name.upper() for name in coco.seen])
    # COCO-Stuff has other names for these, or they are unseen there; VOC's unseen sheep and train are seen in its training.
    assert split.classes == voc.classes and set(split.unseen) == {
        *("aeroplane", "cow", "diningtable", "motorbike", "pottedplant", "sofa", "tvmonitor")
    }
    assert split.unseen == tuple(name for name in voc.classes if name in split.unseen)
    assert split.map_raw(np.array([0, 1, 20])).tolist() == [255, 0, 19] and "7 of 20" in split.protocol


def test_embedded_split_leaves_every_attribute_seen():
    split = load_split("embedded_scenes")
    assert split.classes == CLASSES
    pairs = [name.split() for name in split.seen if name not in STUFF]
    assert {color for color, _ in pairs} == set(COLORS) and {pattern for _, pattern in pairs} == set(PATTERNS)
    for i, color in enumerate(COLORS):
        for j, pattern in enumerate(PATTERNS):
            assert (f"{color} {pattern}" in split.seen) == ((j - i) % 8 not in (2, 5))
    assert [name for name in split.unseen if name in STUFF] == ["sand", "water"]
    assert dict(split.sizes) == {"train": 4000, "validation": 500, "test": 500}


splits = st.integers(1, 400).flatmap(
    lambda count: st.builds(
        lambda unseen: SegmentationSplit(
            name="drawn",
            classes=tuple(f"class {i}" for i in range(count)),
            unseen=tuple(f"class {i}" for i in unseen),
            ignore_index=255 if count <= 255 else 65535,
        ),
        st.lists(st.integers(0, count - 1), unique=True, max_size=count),
    )
)


@settings(deadline=None)
@given(splits, st.integers(0, 2**32 - 1))
def test_no_unseen_id_survives_and_relabelling_unseen_pixels_changes_nothing(split, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, len(split.classes), (7, 9))
    label[rng.random(label.shape) < 0.2] = split.ignore_index
    hidden = split.hide_unseen(label)

    assert hidden.dtype == np.int64
    for before, after in zip(label.flat, hidden.flat, strict=True):
        if before == split.ignore_index or split.classes[before] in split.unseen:
            assert after == split.ignore_index
        else:
            assert split.seen[after] == split.classes[before]
    assert set(hidden.flat) <= set(range(len(split.seen))) | {split.ignore_index}

    relabelled, unseen_pixels = label.copy(), np.isin(label, split.unseen_ids)
    if unseen_pixels.any():
        relabelled[unseen_pixels] = rng.choice(split.unseen_ids, unseen_pixels.sum())
    assert np.array_equal(split.hide_unseen(relabelled), hidden)


def test_hide_unseen_refuses_ids_that_are_no_class():
    split = SegmentationSplit("two", ("a", "b"), ("b",))
    for wrong in (2, -1, 254, 256):
        with pytest.raises(ValueError, match=rf"ids \[{wrong}\]"):
            split.hide_unseen(np.array([[0, wrong]]))
    with pytest.raises(ValueError, match="float64"):
        split.hide_unseen(np.array([0.0]))


def test_more_classes_than_eight_bits_hold():
    classes = tuple(f"class {i}" for i in range(300))
    with pytest.raises(ValueError, match="`ignore_index` is 255, the id of class 'class 255'"):
        SegmentationSplit("many", classes)
    split = SegmentationSplit("many", classes, ("class 255",), ignore_index=65535)
    raw = np.array([0, 255, 299, 65535], np.uint16)
    assert split.map_raw(raw).tolist() == [0, 255, 299, 65535]
    assert split.hide_unseen(split.map_raw(raw)).tolist() == [0, 65535, 298, 65535]
    assert pickle.loads(pickle.dumps(split)) == split


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16, np.uint32])
def test_map_raw_takes_any_integer_type(dtype):
    split = load_split("voc2012")
    assert split.map_raw(np.array([[1, 0], [20, 255]], dtype)).tolist() == [[0, 255], [19, 255]]
    for wrong in (21, 70_000, -1):
        if not np.iinfo(dtype).min <= wrong <= np.iinfo(dtype).max:
            continue
        with pytest.raises(ValueError, match=str(wrong)):
            split.map_raw(np.array([1, wrong], dtype))


# --- files of users --------------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_with_names_ids_and_ignored_ones(tmp_path):
    path = write(
        tmp_path / "streets.yaml",
        "classes: [road, 'no', sky]\nunseen: [sky]\nignore_index: 250\n"
        "raw_id_map: {7: road, 8: 1, 9: 250, 300: sky}\n",
    )
    split = load_split(path)
    assert (split.name, split.classes, split.unseen_ids) == ("streets", ("road", "no", "sky"), (2,))
    assert split.map_raw(np.array([7, 8, 9, 300, 250])).tolist() == [0, 1, 250, 2, 250]


def test_smallest_yaml_holds_class_names_only(tmp_path):
    split = load_split(write(tmp_path / "own.yaml", "classes:\n- Straße\n- 空\n"))
    assert split.seen == ("Straße", "空") and split.map_raw(np.array([0, 1, 255])).tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "key `classes`"),
        ("- a\n- b\n", "key `classes`"),
        ("classes: [a\n", "cannot be used"),
        ("classes: a b\n", "`classes` is 'a b'; expected a list"),
        ("classes: []\n", "`classes` is empty"),
        ("classes: [a, no]\n", "`classes` has False at position 1.*quote"),
        ("classes: [a, ' ']\n", "`classes` has ' ' at position 1"),
        ("classes: [a, b, a]\n", "`classes` has 'a' more than once"),
        ("classes: [car, bus, Car]\n", "`classes` has 'car', 'Car', which differ only in case"),
        ("classes: [a, ' b']\n", "`classes` has ' b' at position 1; remove the spaces"),
        ("classes: [a, b]\nclasses: [a]\n", "'classes' occurs more than once"),
        ("classes: [a]\nraw_id_map: {1: a, 1: 255}\n", "'1' occurs more than once"),
        ("classes: [a]\npalette: [a]\n", r"`palette` is \['a'\]"),
        ("classes: [a]\npalette: {b: [0, 0, 0]}\n", "`palette` has 'b', which is neither in `classes`"),
        ("classes: [a]\npalette: {a: [0, 0]}\n", r"maps 'a' to the colour \[0, 0\]; expected three"),
        ("classes: [a]\npalette: {a: [0, 0, 256]}\n", "expected three of 0..255"),
        (
            "classes: [a, b]\npalette: {a: [0, 0, 1], b: [[1, 1, 1], [0, 0, 1]]}\n",
            r"the colour \[0, 0, 1\] more than once",
        ),
        ("classes: [a]\nraw_id_map: {3: a}\npalette: {a: [0, 0, 0]}\n", "both `raw_id_map` and `palette`"),
        ("classes: [a, b]\nunseen: [b, b]\n", "`unseen` has 'b' more than once"),
        ("classes: [a, b]\nunseen: b\n", "`unseen` is 'b'; expected a list"),
        ("classes: [a, b]\nunseen: [c]\n", "`unseen` contains 'c'"),
        ("classes: [a, b]\nunsen: [b]\n", "unknown key 'unsen'; did you mean 'unseen'"),
        ("classes: [a, b]\nignore_index: 1\n", "`ignore_index` is 1, the id of class 'b'"),
        ("classes: [a, b]\nignore_index: none\n", "`ignore_index` is 'none'"),
        ("classes: [a, b]\nraw_id_map: [0, 1]\n", "`raw_id_map`"),
        ("classes: [a, b]\nraw_id_map: {0: c}\n", "maps 0 to 'c'"),
        ("classes: [a, b]\nraw_id_map: {0: 2}\n", "maps 0 to 2"),
        ("classes: [a, b]\nraw_id_map: {x: a}\n", "key 'x'"),
        ("classes: [a, b]\nraw_id_map: {70000: a}\n", "key 70000"),
        ("classes: " + "[" * 3000, "nested too deeply"),
        ("classes: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_malformed_yaml_is_answered_with_the_file_and_the_key(tmp_path, text, message):
    path = write(tmp_path / "own.yaml", text)
    with pytest.raises(ValueError, match=rf"(?s)own\.yaml cannot be used.*{message}|{message}") as raised:
        load_split(path)
    assert "own.yaml" in str(raised.value)


def test_json_whose_ids_disagree_with_its_names_is_refused(tmp_path):
    facts = json.loads((SPLITS_FOLDER / SHIPPED_SPLITS["voc2012"]).read_text())
    assert load_split(write(tmp_path / "voc.json", json.dumps(facts))) == load_split("voc2012")
    for change, message in (
        ({"unseen_ids": [14, 15, 16, 17, 18]}, r"`unseen_ids` is \[14"),
        ({"seen_ids": []}, "`seen_ids`"),
        ({"classes": 5}, "`classes` is 5; expected a list"),
        ({"raw_id_to_contiguous": {"x": 1}}, "voc.json"),
        ({"background": "x"}, "`background` is 'x'"),
        ({"background": {}}, "`background` is {}"),
        ({"splits": [1]}, r"`splits` is \[1\]"),
        ({"splits": {"train": {}}}, "`splits` is {'train': {}}"),
    ):
        with pytest.raises(ValueError, match=message):
            load_split(write(tmp_path / "voc.json", json.dumps(facts | change)))
    with pytest.raises(ValueError, match="lacks 'name'"):
        load_split(write(tmp_path / "voc.json", "{}"))


def test_unknown_split_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match="'voc2013'.*built-in one, such as voc2012"):
        load_split("voc2013")


def test_folds_of_pseudo_unseen_classes_do_not_overlap_and_leave_out_the_unseen_ones() -> None:
    split = load_split("msrc_b")
    folds = [pseudo_unseen_split(split, 5 / 21, fold) for fold in range(5)]
    assert all(set(fold.classes) == set(split.seen) and len(fold.unseen) == 4 for fold in folds)
    assert sorted(name for fold in folds[:4] for name in fold.unseen) == sorted(split.seen)
    assert folds[4].unseen == folds[0].unseen  # from the start again
