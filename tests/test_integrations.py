# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The zoo model of FiftyOne and the ML backend of Label Studio give the model's label maps.

Most tests run twice: with a stand-in for the host's package, and with the package if it is installed.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, picture, tiny_checkpoint

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from zeroshot.checkpoints import install_as_root


ROOT = Path(__file__).resolve().parent.parent
INTEGRATIONS = ROOT / "app" / "integrations"
NAMES = ["grass", "brick", "a red thing", "wood"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("integrations") / "tiny", seed=8)


@pytest.fixture(scope="module")
def segment_by_hand(checkpoint: Path) -> Any:
    """A function from an image, names and options of the read-out to a label map, int64 (height, width)."""
    model, processor = AlignZegModel.from_pretrained(checkpoint), AlignZegProcessor.from_pretrained(checkpoint)

    @torch.no_grad()
    def segment(image: Image.Image, names: Any = None, unseen: Any = (), **readout: Any) -> np.ndarray:
        arguments = {}
        if names is not None:
            arguments["text_prototypes"] = model.get_text_prototypes(processor, names)
            arguments["seen_class_mask"] = torch.tensor([name not in unseen for name in names])
        outputs = model(**processor(images=image, return_tensors="pt"), **arguments)
        sizes = [(image.height, image.width)]
        return processor.post_process_semantic_segmentation(outputs, target_sizes=sizes, **readout)[0].numpy()

    return segment


def load_module(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a folder on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- FiftyOne


def real_fiftyone() -> ModuleType:
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "1")
    return pytest.importorskip("fiftyone", reason="needs FiftyOne: pip install fiftyone")


@pytest.fixture(params=["stand-in", "fiftyone"])
def zoo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the zoo model."""
    if request.param == "stand-in":
        stand_in = ModuleType("fiftyone")
        stand_in.Model, stand_in.Segmentation = object, SimpleNamespace
        monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    else:
        real_fiftyone()
    monkeypatch.delenv("ALIGNZEG_MODEL", raising=False)
    return load_module("alignzeg_zoo", INTEGRATIONS / "fiftyone" / "__init__.py", monkeypatch)


def load_zoo_model(zoo: ModuleType, checkpoint: Path, **options: Any) -> Any:
    return zoo.load_model("alignzeg-photos", f"{checkpoint}.zip", device="cpu", **options)


def test_fiftyone_masks_are_label_maps(zoo: ModuleType, checkpoint: Path, segment_by_hand: Any) -> None:
    images = [picture(0), picture(3, (40, 56)), picture(5)]
    model = load_zoo_model(zoo, checkpoint, classes=NAMES)
    expected = [segment_by_hand(image, NAMES) + 1 for image in images]
    masks = [found.mask for found in model.predict_all(np.asarray(image) for image in images)]
    for image, mask, label_map in zip(images, masks, expected):
        assert mask.dtype == np.uint8 and mask.shape == (image.height, image.width)
        np.testing.assert_array_equal(mask, label_map)
        np.testing.assert_array_equal(model.predict(np.asarray(image)).mask, label_map)
    assert len({value for label_map in expected for value in np.unique(label_map)}) > 1, "else the test shows little"
    assert model.mask_targets == {1: "grass", 2: "brick", 3: "a red thing", 4: "wood"}
    assert model.predict_all([]) == [] and model.media_type == "image" and not model.ragged_batches


def test_fiftyone_options(zoo: ModuleType, checkpoint: Path, segment_by_hand: Any) -> None:
    image = picture(3)

    def predict(**options: Any) -> np.ndarray:
        return load_zoo_model(zoo, checkpoint, **options).predict(np.asarray(image)).mask

    stored = load_zoo_model(zoo, checkpoint)
    assert stored.mask_targets == dict(enumerate(CLASSES, start=1))
    np.testing.assert_array_equal(predict(), segment_by_hand(image) + 1)
    correction = {"gamma": 50.0, "threshold": 0.0}
    corrected = segment_by_hand(image, NAMES, unseen=["brick"], **correction) + 1
    np.testing.assert_array_equal(predict(classes=NAMES, unseen_classes=["brick"], **correction), corrected)
    assert (corrected != predict(classes=NAMES)).any()
    with_none = predict(classes=NAMES, none_of_these=True)
    np.testing.assert_array_equal(with_none, segment_by_hand(image, NAMES, none_of_these=True) + 1)
    phrases = {"plants": ["grass", "wood"], "brick": ["brick"]}
    np.testing.assert_array_equal(predict(classes=phrases), segment_by_hand(image, phrases) + 1)
    many = [f"thing {index}" for index in range(300)]
    assert predict(classes=many).dtype == np.uint16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "cat, dog"}, "`classes` is 'cat, dog', a string; expected a list"),
        ({"classes": []}, "no class names"),
        ({"classes": ["cat", "cat"]}, "both 'cat'"),
        ({"classes": ["cat"], "unseen_classes": ["dog"]}, "`unseen_classes` contains 'dog'"),
        ({"classes": ["cat"], "none_of_these": "yes"}, "`none_of_these` is 'yes'; expected True or False"),
    ],
)
def test_fiftyone_rejects_bad_options(zoo: ModuleType, checkpoint: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_zoo_model(zoo, checkpoint, **options)


def test_fiftyone_rejects_what_it_cannot_use(zoo: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    model = load_zoo_model(zoo, checkpoint)
    for image, kind in (
        ("cat.jpg", "a str"),
        (np.zeros((8, 8), np.uint8), r"uint8 array of shape \(8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), "float32 array"),
    ):
        with pytest.raises(ValueError, match=rf"`args\[1\]` is .*{kind}.*expected a uint8 array"):
            model.predict_all([np.zeros((8, 8, 3), np.uint8), image])
    with pytest.raises(ValueError, match="`model_name` is 'other'; expected one of alignzeg-photos"):
        zoo.load_model("other", f"{checkpoint}.zip")
    with pytest.raises(ValueError, match="not downloaded"):
        zoo.load_model("alignzeg-photos", str(tmp_path / "none.zip"))
    with pytest.raises(ValueError, match="`device` is 'none', which cannot be used"):
        zoo.load_model("alignzeg-photos", f"{checkpoint}.zip", device="none")


def test_fiftyone_downloads_from_a_folder_or_hub_id(
    zoo: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "zoo" / "alignzeg-photos"
    target.parent.mkdir()
    with pytest.raises(
        ValueError, match="contains no URL, because this folder was copied by hand; set ALIGNZEG_MODEL"
    ):
        zoo.download_model("alignzeg-photos", f"{target}.zip")
    monkeypatch.setenv("ALIGNZEG_MODEL", str(checkpoint))
    for _ in range(2):  # the second time, the folder is replaced
        zoo.download_model("alignzeg-photos", f"{target}.zip")
        assert load_zoo_model(zoo, target, classes=NAMES).classes == NAMES
        assert [path.name for path in target.parent.iterdir()] == ["alignzeg-photos"]

    def copy(model_id: str, local_dir: Path) -> Path:
        if model_id != "user/model":
            raise OSError("404")
        return shutil.copytree(checkpoint, local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", copy)
    shutil.rmtree(target)
    monkeypatch.setenv("ALIGNZEG_MODEL", "user/model")
    zoo.download_model("alignzeg-photos", f"{target}.zip")
    assert (target / "config.json").is_file()
    for source, message in (("user/none", "no such folder, and the Hub does not"), (str(tmp_path), "no config.json")):
        monkeypatch.setenv("ALIGNZEG_MODEL", source)
        with pytest.raises(ValueError, match=message):
            zoo.download_model("alignzeg-photos", f"{target}.zip")
        assert (target / "config.json").is_file(), "a failed download keeps what was there"
        assert [path.name for path in target.parent.iterdir()] == ["alignzeg-photos"]


@pytest.mark.parametrize("code", ["folder", "link"])
def test_fiftyone_copies_only_the_checkpoint_of_a_clone(
    code: str, zoo: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    if code == "folder":
        shutil.copytree(ROOT / "modeling_alignzeg", clone / "modeling_alignzeg")
    else:
        (clone / "modeling_alignzeg").symlink_to(ROOT / "modeling_alignzeg")
    install_as_root(checkpoint, clone)
    for name in (".git/HEAD", ".venv/pyvenv.cfg", "runs/a/model.safetensors", "Makefile", "README.md", "data.tar"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    target = tmp_path / "zoo" / "alignzeg-photos"
    target.parent.mkdir()
    monkeypatch.setenv("ALIGNZEG_MODEL", str(clone))
    zoo.download_model("alignzeg-photos", f"{target}.zip")
    weights = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in target.iterdir()} == weights | {"README.md", "modeling_alignzeg"}
    copied = {path.name for path in (target / "modeling_alignzeg").iterdir()}
    assert copied == {path.name for path in (ROOT / "modeling_alignzeg").glob("*.py")}
    shutil.rmtree(clone)  # the copy needs nothing of it
    assert load_zoo_model(zoo, target, classes=NAMES).classes == NAMES


def test_fiftyone_manifest_matches_the_repository(zoo: ModuleType) -> None:
    manifest = json.loads(zoo.MANIFEST.read_text(encoding="utf-8"))
    assert "url" not in manifest, "FiftyOne adds it"
    assert {model["base_name"] for model in manifest["models"]} == set(zoo.CHECKPOINTS)
    for model in manifest["models"]:
        folder = ROOT / zoo.CHECKPOINTS[model["base_name"]]
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        assert model["size_bytes"] == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("kind", ["archive", "GitHub"])
def test_fiftyone_registers_the_repository_as_a_source(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_by_hand: Any
) -> None:
    fo = real_fiftyone()
    import fiftyone.zoo as foz
    from fiftyone.utils.github import GitHubRepository

    monkeypatch.delenv("ALIGNZEG_MODEL", raising=False)
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    files, clone = tmp_path / "files", tmp_path / "clone"
    files.mkdir()
    clone.mkdir()
    (clone / "modeling_alignzeg").symlink_to(ROOT / "modeling_alignzeg")
    install_as_root(checkpoint, clone)
    with zipfile.ZipFile(files / "alignzeg.zip", "w") as archive:
        for file in clone.glob("*.*"):
            archive.write(file, f"alignzeg-1/checkpoints/photos/{file.name}")
        # Unpacking turns a link into a file with this text.
        archive.writestr("alignzeg-1/checkpoints/photos/modeling_alignzeg", "../../modeling_alignzeg")
        for folder, inside in ((ROOT / "modeling_alignzeg", ""), (INTEGRATIONS / "fiftyone", "app/integrations/")):
            for file in folder.glob("*.*"):
                archive.write(file, f"alignzeg-1/{inside}{folder.name}/{file.name}")

    def download(repository: Any, folder: str) -> None:
        assert repository.identifier == "user/alignzeg/branch"
        zipfile.ZipFile(files / "alignzeg.zip").extractall(folder)

    monkeypatch.setattr(GitHubRepository, "download", download)
    with served(files) as address:
        url = f"{address}/alignzeg.zip" if kind == "archive" else "https://github.com/user/alignzeg/tree/branch"
        foz.register_zoo_model_source(url)
        assert foz.list_zoo_model_sources() == [url]
        assert "alignzeg-photos" in foz.list_zoo_models(tags=["semantic-segmentation", "zero-shot"])
        model = foz.load_zoo_model("alignzeg-photos", classes=NAMES, device="cpu", cache=False)
    assert foz.is_zoo_model_downloaded("alignzeg-photos")
    image = picture(3)
    found = model.predict(np.asarray(image))
    assert isinstance(model, fo.Model) and isinstance(found, fo.Segmentation)
    np.testing.assert_array_equal(found.mask, segment_by_hand(image, NAMES) + 1)
    foz.delete_zoo_model("alignzeg-photos")
    assert not foz.is_zoo_model_downloaded("alignzeg-photos")


@pytest.mark.skipif("FIFTYONE_DATABASE_URI" not in os.environ, reason="needs MongoDB: set FIFTYONE_DATABASE_URI")
@pytest.mark.parametrize("zoo", ["fiftyone"], indirect=True)
def test_fiftyone_applies_the_model_to_a_dataset(
    zoo: ModuleType, checkpoint: Path, tmp_path: Path, segment_by_hand: Any
) -> None:
    fo = real_fiftyone()
    images = [picture(0), picture(3, (40, 56)), picture(5)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    model = load_zoo_model(zoo, checkpoint, classes=NAMES)
    dataset = fo.Dataset()
    dataset.add_samples([fo.Sample(filepath=str(tmp_path / f"{name}.png")) for name in (0, 1, 2, "broken")])
    for field, batch_size in (("alignzeg", None), ("batches", 3)):
        dataset.apply_model(model, label_field=field, batch_size=batch_size)
        dataset.mask_targets[field] = model.mask_targets
        dataset.save()
        found = dataset.values(f"{field}.mask")
        for image, mask in zip(images, found):
            np.testing.assert_array_equal(mask, segment_by_hand(image, NAMES) + 1)
        assert found[3] is None
    dataset.reload()
    assert dataset.mask_targets["alignzeg"] == model.mask_targets


# --- Label Studio


class StandInBase:
    """What the backend uses of `LabelStudioMLBase`."""

    def __init__(self, project_id: str | None = None, label_config: str | None = None):
        self.label_config, self.parsed_label_config, self.values = label_config, {}, {}
        root = ElementTree.fromstring(label_config or "<View/>")
        tags = {tag.get("name"): tag for tag in root.iter() if tag.get("name")}
        for name, tag in tags.items():
            if tag.get("toName"):
                source = tags[tag.get("toName")]
                labels = {label.get("alias") or label.get("value"): dict(label.attrib) for label in tag.iter("Label")}
                self.parsed_label_config[name] = {
                    "type": tag.tag,
                    "to_name": [tag.get("toName")],
                    "inputs": [{"type": source.tag, "value": source.get("value").lstrip("$")}],
                    "labels": list(labels),
                    "labels_attrs": labels,
                }
        self.setup()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value


@pytest.fixture(params=["stand-in", "label_studio_ml"])
def studio(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path
) -> Iterator[ModuleType]:
    """The module of the backend, with the tiny checkpoint; URLs are paths."""
    start_method = multiprocessing.get_start_method(allow_none=True)
    if request.param == "stand-in":
        base = SimpleNamespace(LabelStudioMLBase=StandInBase)
        brush = SimpleNamespace(
            mask2rle=lambda mask: np.repeat(mask.ravel(), 4).tolist(), decode_rle=lambda rle: np.array(rle, np.uint8)
        )
        modules = {"label_studio_ml.model": base, "label_studio_sdk.converter": SimpleNamespace(brush=brush)}
        for name, module in modules.items():
            package = name.partition(".")[0]
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
            monkeypatch.setitem(sys.modules, name, module)
    else:
        monkeypatch.setenv("MODEL_DIR", str(tmp_path))  # of the file with its cache, written when it is imported
        reason = "needs the ML backend of Label Studio: see docs/integrations.md"
        pytest.importorskip("label_studio_ml.model", reason=reason, exc_type=ImportError)
        pytest.importorskip("label_studio_sdk.converter.brush", reason=reason, exc_type=ImportError)
    monkeypatch.setenv("ALIGNZEG_MODEL", str(checkpoint))
    module = load_module("alignzeg_backend", INTEGRATIONS / "label_studio" / "model.py", monkeypatch)
    monkeypatch.setattr(module.AlignZegBackend, "get_local_path", lambda self, url, **options: url, raising=False)
    yield module
    multiprocessing.set_start_method(start_method, force=True)  # label_studio_ml changes it


CONFIG = """<View>
  <Image name="photo" value="$picture"/>
  <Choices name="kind" toName="photo"><Choice value="day"/></Choices>
  <BrushLabels name="mask" toName="photo">
    <Label value="grass" alias="Wiese"/>
    <Label value="brick"/>
    <Label value="Things  to find" predicted_values="a red thing, wood,"/>
  </BrushLabels>
</View>"""
PHRASES = {"Wiese": ["grass"], "brick": ["brick"], "Things  to find": ["a red thing", "wood"]}


def backend_of(studio: ModuleType, config: str | None = CONFIG, project: str = "1") -> Any:
    try:
        return studio.AlignZegBackend(project_id=project, label_config=config)
    except TypeError:  # label-studio-ml 1
        return studio.AlignZegBackend(label_config=config)


def decoded(studio: ModuleType, prediction: dict[str, Any], names: list[str]) -> np.ndarray:
    """One map of positions in `names`, -1 where there is no region; regions must not overlap."""
    label_map = None
    for result in prediction["result"]:
        height, width = result["original_height"], result["original_width"]
        label_map = np.full((height, width), -1) if label_map is None else label_map
        channels = studio.brush.decode_rle(result["value"]["rle"]).reshape(height, width, 4)
        assert set(np.unique(channels)) <= {0, 255} and (channels == channels[..., :1]).all()
        (name,) = result["value"]["brushlabels"]
        assert (label_map[channels[..., 3] > 0] == -1).all() and channels.any()
        label_map[channels[..., 3] > 0] = names.index(name)
    return label_map


def test_label_studio_regions_are_label_maps(studio: ModuleType, tmp_path: Path, segment_by_hand: Any) -> None:
    sizes = [(48, 40), (40, 57)]
    tasks = []
    for index, size in enumerate(sizes):
        picture(index, size).save(tmp_path / f"{index}.png")
        tasks.append({"id": index, "data": {"picture": str(tmp_path / f"{index}.png")}})
    predictions = backend_of(studio).predict(tasks, context={})
    assert json.loads(json.dumps(predictions)) == predictions and len(predictions) == 2
    for index, (size, prediction) in enumerate(zip(sizes, predictions)):
        names = list(PHRASES)
        expected = segment_by_hand(picture(index, size), PHRASES)
        np.testing.assert_array_equal(decoded(studio, prediction, names), expected)
        results = prediction["result"]
        assert [result["value"]["brushlabels"] for result in results] == [[names[i]] for i in np.unique(expected)]
        for result in results:
            assert (result["from_name"], result["to_name"], result["type"]) == ("mask", "photo", "brushlabels")
            assert (result["original_width"], result["original_height"]) == size and result["image_rotation"] == 0
            assert 0 <= result["score"] <= 1 and result["value"]["format"] == "rle"
        assert len({result["id"] for result in results}) == len(results)
        assert prediction["score"] == pytest.approx(np.mean([result["score"] for result in results]))
        assert prediction["model_version"] == "alignzeg-tiny"
    assert max(len(prediction["result"]) for prediction in predictions) > 1, "else the test shows little"


def test_label_studio_shows_upright_images(studio: ModuleType, tmp_path: Path, segment_by_hand: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a browser rotates it by 90 degrees
    upright = picture(3).transpose(Image.Transpose.ROTATE_270)
    picture(3).save(tmp_path / "turned.png", exif=exif)
    task = {"id": 1, "data": {"picture": str(tmp_path / "turned.png")}}
    (prediction,) = backend_of(studio).predict([task])
    np.testing.assert_array_equal(decoded(studio, prediction, list(PHRASES)), segment_by_hand(upright, PHRASES))


def test_label_studio_skips_unreadable_images(
    studio: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    tasks = [
        {"id": name, "data": {"picture": str(tmp_path / f"{name}.png")}} for name in ("bad", "text", "none", "good")
    ]
    tasks.append({"id": "other", "data": {"text": "no picture"}})
    with caplog.at_level(logging.WARNING):
        predictions = backend_of(studio).predict(tasks)
    assert [bool(prediction["result"]) for prediction in predictions] == [False, False, False, True, False]
    assert all(prediction["score"] == 0 for prediction in predictions if not prediction["result"])
    messages = [record.getMessage() for record in caplog.records if record.name == "alignzeg_backend"]
    assert len(messages) == 4
    for name, message in zip(("bad", "text", "none", "other"), messages):
        assert message.startswith(f"Task {name} gets no regions, its image cannot be read: ")
    assert "`picture` in its data is None; expected the URL of an image" in messages[3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("<View/>", "has no control tag; expected <BrushLabels"),
        (CONFIG.replace("BrushLabels", "PolygonLabels"), "has <Choices>, <PolygonLabels>; expected <BrushLabels"),
        (CONFIG.replace("<Image", "<Text"), "expected <BrushLabels"),
        (CONFIG.replace("<Label ", "<Other "), 'no labels in <BrushLabels name="mask">; expected at least one <Label'),
    ],
)
def test_label_studio_rejects_label_configs(studio: ModuleType, config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend_of(studio, config, project=config).predict([])


def test_label_studio_rejects_repeated_phrases_and_no_config(studio: ModuleType, tmp_path: Path) -> None:
    picture().save(tmp_path / "0.png")
    task = {"id": 1, "data": {"picture": str(tmp_path / "0.png")}}
    repeated = backend_of(studio, CONFIG.replace("a red thing", "brick"), project="2")
    with pytest.raises(ValueError, match="'brick' is in the classes 'brick' and 'Things to find'"):
        repeated.predict([task])
    with pytest.raises(ValueError, match="expected <BrushLabels"):
        backend_of(studio, None, project="3").predict([task])


def test_label_studio_extra_parameters(
    studio: ModuleType, tmp_path: Path, segment_by_hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(3).save(tmp_path / "0.png")
    task = {"id": 1, "data": {"picture": str(tmp_path / "0.png")}}
    monkeypatch.setattr(studio.AlignZegBackend, "extra_params", {"none_of_these": True}, raising=False)
    (prediction,) = backend_of(studio).predict([task])
    expected = segment_by_hand(picture(3), PHRASES, none_of_these=True)
    found = decoded(studio, prediction, list(PHRASES))
    np.testing.assert_array_equal(np.full_like(expected, -1) if found is None else found, expected)
    for wrong in ({"gama": 1}, ["gamma"]):
        monkeypatch.setattr(studio.AlignZegBackend, "extra_params", wrong)
        with pytest.raises(ValueError, match="expected a JSON object with none_of_these, gamma, threshold"):
            backend_of(studio).predict([task])


def test_label_studio_finds_its_checkpoint(
    studio: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNZEG_MODEL")
    assert studio.checkpoint() == str(ROOT / "checkpoints" / "photos")
    copy = shutil.copy(studio.__file__, tmp_path / "model.py")
    alone = load_module("alignzeg_backend_copy", Path(copy), monkeypatch)
    with pytest.raises(ValueError, match="ALIGNZEG_MODEL is not set; expected a checkpoint"):
        alone.checkpoint()


@pytest.mark.parametrize("studio", ["label_studio_ml"], indirect=True)
def test_label_studio_server(studio: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from label_studio_ml.api import init_app

    monkeypatch.setenv("ALIGNZEG_MODEL", str(ROOT / "checkpoints" / "photos"))
    config = CONFIG.replace("grass", "cat").replace("brick", "wall")
    client = init_app(studio.AlignZegBackend).test_client()
    assert client.get("/health").status_code == 200
    assert client.post("/setup", json={"project": "7.1", "schema": config}).status_code == 200
    tasks = [{"id": 1, "data": {"picture": str(ROOT / "app" / "examples" / "cat.jpg")}}]
    answer = client.post("/predict", json={"project": "7.1", "label_config": config, "tasks": tasks})
    assert answer.status_code == 200, answer.text
    (prediction,) = answer.json["results"]
    label_map = decoded(studio, prediction, list({**PHRASES, "wall": []}))
    assert label_map.shape == (300, 451) and (label_map == 0).mean() > 0.5, "most of the photograph is a cat"
