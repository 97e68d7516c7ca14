# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The demo through its API and over HTTP, with valid, invalid and hostile pictures and names."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from demo_server import DemoServer, serve_demo
from PIL import Image
from test_convolutional import tower_config
from tiny import CLASSES, UNSEEN, picture, tiny_checkpoint

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from zeroshot.checkpoints import load_config
from zeroshot.data.scenes import CLASSES as SCENE_CLASSES
from zeroshot.data.scenes import draw_scene


gradio_client = pytest.importorskip("gradio_client", reason="the demo needs gradio")
import httpx  # noqa: E402
from gradio.route_utils import delete_files_created_by_app  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "app"


# ------------------------------------------------------------------------------------------------------- what runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alignzeg_app", APP / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def segmenter(app: ModuleType, checkpoint: Path) -> Any:
    return app.Segmenter(str(checkpoint))


@pytest.fixture(scope="module")
def served(app: ModuleType, segmenter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the demo, which runs inside this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        demo = app.build(segmenter).queue(max_size=app.QUEUE_SIZE, default_concurrency_limit=1)
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
        yield url
        demo.close()


@pytest.fixture(scope="module")
def client(served: str) -> Client:
    return Client(served, verbose=False)


def save(folder: Path, image: Image.Image, name: str = "picture.png") -> Any:
    image.save(folder / name)
    return handle_file(str(folder / name))


def expected_labels(checkpoint: Path, image: Image.Image, **options: Any) -> np.ndarray:
    """The model's result without the demo."""
    model, processor = AlignZegModel.from_pretrained(checkpoint).eval(), AlignZegProcessor.from_pretrained(checkpoint)
    seen = torch.tensor([name not in UNSEEN for name in CLASSES])
    with torch.no_grad():
        prototypes = model.get_text_prototypes(processor, list(CLASSES))
        outputs = model(
            **processor(images=image, return_tensors="pt"), text_prototypes=prototypes, seen_class_mask=seen
        )
    size = [(image.height, image.width)]
    return processor.post_process_semantic_segmentation(outputs, size, **options)[0].numpy()


# ------------------------------------------------------------------------------------------------------ the right way


def test_api_segments_as_the_model_does(client: Client, checkpoint: Path, tmp_path: Path) -> None:
    image = picture(0, (150, 97))
    for gamma, threshold in ((None, None), (0.0, None), (3.0, 0.2)):
        labels, overlay, result = client.predict(
            image=save(tmp_path, image),
            class_names=list(CLASSES),
            unseen=list(UNSEEN),
            gamma=gamma,
            threshold=threshold,
            api_name="/segment",
        )
        with Image.open(labels) as label:
            assert label.mode == "P" and label.size == image.size
            np.testing.assert_array_equal(
                np.asarray(label), expected_labels(checkpoint, image, gamma=gamma, threshold=threshold)
            )
            for entry in result["classes"]:
                assert entry["coverage"] == pytest.approx((np.asarray(label) == entry["id"]).mean())
                assert (entry["confidence"] is None) == (entry["coverage"] == 0)
                assert entry["confidence"] is None or 0 < entry["confidence"] <= 1
        with Image.open(overlay) as drawn:
            assert drawn.size == image.size
        assert [entry["name"] for entry in result["classes"]] == list(CLASSES)
        assert [entry["name"] for entry in result["classes"] if entry["unseen"]] == list(UNSEEN)
        assert (result["height"], result["width"], result["everything_else"]) == (97, 150, False)


def test_everything_else_is_255(client: Client, checkpoint: Path, tmp_path: Path) -> None:
    image = picture(1)
    labels, _, result = client.predict(
        image=save(tmp_path, image),
        class_names=list(CLASSES),
        unseen=list(UNSEEN),
        everything_else=True,
        api_name="/segment",
    )
    expected = expected_labels(checkpoint, image, none_of_these=True, none_index=255)
    with Image.open(labels) as label:
        np.testing.assert_array_equal(np.asarray(label), expected)
    assert result["classes"][-1]["id"] == 255
    assert sum(entry["coverage"] for entry in result["classes"]) == pytest.approx(1)


def test_pictures_of_any_kind(client: Client, tmp_path: Path) -> None:
    """Grey, 16 bits, transparent, turned by EXIF, animated, one pixel: the label map has the upright picture's size."""
    grey = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "grey.png": (Image.fromarray((grey // 5).astype(np.uint8)), {}, (40, 30)),
        "deep.png": (Image.fromarray(grey * 50), {}, (40, 30)),
        "clear.png": (picture().convert("RGBA"), {}, (48, 40)),
        "clear.webp": (picture().convert("RGBA"), {}, (48, 40)),
        "turned.jpg": (picture(), {"exif": turned}, (40, 48)),
        "moving.gif": (picture().convert("P"), {"save_all": True, "append_images": [picture(1)]}, (48, 40)),
        "dot.bmp": (Image.new("RGB", (1, 1)), {}, (1, 1)),
        "line.tiff": (Image.new("RGB", (700, 2)), {}, (700, 2)),
    }
    for name, (image, options, size) in pictures.items():
        image.save(tmp_path / name, **options)
        labels, _, _ = client.predict(
            image=handle_file(str(tmp_path / name)), class_names=["grass", "brick"], api_name="/segment"
        )
        with Image.open(labels) as label:
            assert label.size == size, name


def test_api_is_documented(client: Client) -> None:
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/segment"], "only the documented function is public"
    parameters = {entry["parameter_name"]: entry for entry in endpoints["/segment"]["parameters"]}
    assert list(parameters) == ["image", "class_names", "unseen", "gamma", "threshold", "everything_else"]
    assert parameters["class_names"]["python_type"]["type"] == "list[str]"
    required = [name for name, entry in parameters.items() if not entry["parameter_has_default"]]
    assert required == ["image", "class_names"]
    readme = (APP / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in parameters)


# ------------------------------------------------------------------------------------------------- the hostile ways


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def bomb() -> bytes:
    """36 megapixels of zeros in about 100 KB."""
    data = io.BytesIO()
    Image.new("1", (6000, 6000)).save(data, "PNG")
    return data.getvalue()


def good() -> bytes:
    data = io.BytesIO()
    picture().save(data, "PNG")
    return data.getvalue()


HOSTILE_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "huge.png": (lambda: png_header(60000, 60000), "pixels"),
    "endless.png": (lambda: png_header(2**31 - 1, 2**31 - 1), "pixels|damaged"),
    "long.png": (lambda: png_header(100_000, 10), "pixels"),
    "bomb.png": (bomb, "pixels"),
    "empty.png": (lambda: b"", "empty"),
    "text.png": (lambda: b"I am no picture.\n" * 50, "not a picture"),
    "page.jpg": (lambda: b"<html><script>alert(1)</script></html>", "not a picture"),
    "drawing.svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "not a picture",
    ),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a picture"),
    "cut.png": (lambda: good()[:400], "damaged"),
    "broken.png": (lambda: good()[:200] + b"\0" * 60 + good()[260:], "damaged"),
}
HOSTILE_NAMES: dict[str, tuple[Any, str]] = {
    "none": ([], "no class names"),
    "one empty": (["grass", " \t", "brick"], "Class name 2 is empty"),
    "invisible": (["\u200b\u202e"], "Class name 1 is empty"),
    "twice": (["grass", "brick", " grass "], "Class names 1 and 3 are both"),
    "too many": ([f"name {i}" for i in range(10_000)], "10,000 class names"),
    "too long": (["x" * 10_000], "10,000 characters"),
    "a number": ([3], "Class name 1 is not a string"),
    "nested": ([["grass"]], "Class name 1 is not a string"),
    "a dictionary": ({"grass": 1}, "must be a list"),
    "a text": ("grass", "must be a list"),
    "nothing": (None, "must be a list"),
}


def ask(client: Client, **arguments: Any) -> Any:
    return client.predict(**{"class_names": list(CLASSES), **arguments}, api_name="/segment")


def assert_clean(message: str) -> None:
    """A readable message: no traceback, no local path, no bare exception."""
    assert message.strip().endswith((".", "?")) and len(message) < 400, message
    for leak in ("Traceback", 'File "', str(ROOT), "/tmp", "site-packages", "Error("):
        assert leak not in message, message


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files_are_answered_with_a_sentence(client: Client, tmp_path: Path, name: str) -> None:
    content, message = HOSTILE_FILES[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(AppError, match=message) as caught:
        ask(client, image=handle_file(str(tmp_path / name)))
    assert_clean(str(caught.value))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_answered_with_a_sentence(client: Client, tmp_path: Path, name: str) -> None:
    names, message = HOSTILE_NAMES[name]
    with pytest.raises(AppError, match=message) as caught:
        ask(client, image=save(tmp_path, picture()), class_names=names)
    assert_clean(str(caught.value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unseen": ["zebra"]}, "zebra.* not among"),
        ({"unseen": "grass"}, "must be a list"),
        ({"gamma": -1}, "gamma is -1"),
        ({"gamma": 1e9}, "gamma is"),
        ({"threshold": 2}, "threshold is 2"),
        ({"image": None}, "No picture yet"),
    ],
)
def test_other_wrong_arguments(client: Client, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message) as caught:
        ask(client, **{"image": save(tmp_path, picture()), **arguments})
    assert_clean(str(caught.value))


def post(served: str, image: Any, names: list[str]) -> str:
    """One raw HTTP call without the client. Returns the event of the response."""
    body = json.dumps({"data": [image, names, None, None, None, False]}).encode()
    request = urllib.request.Request(
        f"{served}gradio_api/call/segment", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{served}gradio_api/call/segment/{event}", timeout=30) as answer:
        return answer.read().decode()


def path_tricks(folder: Path) -> list[dict[str, Any]]:
    secret = folder / "secret.png"
    picture().save(secret)
    meta = {"meta": {"_type": "gradio.FileData"}}
    return [
        {"path": str(secret), **meta},
        {"path": "/etc/passwd", **meta},
        {"path": "../../../../etc/passwd", **meta},
        {"path": str(ROOT / "docs" / "overview.png"), **meta},
        {"path": str(ROOT / "config.json"), **meta},
        {"path": "", **meta},
        {"path": str(secret)},
        {"path": "http://127.0.0.1:9/picture.png", **meta},
        {"path": "https://example.com/picture.png", **meta},
        {"path": "file:///etc/passwd", **meta},
        {"path": "x", "url": "http://127.0.0.1:9/picture.png", **meta},
        {"url": f"file://{secret}", **meta},
        {"url": "data:image/png;base64,AAAA", **meta},
        {"path": os.devnull, **meta},
    ]


def test_no_path_or_address_of_a_client_is_opened(served: str, tmp_path: Path) -> None:
    for image in path_tricks(tmp_path):
        answer = post(served, image, list(CLASSES))
        assert "event: error" in answer and "event: complete" not in answer, image
        assert "Traceback" not in answer and "root:" not in answer, answer


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", str(ROOT / "app" / "app.py"), "app/app.py", "app.py"]
)
def test_no_file_of_the_machine_is_served(served: str, path: str) -> None:
    for route in ("gradio_api/file=", "file="):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{served}{route}{path}", timeout=10)
        assert caught.value.code in (403, 404)


def test_large_files_are_refused_while_they_come(client: Client, tmp_path: Path, app: ModuleType) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(good() + b"\0" * app.MAX_FILE_BYTES)
    with pytest.raises(Exception, match="maximum file size|maximum allowed size"):
        ask(client, image=handle_file(str(file)))


def test_markup_in_names_stays_text(client: Client, tmp_path: Path) -> None:
    names = [
        "<img src=x onerror=alert(1)>",
        "<b>bold</b>",
        "${alert(1)}",
        "{{value}}",
        "a\nb\x00c",
        "\u202eevil",
        "😀",
    ]
    _, _, result = ask(client, image=save(tmp_path, picture()), class_names=names)
    cleaned = [*names[:4], "a b c", "evil", "😀"]
    assert [entry["name"] for entry in result["classes"]] == cleaned
    with pytest.raises(AppError) as caught:  # the page renders messages as markup
        ask(client, image=save(tmp_path, picture()), class_names=["<b>x</b>", "<b>x</b>"])
    assert "<" not in str(caught.value)


def test_config_names_no_outside_address(served: str) -> None:
    with urllib.request.urlopen(served, timeout=10) as answer:
        page = answer.read().decode()
    for host in ("fonts.googleapis", "fonts.gstatic", "cdnjs", "unpkg", "jsdelivr", "huggingface.co/front"):
        assert host not in page.replace("https://cdnjs.cloudflare.com/ajax/libs/iframe-resizer", "iframe-resizer"), (
            host
        )
    with urllib.request.urlopen(f"{served}config", timeout=10) as answer:
        assert json.load(answer)["analytics_enabled"] is False


# ----------------------------------------------------------------------------------------------------- inside the page


def run(app: ModuleType, segmenter: Any, image: Image.Image, names: list[str], unseen: list[str]) -> Any:
    return segmenter.run(image, names, app.check_unseen(unseen, names), lambda *_: None)[0]


def test_names_from_text(app: ModuleType) -> None:
    assert app.split_names(" cat, dog ,\n\nred striped\n") == ["cat", " dog ", "red striped"]
    assert app.split_names(None) == []
    assert app.check_names(app.split_names("cat,, dog".replace(",,", ","))) == ["cat", "dog"]
    with pytest.raises(app.Refused, match="Class name 2 is empty"):
        app.check_names(app.split_names("cat,, dog"))
    with pytest.raises(app.Refused, match="characters long"):
        app.split_names("x" * 10**6)
    with pytest.raises(app.Refused, match="must be text"):
        app.split_names(5)


def test_classes_of_several_phrases(app: ModuleType, segmenter: Any) -> None:
    entries = app.split_names("sofa|couch, grass\nbackground : road| wall")
    classes = {"sofa": ["sofa", "couch"], "grass": ["grass"], "background": ["road", "wall"]}
    assert app.check_classes(entries) == classes
    result = run(app, segmenter, picture(), classes, ["background"])
    assert result.names == list(classes) and result.unseen == [False, False, True]
    assert result.outputs.class_queries_logits.shape[-1] == len(classes) + 1
    for text, message in {
        "a|a": "Phrases of “a”: Class names 1 and 2 are both “a”",
        "a|": "Phrases of “a”: Class name 2 is empty",
        "x: a|b, y: b": "“b” is in “x” and in “y”",
        "|".join(map(str, range(app.MAX_NAMES + 1))): "There are 201 phrases",
    }.items():
        with pytest.raises(app.Refused, match=re.escape(message)):
            app.check_classes(app.split_names(text))


@pytest.mark.parametrize("path", ["a\0b", 5, ["a.png"], {"path": "a.png"}], ids=str)
def test_what_is_no_path_is_refused(app: ModuleType, path: object) -> None:
    with pytest.raises(app.Refused, match="The picture must be uploaded"):
        app.open_picture(path)


def test_redraw_needs_no_network(app: ModuleType, segmenter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(app, segmenter, picture(0, (150, 97)), list(CLASSES), list(UNSEEN))
    result.shown = result.folder / "picture.png"
    monkeypatch.setattr(segmenter, "model", None)
    first = app.view_data(segmenter, result, 0.0, 0.5, False)
    second = app.view_data(segmenter, result, 10.0, 0.0, False)
    assert first["corrected"] == first["plain"] == second["plain"]
    assert second["corrected"] != second["plain"]
    for data in (first, second):
        json.dumps(data)
        assert data["width"], data["height"] == (150, 97)
        for reading in (data["plain"], data["corrected"]):
            coverages = [coverage for _, coverage, _ in reading["rows"]]
            assert coverages == sorted(coverages, reverse=True) and sum(coverages) == pytest.approx(1)
    grey = app.view_data(segmenter, result, 0.0, 0.5, True)
    assert {row[0] for row in grey["plain"]["rows"]} <= set(range(len(CLASSES) + 1))


def test_segments_are_the_processors(app: ModuleType) -> None:
    segmenter = app.Segmenter(str(ROOT))
    example = json.loads((APP / "examples" / "examples.json").read_text(encoding="utf-8"))[0]
    with Image.open(APP / "examples" / example["file"]) as image:
        result = run(app, segmenter, image, example["classes"], example["unseen"])
    for kind, task in app.SEGMENTS.items():
        post_process = getattr(segmenter.processor, f"post_process_{task}_segmentation")
        size = [result.size]
        expected = post_process(result.outputs, 0.4, target_sizes=size, gamma=1.0, correction_threshold=0.6)[0]
        segments = segmenter.read_segments(result, kind, 0.4, 1.0, 0.6)
        assert len(segments) == len(expected["segments_info"]) > 0
        for (mask, text), info in zip(segments, expected["segments_info"]):
            assert np.array_equal(mask, expected["segmentation"] == info["id"])
            assert text == f"{result.names[info['label_id']]} ({info['score']:.0%})"
        with pytest.raises(app.Refused, match="No segment reaches this score"):
            segmenter.read_segments(result, kind, 1.0, 1.0, 0.6)


def test_sharper_borders(app: ModuleType, tmp_path: Path) -> None:
    segmenter = app.Segmenter(str(ROOT))
    example = json.loads((APP / "examples" / "examples.json").read_text(encoding="utf-8"))[0]
    with Image.open(APP / "examples" / example["file"]) as image:
        image = image.convert("RGB")
    result = run(app, segmenter, image, example["classes"], example["unseen"])
    result.shown = tmp_path / "shown.png"
    image.save(result.shown)
    post_process = segmenter.processor.post_process_semantic_segmentation
    options = {"gamma": 1.0, "threshold": 0.6}
    expected = post_process(result.outputs, [result.size], images=[image], **options)[0].numpy()
    reading = segmenter.read(result, result.size, 1.0, 0.6, False, sharp=True)
    assert np.array_equal(reading.labels, expected)
    assert not np.array_equal(segmenter.read(result, result.size, 1.0, 0.6, False).labels, expected)
    plain, sharp = (app.view_data(segmenter, result, 1.0, 0.6, False, value) for value in (False, True))
    assert plain["corrected"] != sharp["corrected"] and plain["plain"] != sharp["plain"]


def test_a_painted_example_is_one_more_class(app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    segmenter = app.Segmenter(str(ROOT))
    scene, painted = draw_scene(0, "validation", 3), io.BytesIO()
    class_id = int(np.bincount(scene.label[scene.label < 64]).argmax())  # a thing
    paint = np.zeros((*scene.label.shape, 4), np.uint8)
    paint[scene.label == class_id] = 255
    Image.fromarray(paint).save(painted, "PNG")
    background = io.BytesIO()
    Image.fromarray(scene.image).save(background, "PNG")
    sketch = app.Sketch(render=False)
    files = [sketch.convert_and_format_image(data.getvalue()) for data in (background, painted)]
    exemplar = segmenter.read_exemplar({"background": files[0], "layers": files[1:]})
    maps = np.where(scene.label == class_id, 0, 255)
    inputs = segmenter.processor(images=scene.image, segmentation_maps=maps, return_tensors="pt")
    anchors = segmenter.model.class_text_embeds
    expected = segmenter.model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"], anchors=anchors)
    torch.testing.assert_close(exemplar, (inputs["pixel_values"], inputs["mask_labels"][0]))
    for classes in ({"grass": ["grass"]}, {"ground": ["grass", "sand"], "water": ["water"]}, {}):
        unseen = [False] * len(classes)
        image = Image.fromarray(scene.image)
        result = segmenter.run(image, classes, unseen, lambda *_: None, exemplar)[0]
        assert result.names == [app.EXAMPLE_NAME, *classes] and result.unseen == [True, *unseen]
        labels = segmenter.read(result, result.size, 0.0, 0.7, True).labels
        assert (labels[scene.label == class_id] == 0).mean() > 0.5
        logits = result.outputs.class_queries_logits
        features = segmenter.processor(images=image, return_tensors="pt")
        names = [segmenter.model.get_text_prototypes(segmenter.processor, classes)] if classes else []
        copies = expected[:, None].expand(-1, 2, -1) if "ground" in classes else expected
        features["text_prototypes"] = torch.cat([copies, *names])
        features["seen_class_mask"] = torch.tensor([False] + [True] * len(classes))
        with torch.no_grad():
            torch.testing.assert_close(logits, segmenter.model(**features).class_queries_logits)
    with pytest.raises(app.Refused, match="Nothing is painted"):
        segmenter.read_exemplar({"background": files[0], "layers": []})
    with pytest.raises(app.Refused, match="No picture yet"):
        segmenter.read_exemplar(None)
    broken = sketch.convert_and_format_image(painted.getvalue()[:200])
    with pytest.raises(app.Refused, match="cannot be read"):
        segmenter.read_exemplar({"background": files[0], "layers": [broken]})


def test_runs_hold_the_label_map(app: ModuleType) -> None:
    import base64

    labels = np.random.default_rng(0).integers(0, 3, (17, 23)).astype(np.uint8)
    encoded = app.encode_runs(labels)
    ids = np.frombuffer(base64.b64decode(encoded["ids"]), np.uint8)
    runs = np.frombuffer(base64.b64decode(encoded["runs"]), "<u4")
    np.testing.assert_array_equal(np.repeat(ids, runs).reshape(labels.shape), labels)


def test_memory_of_results_is_bounded(app: ModuleType, segmenter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [run(app, segmenter, picture(i), list(CLASSES), []) for i in range(4)]
    monkeypatch.setattr(app, "KEPT_BYTES", 2 * results[0].num_bytes)
    for result in results:
        segmenter.keep(result)
    assert [result.outputs is None for result in results] == [True, True, False, False]
    for read in (
        lambda: segmenter.read(results[0], (8, 8), 0.0, 0.5, False),
        lambda: segmenter.read_segments(results[0], "Instances", 0.5, 0.0, 0.5),
        lambda: segmenter.read_unseen_map(results[0]),
    ):
        with pytest.raises(app.Refused, match="Press Segment again"):
            read()
    folder = results[-1].folder
    assert folder.is_dir()
    result = None
    results.clear()
    assert result is None and not folder.exists(), "files go with their result"


def test_moving_a_slider_of_a_dropped_result_says_so(
    app: ModuleType, segmenter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, result = app.Page(segmenter), run(app, segmenter, picture(), list(CLASSES), list(UNSEEN))
    read = segmenter.read

    def read_and_drop(*arguments: Any) -> Any:
        reading = read(*arguments)
        result.outputs = None
        return reading

    monkeypatch.setattr(segmenter, "read", read_and_drop)
    for when in ("meanwhile", "before"):
        with pytest.raises(app.gr.Error, match="Press Segment again"):
            page.redraw(result, 1.0, 0.5, False, False)
        assert result.outputs is None, when


def test_downloads_belong_to_the_newest_settings(
    app: ModuleType, segmenter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REST", 0)
    page, result = app.Page(segmenter), run(app, segmenter, picture(), list(CLASSES), list(UNSEEN))
    old, new = (0.0, 0.5, False, False), (10.0, 0.0, True, False)
    read, written = segmenter.read, []

    def prepare(settings: tuple[Any, ...]) -> Any:
        result.settings = settings
        return page.prepare_downloads(result, *settings)

    def slow_read(*arguments: Any) -> Any:
        """Another slider moves, and its files are written, before this read-out ends."""
        monkeypatch.setattr(segmenter, "read", read)
        reading = read(*arguments)
        written.extend(update["value"] for update in prepare(new))
        return reading

    monkeypatch.setattr(segmenter, "read", slow_read)
    assert prepare(old) == app.gr.skip(), "the older call leaves the newer files on the page"
    again = [update["value"] for update in prepare(old)]
    for files, (gamma, *_) in ((written, new), (again, old)):
        assert [Path(file).name for file in files] == ["labels.png", "segmentation.json"]
        assert json.loads(Path(files[1]).read_text(encoding="utf-8"))["gamma"] == gamma
    result = None
    assert not Path(written[0]).exists(), "files go with their result"


def test_only_unforeseen_errors_are_internal(app: ModuleType) -> None:
    @app.answering
    def fail(error: Exception) -> None:
        raise error

    quota = app.gr.Error("You have exceeded your GPU quota.")
    with pytest.raises(app.gr.Error) as caught:
        fail(quota)
    assert caught.value is quota
    with pytest.raises(app.gr.Error, match="Internal error"):
        fail(RuntimeError("secret"))


def upload_sketch(sketch: Any, key: str, index: Any = "0", content: bytes = b"picture") -> None:
    data = {"type": "layer", "index": index, "id": key}
    sketch.accept_blobs(SimpleNamespace(data=data, files=[("layer.png", content)]))


def test_sketches_are_limited(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_FILE_BYTES", 2**20)
    monkeypatch.setattr(app, "SKETCH_BYTES", 3 * 2**20)
    sketch = app.Sketch(render=False)
    for index in ("8", "100000000", "-1", "1.5", "x", "9" * 5000, 8, [0]):
        with pytest.raises(app.HTTPException, match="expected a whole number from 0 to 7") as caught:
            upload_sketch(sketch, "key", index)
        assert_clean(caught.value.detail)
    with pytest.raises(app.HTTPException, match="larger than 1 MB"):
        upload_sketch(sketch, "key", content=b"x" * (2**20 + 1))
    assert not sketch.blob_storage
    for index in ("null", None, "", "0", "7", 3):
        upload_sketch(sketch, "key", index)
    assert [layer is None for layer in sketch.blob_storage["key"].layers] == [i not in (0, 3, 7) for i in range(8)]
    for number in range(app.MAX_SKETCHES):
        upload_sketch(sketch, str(number))
    assert list(sketch.blob_storage) == [str(number) for number in range(app.MAX_SKETCHES)], "the oldest goes first"
    for number in range(4):
        upload_sketch(sketch, f"large {number}", content=b"x" * 2**20)
    assert list(sketch.blob_storage) == ["large 1", "large 2", "large 3"]


def test_sketches_over_http_are_limited(served: str) -> None:
    components = httpx.get(f"{served}config").json()["components"]
    sketch = next(each for each in components if each["props"].get("elem_id") == "az-example")
    assert "accept_blobs" in sketch["props"]["server_fns"]
    fields = {"component_id": sketch["id"], "session_hash": "x", "fn_name": "accept_blobs", "type": "layer", "id": "x"}
    for index, accepted in (("0", True), ("100", False)):
        answer = httpx.post(
            f"{served}gradio_api/component_server",
            data={**fields, "index": index},
            files={"file": ("layer.png", b"picture")},
        )
        assert answer.status_code == (200 if accepted else 400)
    assert "expected a whole number from 0 to 7" in answer.json()["detail"]


def test_sketches_that_no_event_reads_are_deleted(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with app.gr.Blocks() as demo:
        sketch = app.Sketch()
    file = Path(sketch.convert_and_format_image(b"picture"))
    assert file.read_bytes() == b"picture"
    delete_files_created_by_app(demo, age=None)
    assert not file.exists()


def test_a_checkpoint_without_correction_works(app: ModuleType, tmp_path: Path) -> None:
    segmenter = app.Segmenter(str(tiny_checkpoint(tmp_path / "plain", bias_correction=False)))
    result = run(app, segmenter, picture(), list(CLASSES), list(UNSEEN))
    result.shown = result.folder / "picture.png"
    data = app.view_data(segmenter, result, 5.0, 0.5, False)
    assert data["corrected"] == data["plain"] and data["unseen_map"] is None and "no effect" in data["hint"]
    app.build(segmenter)


def test_confidences_of_a_convolutional_tower_are_shares(app: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="convolutional towers need timm")
    segmenter = app.Segmenter(str(tiny_checkpoint(tmp_path / "cells", **tower_config())))
    result = run(app, segmenter, picture(), list(CLASSES), [])
    reading = segmenter.read(result, result.size, 0.0, 0.5, False)
    mean = sum(coverage * confidence for _, coverage, confidence in reading.rows)
    assert 0.95 / len(CLASSES) < mean <= 1, "the best of the classes has at least an equal share"


def test_all_classes_unseen(app: ModuleType, segmenter: Any) -> None:
    result = run(app, segmenter, picture(), list(CLASSES), list(CLASSES))
    reading = segmenter.read(result, result.size, 1.0, 0.5, False)
    assert np.isfinite([row[1:] for row in reading.rows]).all()


# ------------------------------------------------------------------------------------------------------- the folder


def test_examples_are_scenes_of_the_test_split_with_unseen_classes(app: ModuleType) -> None:
    examples = app.load_examples(SCENE_CLASSES)
    assert len(examples) >= 6
    for example in examples:
        index = int(Path(example["file"]).stem.removeprefix("scene_"))
        scene = draw_scene(0, "test", index)
        with Image.open(APP / "examples" / example["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), scene.image)
        assert set(scene.classes) <= set(example["classes"])
        assert set(example["unseen"]) & set(scene.classes)
        assert app.check_names(example["classes"]) == example["classes"]


def test_examples_of_other_checkpoints_are_photographs_with_credits(app: ModuleType) -> None:
    examples = app.load_examples(["person", "sky"])
    assert len(examples) >= 4
    for example in examples:
        with Image.open(APP / "examples" / example["file"]) as image:
            assert image.format == "JPEG" and max(image.size) <= 640
        assert app.check_names(example["classes"]) == example["classes"] and not example["unseen"]
        assert re.search(r" by .+, (CC0|CC BY 2\.0|public domain)$", example["credit"])


def test_default_model(app: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNZEG_MODEL", "someone/model")
    assert app.default_model() == "someone/model"
    monkeypatch.delenv("ALIGNZEG_MODEL")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "README.md").write_text((APP / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(app, "HERE", tmp_path / "app")
    assert "/" in app.default_model() and not app.default_model().startswith("/")
    for folder in (tmp_path, tmp_path / "checkpoints" / "photos"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "alignzeg"}', encoding="utf-8")
        assert app.default_model() == str(folder)


def test_space_front_matter() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the demo as a Space needs huggingface_hub")
    card = huggingface_hub.SpaceCard.load(APP / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and card.data.license == "apache-2.0"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={card.data.sdk_version}" in pinned


def test_a_wrong_model_is_one_sentence(app: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be loaded") as caught:
        app.main(["--model", str(tmp_path / "nothing")])
    assert caught.value.code != 0


def test_a_clip_is_not_a_checkpoint(tmp_path: Path) -> None:
    """A CLIP with twelve layers fits AlignZegConfig's defaults, and would get random weights everywhere."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(ValueError, match="its `model_type` is 'clip'; to build on a CLIP"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "alignzeg", "num_attention_heads": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded as an AlignZeg checkpoint .*num_attention_heads"):
        load_config(tmp_path)


def test_mcp_needs_its_package(app: ModuleType, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda self, **options: started.append(options))
    find_spec, found = importlib.util.find_spec, None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "mcp" else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit, match=r"--mcp needs the package mcp.*pip install 'gradio\[mcp\]'"):
        app.main(["--model", str(checkpoint), "--mcp"])
    assert not started
    found = find_spec("json")
    app.main(["--model", str(checkpoint), "--mcp"])
    app.main(["--model", str(checkpoint)])
    assert [options["mcp_server"] for options in started] == [True, False]


def test_zerogpu_gets_the_network_with_what_can_be_pickled(
    app: ModuleType, segmenter: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        """As on ZeroGPU, arguments and results are passed between processes."""

        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))

        return call

    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=on_gpu))
    zero = app.Segmenter(str(checkpoint))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    file, sketch = io.BytesIO(), app.Sketch(render=False)
    picture(1).convert("RGBA").save(file, "PNG")
    painted = sketch.convert_and_format_image(file.getvalue())
    with monkeypatch.context() as patch:
        patch.setattr(zero, "model", None)  # which has a GPU only in the other process
        exemplar = zero.read_exemplar({"background": painted, "layers": [painted]})
    arguments = (picture(), ["grass", "brick"], [False, True], lambda *_: None)
    for number, example in enumerate((None, exemplar), 1):
        results = [each.run(*arguments, example)[0] for each in (zero, segmenter)]
        assert len(calls) == number
        tables = [result.outputs.class_queries_logits for result in results]
        assert torch.equal(*tables)


# ------------------------------------------------------------------------------------------------------- the long run


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[DemoServer]:
    with serve_demo(checkpoint, tmp_path / "server") as running:
        yield running


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_two_hundred_calls_of_eight_clients_among_sixty_hostile_ones(
    server: DemoServer, checkpoint: Path, tmp_path: Path
) -> None:
    images = [picture(i, (40 + 13 * i, 90 - 7 * i)) for i in range(8)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    expected = [expected_labels(checkpoint, image) for image in images]
    for name, (content, _) in HOSTILE_FILES.items():
        (tmp_path / name).write_bytes(content())
    tricks = path_tricks(tmp_path)
    hostile = [("file", name) for name in HOSTILE_FILES] + [("names", name) for name in HOSTILE_NAMES]
    hostile += [("path", trick) for trick in tricks] + [("markup", None)]
    hostile = (hostile * 2)[:60]

    def valid(client: Client, index: int) -> None:
        labels, _, _ = ask(client, image=handle_file(str(tmp_path / f"{index}.png")), unseen=list(UNSEEN))
        with Image.open(labels) as label:
            np.testing.assert_array_equal(np.asarray(label), expected[index])

    def attack(client: Client, kind: str, what: Any) -> None:
        if kind == "path":
            answer = post(server.url, what, list(CLASSES))
            assert "event: error" in answer and "Traceback" not in answer, (what, answer)
            return
        if kind == "markup":
            _, _, result = ask(
                client, image=handle_file(str(tmp_path / "0.png")), class_names=["<script>x</script>", "a"]
            )
            assert result["classes"][0]["name"] == "<script>x</script>"
            return
        arguments = {"image": handle_file(str(tmp_path / (what if kind == "file" else "0.png")))}
        if kind == "names":
            arguments["class_names"] = HOSTILE_NAMES[what][0]
        with pytest.raises(
            AppError, match=HOSTILE_FILES[what][1] if kind == "file" else HOSTILE_NAMES[what][1]
        ) as caught:
            ask(client, **arguments)
        assert_clean(str(caught.value))

    def work(worker: int) -> tuple[int, int]:
        client = Client(server.url, verbose=False)
        mine = hostile[worker::8]
        for number in range(25):
            valid(client, (worker + number) % 8)
            if number % 3 == 0 and mine:
                attack(client, *mine.pop())
        return 25, len(hostile[worker::8]) - len(mine)

    def storm() -> tuple[int, int]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(work, range(8)))
        return sum(good for good, _ in counts), sum(bad for _, bad in counts)

    storm()  # warm up allocator, caches and sessions
    before, started = server.resident_megabytes, time.monotonic()
    assert storm() == (200, 60)
    seconds, after = time.monotonic() - started, server.resident_megabytes
    print(f"\n200 valid and 60 hostile calls in {seconds:.0f} s; memory {before:.0f} MB, then {after:.0f} MB")
    assert after - before < 40, "memory grows"
    assert server.process.poll() is None
    assert "failed" not in server.log, "an error that was not foreseen"
