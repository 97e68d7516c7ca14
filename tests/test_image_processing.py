# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Conversion of any image to pixel values, and of any label map to masks."""

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from modeling_alignzeg.image_processing_alignzeg import AlignZegImageProcessor, SizeDict, _output_size
from modeling_alignzeg.images_alignzeg import to_rgb


RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (21, 34, 3), dtype=np.uint8)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
SMALL = {"size": {"shortest_edge": 48, "longest_edge": 96}, "size_divisor": 16}


@pytest.fixture(scope="module")
def processor() -> AlignZegImageProcessor:
    return AlignZegImageProcessor(**SMALL)


def reference(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The pixel values of an RGB image without padding, as a plain reference."""
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)


def encode(image: Image.Image, kind: str, **options) -> Image.Image:
    """`image` after a round trip through a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


# --- to_rgb


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_alpha_are_those_of_pil(mode: str) -> None:
    image = Image.fromarray(PICTURE)
    image = image.convert(mode) if mode != "LAB" else Image.fromarray(PICTURE, "LAB")
    result = to_rgb(image)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    grey = np.full((4, 5), 100, np.uint8)
    alpha = np.array([[0, 51, 128, 204, 255]] * 4, np.uint8)
    if mode in ("LA", "La"):
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).convert(mode)
    elif mode == "PA":  # Pillow's own conversion to it loses alpha before version 12
        image = Image.frombytes("PA", (5, 4), np.dstack([grey, alpha]).tobytes())
        image.putpalette([value for value in range(256) for _ in range(3)])
    else:
        image = Image.merge("RGBA", [Image.fromarray(band) for band in (grey, grey, grey, alpha)]).convert(mode)
    expected = 100 * (alpha / 255) + 255 * (1 - alpha / 255)
    result = np.asarray(to_rgb(image)).astype(float)
    np.testing.assert_allclose(result, np.repeat(expected[..., None], 3, 2), atol=2)


def test_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image = encode(image, "PNG", transparency=0)
    assert image.mode == "P"
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
    for image in (
        Image.fromarray(values),
        encode(Image.fromarray(values), "PNG"),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 1, 117, 255]
    big_endian = Image.frombytes("I;16B", (6, 1), values.byteswap().tobytes())
    assert np.asarray(to_rgb(big_endian))[0, :, 0].tolist() == [0, 0, 1, 1, 117, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([1000.0, 1500.0, 2000.0], [0, 128, 255]),
        ([7e8, 7e8, 7e8], [0, 0, 0]),
        ([float("nan"), 0.5, float("inf")], [128, 128, 128]),
        ([float("nan")] * 3, [0, 0, 0]),
    ],
)
def test_float_images_keep_their_range_or_are_stretched(values: list[float], expected: list[int]) -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([values], np.float32))))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(Image.fromarray(PICTURE), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(image.copy()))
    image = encode(Image.fromarray(PICTURE), kind, exif=exif)
    upright = to_rgb(image)
    np.testing.assert_array_equal(np.asarray(upright), expected)
    np.testing.assert_array_equal(np.asarray(to_rgb(upright)), expected)


def test_exif_orientation_of_a_transparent_palette() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(image, "PNG", transparency=0, exif=exif)
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255]], [[0, 0, 255]]]


def test_damaged_exif_is_no_obstacle() -> None:
    image = Image.fromarray(PICTURE)
    image.info["exif"] = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), PICTURE)


def test_a_caller_s_image_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image = encode(Image.fromarray(PICTURE).convert("RGBA"), "PNG", exif=exif)
    to_rgb(image)
    assert image.mode == "RGBA" and image.getexif()[0x0112] == 3


# --- pixel values


@pytest.mark.parametrize(("height", "width", "size"), [(21, 34, (48, 77)), (60, 40, (72, 48)), (10, 100, (16, 96))])
def test_pixel_values_equal_the_plain_formula(
    processor: AlignZegImageProcessor, height: int, width: int, size: tuple[int, int]
) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    inputs = processor(image, return_tensors="pt")
    rows, columns = size
    padded = tuple(-(-side // 16) * 16 for side in size)
    assert inputs.pixel_values.shape == (1, 3, *padded) and inputs.pixel_values.dtype == torch.float32
    assert inputs.pixel_mask.shape == (1, *padded) and inputs.pixel_mask.dtype == torch.int64
    np.testing.assert_allclose(inputs.pixel_values[0, :, :rows, :columns], reference(image, *size), atol=2e-6)
    outside = torch.ones(padded, dtype=torch.bool)
    outside[:rows, :columns] = False
    assert torch.equal(inputs.pixel_mask[0] == 0, outside)
    assert inputs.pixel_values[0, :, outside].abs().sum() == 0


def test_defaults() -> None:
    inputs = AlignZegImageProcessor()(Image.fromarray(PICTURE), return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, 640, 1056)
    assert inputs["pixel_mask"].sum() == 640 * 1036


def test_a_batch_equals_its_images_alone(processor: AlignZegImageProcessor) -> None:
    images = [
        Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in [(21, 34), (50, 20), (9, 9)]
    ]
    batch = processor(images, return_tensors="pt")
    assert batch.pixel_values.shape == (3, 3, 96, 80)
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        mask = alone.pixel_mask[0].bool()
        rows, columns = int(mask[:, 0].sum()), int(mask[0].sum())
        assert batch.pixel_mask[index].sum() == mask.sum()
        assert torch.equal(batch.pixel_values[index, :, :rows, :columns], alone.pixel_values[0, :, :rows, :columns])


def variants(picture: np.ndarray) -> dict[str, object]:
    """One RGB image in all supported types."""
    chw = np.ascontiguousarray(picture.transpose(2, 0, 1))
    return {
        "hwc": picture,
        "chw": chw,
        "torch hwc": torch.from_numpy(picture),
        "torch chw": torch.from_numpy(chw),
        "not contiguous": picture[:, ::-1][:, ::-1],
        "int64": picture.astype(np.int64),
        "int32 torch": torch.from_numpy(chw).int(),
        "float 0..255": picture.astype(np.float32),
        "float 0..1": picture / 255,
        "float16 0..1": (picture / 255).astype(np.float16),
        "float32 torch 0..1": torch.from_numpy(chw).float() / 255,
        "with gradient": (torch.from_numpy(chw).float() / 255).requires_grad_(),
        "uint16": picture.astype(np.uint16) * 257,
        "uint16 torch": torch.from_numpy(picture.astype(np.uint16) * 257),
        "batch": picture[None],
        "nested": [[picture]],
        "rgba": np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], 2),
    }


@pytest.mark.parametrize("name", variants(PICTURE))
def test_layouts_and_dtypes_give_the_same_pixels(processor: AlignZegImageProcessor, name: str) -> None:
    expected = processor(Image.fromarray(PICTURE), return_tensors="pt").pixel_values
    assert torch.equal(processor(variants(PICTURE)[name], return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors(processor: AlignZegImageProcessor, dtype: torch.dtype) -> None:
    expected = processor(PICTURE, return_tensors="pt").pixel_values
    image = (torch.from_numpy(PICTURE).float() / 255).to(dtype)
    assert (processor(image, return_tensors="pt").pixel_values - expected).abs().max() < 0.03


def test_grey_and_bool_arrays(processor: AlignZegImageProcessor) -> None:
    grey = PICTURE[..., 0]
    expected = processor(Image.fromarray(grey).convert("RGB"), return_tensors="pt").pixel_values
    for image in (grey, grey[None], grey[..., None], torch.from_numpy(grey.copy())):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    black_white = grey > 127
    expected = processor(Image.fromarray(black_white), return_tensors="pt").pixel_values
    assert torch.equal(processor(black_white, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 7, 3), (1, 7)), ((3, 7, 1), (7, 1)), ((7, 1, 3), (7, 1)), ((3, 1, 7), (1, 7)), ((1, 9, 4), (1, 9))],
)
def test_one_pixel_high_colour_images_are_not_taken_for_grey(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    inputs = AlignZegImageProcessor(do_resize=False, size_divisor=1)(np.zeros(shape, np.uint8), return_tensors="pt")
    assert inputs.pixel_values.shape[2:] == size


def test_input_data_format_decides(processor: AlignZegImageProcessor) -> None:
    image = np.zeros((3, 7, 3), np.uint8)
    options = {"do_resize": False, "size_divisor": 1, "return_tensors": "pt"}
    for layout, size in (("channels_first", (7, 3)), ("channels_last", (3, 7))):
        assert processor(image, input_data_format=layout, **options).pixel_values.shape[2:] == size


def test_without_rescale_values_keep_their_range(processor: AlignZegImageProcessor) -> None:
    options = {"do_resize": False, "do_normalize": False, "do_rescale": False, "do_pad": False, "return_tensors": "np"}
    chw = PICTURE.transpose(2, 0, 1)
    np.testing.assert_array_equal(processor(PICTURE, **options)["pixel_values"][0], chw)
    np.testing.assert_allclose(processor(PICTURE / 255, **options)["pixel_values"][0], chw / 255, atol=1e-6)


def test_other_channels_without_conversion(processor: AlignZegImageProcessor) -> None:
    image = RNG.integers(0, 256, (48, 64, 5), dtype=np.uint8)
    options = {"do_convert_rgb": False, "input_data_format": "channels_last", "do_normalize": False}
    result = processor(image, return_tensors="np", **options)["pixel_values"]
    np.testing.assert_allclose(result[0], image.transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(20000, 1), (1, 20000), (20000, 3), (1, 1), (2, 1), (20000, 15000)])
def test_extreme_sizes_stay_bounded(width: int, height: int) -> None:
    inputs = AlignZegImageProcessor()(Image.new("L", (width, height)), return_tensors="np")
    rows, columns = inputs["pixel_values"].shape[2:]
    assert 32 <= rows <= 2560 and 32 <= columns <= 2560 and rows % 32 == columns % 32 == 0


@example(height=10, width=100, shortest=48, times=2.0)
@example(height=1, width=4000, shortest=640, times=4.0)
@given(height=st.integers(1, 20000), width=st.integers(1, 20000), shortest=st.integers(1, 1024), times=st.floats(1, 5))
def test_sizes_are_bounded_and_keep_the_aspect_ratio(height: int, width: int, shortest: int, times: float) -> None:
    longest = int(shortest * times)
    new = _output_size(height, width, SizeDict(shortest_edge=shortest, longest_edge=longest), 32)
    assert min(shortest, 32) <= min(new) <= shortest and max(new) <= longest
    scale = min(shortest / min(height, width), longest / max(height, width))
    least = min(32, shortest)
    for old, side in zip((height, width), new):
        assert abs(side - max(old * scale, least)) < 1.01


def test_sizes_of_all_kinds() -> None:
    assert _output_size(30, 40, SizeDict(height=7, width=9), 32) == (7, 9)
    assert _output_size(30, 40, SizeDict(max_height=60, max_width=60), 32) == (45, 60)
    assert _output_size(30, 40, SizeDict(longest_edge=80), 32) == (60, 80)
    assert _output_size(1, 20000, SizeDict(shortest_edge=100), 32) == (32, 400)
    processor = AlignZegImageProcessor(size=64)
    assert processor(Image.new("RGB", (50, 40)), return_tensors="np")["pixel_values"].shape == (1, 3, 64, 96)


def test_pad_size(processor: AlignZegImageProcessor) -> None:
    inputs = processor(PICTURE, pad_size={"height": 100, "width": 90}, return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, 100, 90) and inputs["pixel_mask"].sum() == 48 * 77


def test_paths_keep_their_mode(processor: AlignZegImageProcessor, tmp_path) -> None:
    image = Image.fromarray(np.dstack([PICTURE, PICTURE[..., 0]]))
    image.save(tmp_path / "alpha.png")
    expected = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(processor(str(tmp_path / "alpha.png"), return_tensors="pt").pixel_values, expected)


def truncated(mode: str = "RGB") -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)).convert(mode).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:9000]))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "`images` is empty"),
        (None, {}, "contains a NoneType"),
        ({"image": 1}, {}, "contains a dict"),
        ([[1, 2], [3, 4]], {}, "contains a int"),
        (np.zeros(5), {}, r"of shape \(5,\)"),
        (np.zeros((0, 4, 3), np.uint8), {}, r"`images\[0\]` .* no pixels"),
        ([PICTURE, Image.new("RGB", (0, 5))], {}, r"`images\[1\]` .* no pixels: its size is 0 x 5"),
        (np.zeros((5, 4, 7)), {}, r"`images\[0\]` .* 1, 3 or 4 channels"),
        (np.zeros((5, 4, 2)), {"input_data_format": "channels_last"}, "2 channels"),
        (np.full((4, 5, 3), np.nan), {}, "NaN"),
        (torch.zeros(3, 4, 5, device="meta"), {}, r"`images\[0\]` .* \(strided, meta\), which NumPy does not have"),
        (torch.zeros(3, 4, 5).to_sparse(), {}, "convert it with `.to_dense"),
        (torch.zeros(3, 4, 5).to(torch.float8_e4m3fn), {}, "type float8_e4m3fn"),
        (PICTURE, {"size": [3]}, r"`size` is \[3\]; as a list it is \(height, width\)"),
        (PICTURE, {"image_std": [1.0, float("nan"), 1.0]}, "`image_std` is .*; expected a finite number"),
        (PICTURE, {"rescale_factor": float("inf")}, "`rescale_factor` is inf; expected a finite number"),
        (np.zeros((4, 5, 3), complex), {}, "complex128"),
        (np.full((4, 5, 3), 300), {}, "from 300 to 300; expected 0 to 255"),
        (-np.ones((4, 5, 3)), {}, "already normalized"),
        (truncated(), {}, r"`images\[0\]` .* truncated or damaged"),
        ("no such file.png", {}, "is not an existing file"),
        (__file__, {}, "cannot be opened as an image"),
        (PICTURE, {"size": {"shortest_edge": 0}}, "at least 1"),
        (PICTURE, {"size": {"height": 10**6, "width": 10**6}}, "`size` gives an input of 1000000 x 1000000 pixels"),
        (PICTURE, {"pad_size": {"height": 10**6, "width": 10**6}}, "`pad_size` or .* gives an input of 1000000"),
        (PICTURE, {"size_divisor": 10**6}, "`size_divisor` gives an input of 1000000"),
        (PICTURE, {"image_std": 1e-300}, "`image_std` 1e-300 give pixels that float32 cannot represent"),
        (PICTURE, {"rescale_factor": 1e300}, r"`rescale_factor` 1e\+300, .* cannot represent"),
        (PICTURE, {"size": {"min_pixels": 5, "max_pixels": 9}}, "`size` is .* expected `shortest_edge`"),
        (PICTURE, {"size_divisor": 0}, "`size_divisor` is 0"),
        (PICTURE, {"pad_size": {"height": 9, "width": 9}}, "make `pad_size` larger"),
        (PICTURE, {"image_mean": [0.0, 0.0]}, "`image_mean` has 2 values for 3 channels"),
        (PICTURE, {"image_std": [0.0, 1.0, 1.0]}, "other than 0"),
        (PICTURE, {"do_center_crop": True, "crop_size": 8}, "`do_center_crop` is not supported"),
        ([PICTURE, PICTURE[:9]], {"do_pad": False}, "do_pad=True"),
        ([PICTURE, PICTURE[..., 0]], {"do_convert_rgb": False}, "do_convert_rgb=True"),
    ],
)
def test_bad_images_are_answered_with_a_sentence(
    processor: AlignZegImageProcessor, images: object, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images, **options)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300),
    cut=st.integers(0, 2000),
    place=st.integers(0, 2000),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]),
)
def test_damaged_files_raise_nothing_but_sentences(data: bytes, cut: int, place: int, kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, kind)
    content = file.getvalue()
    content = (content[:place] + data + content[place + len(data) :])[: len(content) - cut or None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
        except Exception:
            return  # PIL raises its own error first
        if image.width * image.height > 10**6:
            return
        try:
            assert to_rgb(image).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("it ")


# --- label maps


def test_masks_and_classes(processor: AlignZegImageProcessor) -> None:
    labels = np.full((21, 34), 255)
    labels[:10, :20], labels[10:, 20:] = 7, 300
    inputs = processor(PICTURE, labels, return_tensors="pt")
    assert inputs.class_labels[0].tolist() == [7, 300] and inputs.class_labels[0].dtype == torch.int64
    expected = torch.nn.functional.interpolate(
        torch.tensor(labels)[None, None].double(), (48, 77), mode="nearest-exact"
    )
    padded = torch.full((48, 80), 255.0)
    padded[:, :77] = expected[0, 0]
    assert inputs.mask_labels[0].dtype == torch.float32
    assert torch.equal(inputs.mask_labels[0], torch.stack([padded == 7, padded == 300]).float())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m,
        lambda m: m[None],
        lambda m: m[..., None],
        lambda m: m.astype(np.float32),
        lambda m: m.astype(np.uint16),
        lambda m: torch.from_numpy(m),
        lambda m: torch.from_numpy(m)[None],
        lambda m: Image.fromarray(m.astype(np.int32)),
        lambda m: Image.fromarray(m.astype(np.uint16)),
    ],
)
def test_label_maps_of_all_kinds_keep_their_ids(processor: AlignZegImageProcessor, make) -> None:
    labels = np.repeat(np.arange(250, 284), 21).reshape(34, 21).T.copy()
    inputs = processor([PICTURE], [make(labels)], return_tensors="np")
    assert inputs["class_labels"][0].tolist() == [i for i in range(250, 284) if i != 255]


def test_a_palette_image_is_its_indices(processor: AlignZegImageProcessor) -> None:
    image = Image.fromarray(np.full((21, 34), 19, np.uint8), "P")
    image.putpalette(list(range(256)) * 3)
    assert processor(PICTURE, image)["class_labels"][0].tolist() == [19]


def test_a_map_without_labels_gives_no_masks(processor: AlignZegImageProcessor) -> None:
    inputs = processor([PICTURE, PICTURE], [np.full((21, 34), 255), np.zeros((21, 34), int)], return_tensors="pt")
    assert inputs.mask_labels[0].shape == (0, 48, 80) and inputs.class_labels[0].shape == (0,)
    assert inputs.mask_labels[1].shape == (1, 48, 80)


def test_ignore_index(processor: AlignZegImageProcessor) -> None:
    labels = np.zeros((21, 34), int)
    labels[0] = -1
    assert processor(PICTURE, labels, ignore_index=-1)["class_labels"][0].tolist() == [0]
    labels[0] = 255
    assert processor(PICTURE, labels, ignore_index=None)["class_labels"][0].tolist() == [0, 255]


@settings(deadline=None)
@given(st.data())
def test_masks_partition_what_is_labelled(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    ids = data.draw(st.lists(st.sampled_from([0, 1, 5, 254, 255, 256, 70000]), min_size=1, max_size=4, unique=True))
    labels = np.random.default_rng(data.draw(st.integers(0, 99))).choice(ids, (height, width))
    image = np.zeros((height, width, 3), np.uint8)
    processor = AlignZegImageProcessor(**SMALL)
    inputs = processor(image, labels, input_data_format="channels_last", return_tensors="pt")
    masks, classes = inputs.mask_labels[0], inputs.class_labels[0]
    assert set(classes.tolist()) <= set(ids) - {255} and len(masks) == len(classes)
    assert masks.shape[1:] == inputs.pixel_values.shape[2:] and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.sum(0) <= inputs.pixel_mask[0]).all()
    if 255 not in ids:
        assert torch.equal(masks.sum(0).long(), inputs.pixel_mask[0])
    assert masks.flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros((21, 34))] * 2, "2 `segmentation_maps` for 1 `images`"),
        (np.zeros((20, 34)), "20 rows and 34 columns"),
        (np.zeros((34, 21)), "EXIF orientation was applied"),
        (Image.new("RGB", (34, 21)), "mode RGB"),
        (np.full((21, 34), 0.5), "not whole numbers"),
        (np.full((21, 34), np.nan), "not whole numbers"),
        (np.full((21, 34), -1), "negative ids"),
        (np.full((21, 34), 2**63, np.uint64), "it contains the id 9223372036854775808"),
        (np.full((21, 34), 1e30), "it contains the id 1e"),
        (np.zeros((1, 21, 34, 2)), r"its shape is \(21, 34, 2\)"),
        ([3], "it is a int"),
        (torch.zeros(21, 34, device="meta"), r"type float32 \(strided, meta\).*expected a dense tensor"),
        (torch.zeros(21, 34).to_sparse(), "to_dense"),
        (truncated("L"), "truncated or damaged"),
    ],
)
def test_bad_label_maps_are_answered_with_a_sentence(
    processor: AlignZegImageProcessor, maps: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(PICTURE, maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"shortest_edge": 2.5}}, "`size` is {'shortest_edge': 2.5}; expected whole numbers"),
        ({"size": {"shortest_edge": "x"}}, "expected whole numbers of at least 1"),
        ({"size": {"shortest_edge": True}}, "expected whole numbers of at least 1"),
        ({"size": [1, 2, 3]}, r"`size` is \[1, 2, 3\]; as a list it is"),
        ({"pad_size": {"height": "a", "width": "b"}}, "`pad_size` is {'height': 'a', 'width': 'b'}; expected whole"),
        ({"pad_size": {"longest_edge": 99}}, "`pad_size` is .*; expected `height` and `width`"),
        ({"image_mean": "grey"}, "`image_mean` is 'grey'; expected a finite number"),
        ({"rescale_factor": "a"}, "`rescale_factor` is 'a'; expected a finite number"),
    ],
)
def test_bad_settings_are_answered_with_a_sentence(options: dict[str, object], message: str) -> None:
    """Transformers checks calls, but not constructors."""
    with pytest.raises(ValueError, match=message):
        AlignZegImageProcessor(**options)(PICTURE)


@pytest.mark.parametrize(
    ("mode", "transparency"), [("RGB", (1, 2)), ("L", b"123"), ("P", "x")], ids=["two of three", "bytes", "text"]
)
def test_transparency_that_makes_no_sense_is_answered_with_a_sentence(mode: str, transparency: object) -> None:
    image = Image.new(mode, (4, 3))
    image.info["transparency"] = transparency
    with pytest.raises(ValueError, match=f"its mode {mode} cannot be converted to RGB"):
        to_rgb(image)


@pytest.mark.parametrize("shape", [(1, 34), (34, 1)], ids=str)
def test_label_maps_with_an_axis_more(processor: AlignZegImageProcessor, shape: tuple[int, int]) -> None:
    image, labels = np.zeros((*shape, 3), np.uint8), np.arange(34).reshape(shape)
    expected = processor(image, labels, return_tensors="pt").mask_labels[0]
    for maps in (labels[..., None], [labels[..., None]], labels[None], [labels[None]]):
        assert torch.equal(processor(image, maps, return_tensors="pt").mask_labels[0], expected)


def test_nested_tensors_are_lists(processor: AlignZegImageProcessor) -> None:
    images = [torch.from_numpy(PICTURE.transpose(2, 0, 1)[:, :rows].copy()) for rows in (21, 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor(images)
    expected = processor(images, return_tensors="pt").pixel_values
    assert torch.equal(processor(nested, return_tensors="pt").pixel_values, expected)


def test_saving_and_loading_keeps_everything(tmp_path) -> None:
    processor = AlignZegImageProcessor(size={"height": 40, "width": 50}, size_divisor=8, ignore_index=0, do_pad=False)
    processor.save_pretrained(tmp_path)
    loaded = AlignZegImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (tmp_path / "image_processing_alignzeg.py").is_file()
