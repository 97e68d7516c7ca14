# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints load with the Auto classes from a saved folder, a clone of the repository and the Hub: with remote code, in a
process without this package and the training libraries, and with the package, without remote code."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_standin import hub_standin
from huggingface_hub.errors import StrictDataclassError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import CLASSES, UNSEEN, picture, tiny_checkpoint, tiny_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
)

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor
from zeroshot.checkpoints import install_as_root


REPOSITORY = Path(__file__).resolve().parent.parent
NEW_NAMES = ["grass", "a new thing", "猫"]
# Inference needs none of them, and the package must be hidden so that its copy is loaded.
HIDDEN = ["accelerate", "datasets", "evaluate", "open_clip", "peft", "scipy", "timm", "torchvision"]
PACKAGE = ["modeling_alignzeg", "zeroshot", "metrics"]
# Modules that Python or an editable installation imports at startup.
NOT_HIDDEN = ("pip", "setuptools", "_distutils_hack", "pkg_resources")

HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in HIDDEN:
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name + " can be imported")
"""

FIX_THREADS = """
import torch

torch.set_num_threads(THREADS)
"""

SEGMENT = """
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor, AutoTokenizer
)

def segment(source):
    code = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(source, **code)
    processor = AutoProcessor.from_pretrained(source, **code)
    image_processor = AutoImageProcessor.from_pretrained(source, **code)
    tokenizer = AutoTokenizer.from_pretrained(source, **code)
    names = {
        "config": config, "processor": processor, "image_processor": image_processor,
        "nested": processor.image_processor,
    }
    names = {key: type(value).__name__ for key, value in names.items()}
    image = Image.open(IMAGE)
    inputs = processor(images=image, return_tensors="pt")
    again = image_processor(images=image, return_tensors="pt")
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert tokenizer("a photo of grass").input_ids == processor.tokenizer("a photo of grass").input_ids
    tensors = {}
    for auto in (AutoModel, AutoModelForSemanticSegmentation):
        model = auto.from_pretrained(source, **code)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        with torch.no_grad():
            stored = model(**inputs)
            prototypes = model.get_text_prototypes(processor, NEW_NAMES, "vild")
            new = model(**inputs, text_prototypes=prototypes)
        names[auto.__name__] = type(model).__name__
        tensors.update({f"{auto.__name__}/stored/{key}": value for key, value in stored.items()})
        tensors.update({f"{auto.__name__}/new/{key}": value for key, value in new.items()})
        size = [image.size[::-1]]
        tensors[auto.__name__ + "/map"] = processor.post_process_semantic_segmentation(stored, target_sizes=size)[0]
    return model, processor, {"names": names, "tensors": tensors}
"""


def run_alone(script: str, folder: Path, environment: dict[str, str] | None = None, **values: object) -> dict:
    """Runs a script in a new process, in another working directory, without this package and the packages in `HIDDEN`.

    Returns the value that the script assigns to `result`. `values` are its variables.
    """
    folder.mkdir(parents=True)
    values = {
        "HIDDEN": HIDDEN + PACKAGE,
        "RESULT": str(folder / "result.pt"),
        # The number of threads affects rounding, and results are compared bitwise.
        "THREADS": torch.get_num_threads(),
        **values,
    }
    assignments = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (folder / "script.py").write_text(
        assignments + HIDE + FIX_THREADS + script + "\ntorch.save(result, RESULT)\n", encoding="utf-8"
    )
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "SYSTEMROOT") if name in os.environ}
    environment = {**kept, "HF_HOME": str(folder / "home"), **(environment or {"HF_HUB_OFFLINE": "1"})}
    command = [sys.executable, "-I", str(folder / "script.py")]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "scene.png"
    picture(3, (53, 41)).save(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="module")
def root(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the checkpoint in its root."""
    clone = tmp_path_factory.mktemp("clone") / "alignzeg"
    shutil.copytree(
        REPOSITORY / "modeling_alignzeg", clone / "modeling_alignzeg", ignore=shutil.ignore_patterns("__pycache__")
    )
    install_as_root(saved, clone)
    return clone


@pytest.fixture(scope="module")
def expected(saved: Path, image: Path) -> dict[str, torch.Tensor]:
    """Results of the package itself from the saved folder."""
    from PIL import Image

    model, processor = AlignZegModel.from_pretrained(saved), AlignZegProcessor.from_pretrained(saved)
    with Image.open(image) as opened:
        inputs = processor(images=opened, return_tensors="pt")
        size = [opened.size[::-1]]
    with torch.no_grad():
        stored = model(**inputs)
        new = model(**inputs, text_prototypes=model.get_text_prototypes(processor, NEW_NAMES, "vild"))
    tensors = {f"stored/{key}": value for key, value in stored.items()}
    tensors |= {f"new/{key}": value for key, value in new.items()}
    return tensors | {"map": processor.post_process_semantic_segmentation(stored, target_sizes=size)[0]}


def check(result: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert result["names"] == {
        "config": "AlignZegConfig",
        "processor": "AlignZegProcessor",
        "image_processor": "AlignZegImageProcessor",
        "nested": "AlignZegImageProcessor",
        "AutoModel": "AlignZegModel",
        "AutoModelForSemanticSegmentation": "AlignZegModel",
    }
    tensors = result["tensors"]
    assert len(tensors) == 2 * len(expected)
    for auto in ("AutoModel", "AutoModelForSemanticSegmentation"):
        for name, value in expected.items():
            assert torch.equal(tensors[f"{auto}/{name}"], value), f"{auto}/{name}"


@pytest.fixture(scope="module")
def alone(saved: Path, root: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All layouts in one process: a saved folder, a clone, a snapshot in the Hub's cache, and a saved copy of each."""
    folder = tmp_path_factory.mktemp("alone")
    cache = folder / "process" / "home" / "hub" / "models--tester--alignzeg"
    sha = "0123456789abcdef0123456789abcdef01234567"
    sources = {"saved": str(saved), "root": str(root), "snapshot": "tester/alignzeg"}
    script = (
        SEGMENT
        + f"""
import os, shutil
shutil.copytree({str(root)!r}, {str(cache / "snapshots" / sha)!r})
os.makedirs({str(cache / "refs")!r})
with open({str(cache / "refs" / "main")!r}, "w") as file:
    file.write({sha!r})

result = {{}}
for name, source in SOURCES.items():
    model, processor, result[name] = segment(source)
    model.save_pretrained("again-" + name)
    processor.save_pretrained("again-" + name)
    result["again-" + name] = segment(os.path.abspath("again-" + name))[2]
    result["again-" + name]["files"] = sorted(os.listdir("again-" + name))

from transformers import pipeline
segmenter = pipeline("zero-shot-image-segmentation", model=SOURCES["root"], trust_remote_code=True)
result["zero-shot"] = [s["label"] for s in segmenter(IMAGE, candidate_labels=NEW_NAMES, unseen_labels=NEW_NAMES[1:])]
segmenter = pipeline("image-segmentation", model=SOURCES["root"], trust_remote_code=True)
result["image-segmentation"] = [s["label"] for s in segmenter(IMAGE, subtask="semantic")]
found = set(HIDDEN) & {{name.partition(".")[0] for name in sys.modules}}
assert not found, found
"""
    )
    return run_alone(script, folder / "process", IMAGE=str(image), NEW_NAMES=NEW_NAMES, SOURCES=sources)


@pytest.mark.parametrize("layout", ["saved", "root", "snapshot"])
def test_loads_with_its_own_code(alone: dict[str, Any], expected: dict[str, torch.Tensor], layout: str) -> None:
    check(alone[layout], expected)


@pytest.mark.parametrize("layout", ["saved", "root", "snapshot"])
def test_saved_again_it_loads_again_to_the_bit(
    alone: dict[str, Any], expected: dict[str, torch.Tensor], layout: str, saved: Path
) -> None:
    check(alone[f"again-{layout}"], expected)
    assert alone[f"again-{layout}"]["files"] == sorted(os.listdir(saved)), "a flat folder with all of its code"


def test_pipelines_load_from_a_clone(alone: dict[str, Any]) -> None:
    assert alone["zero-shot"] and set(alone["zero-shot"]) <= set(NEW_NAMES)
    assert alone["image-segmentation"] and set(alone["image-segmentation"]) <= set(CLASSES)


ALONE = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

def predict(source):
    model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    image = Image.open(PHOTO)
    with torch.no_grad():
        prototypes = model.get_text_prototypes(processor, NEW_NAMES)
        outputs = model(**processor(images=image, return_tensors="pt"), text_prototypes=prototypes)
    label = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
    return model, processor, [*outputs.to_tuple(), label]

model, processor, first = predict(CLONE)
model.save_pretrained("again")
processor.save_pretrained("again")
second = predict("./again")[2]
assert len(first) == len(second) > 3
result = {"equal": [torch.equal(*pair) for pair in zip(first, second)], "size": tuple(first[-1].shape)}
"""


def needed_by(*names: str) -> set[str]:
    """Names of these distributions and their requirements, without optional ones."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        with suppress(importlib.metadata.PackageNotFoundError):
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            found.add(name)
            waiting += [
                canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
            ]
    return found


def test_torch_and_transformers_are_enough(tmp_path: Path) -> None:
    """This clone's own checkpoint, with all packages hidden that torch, transformers, NumPy and Pillow do not need."""
    allowed = needed_by("torch", "transformers", "numpy", "pillow")
    providers = importlib.metadata.packages_distributions()
    hidden = [
        module
        for module, distributions in providers.items()
        if module.isidentifier() and not allowed & {canonicalize_name(name) for name in distributions}
    ]
    hidden = [name for name in hidden if importlib.util.find_spec(name) is not None and name not in NOT_HIDDEN]
    assert {"scipy", "accelerate", "datasets"} <= set(hidden) and not {"torch", "transformers"} & set(hidden)
    values = {"PHOTO": str(REPOSITORY / "app" / "examples" / "scene_148.png"), "CLONE": str(REPOSITORY)}
    values |= {"HIDDEN": sorted({*hidden, *PACKAGE}), "NEW_NAMES": NEW_NAMES}
    result = run_alone(ALONE, tmp_path / "process", **values)
    assert all(result["equal"]) and result["size"] == (128, 128)


def test_the_code_imports_nothing_else() -> None:
    """Imports at import time; optional ones are in try/except ImportError. No code is unpickled or evaluated."""
    needed_by_transformers = {"torch", "numpy", "PIL", "huggingface_hub"}
    allowed = {"transformers", *needed_by_transformers, *sys.stdlib_module_names} - {"pickle", "marshal", "shelve"}
    for path in sorted((REPOSITORY / "modeling_alignzeg").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        optional = {
            node
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            and any(isinstance(h.type, ast.Name) and h.type.id == "ImportError" for h in attempt.handlers)
            for statement in attempt.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    assert node.level == 1 and (path.parent / f"{node.module}.py").is_file(), (
                        f"{path.name}: {node.module}"
                    )
                names = [] if node.level else [node.module]
            else:
                called = getattr(node, "func", None)
                name = getattr(called, "attr", getattr(called, "id", ""))
                is_module = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
                where = called.value.id if is_module else ""
                assert name not in ("exec", "__import__", "import_module"), f"{path.name}:{node.lineno}"
                assert (where, name) not in (("torch", "load"), ("", "eval")), f"{path.name}:{node.lineno}"
                continue
            if node not in optional:
                assert {name.partition(".")[0] for name in names} <= allowed, f"{path.name}:{node.lineno} {names}"


def test_a_checkpoint_s_code_is_the_reviewed_code(saved: Path) -> None:
    """Every file of a checkpoint is a weights file, JSON, or a copy of a file in the repository."""
    for path in saved.iterdir():
        if path.suffix == ".py":
            assert path.read_bytes() == (REPOSITORY / "modeling_alignzeg" / path.name).read_bytes()
        else:
            assert path.suffix in (".json", ".safetensors"), path.name


# --- the package is imported


PACKAGED = """
import json, setuptools
distribution = setuptools.Distribution({"script_name": "setup.py"})
distribution.parse_config_files(["setup.cfg"])
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
print(json.dumps(list(build.get_output_mapping().values())))
"""


def test_the_distribution_has_all_code_and_data() -> None:
    output = subprocess.run(  # setuptools cannot be imported after the standard library's distutils
        [sys.executable, "-c", PACKAGED], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    packaged = {Path(source) for source in json.loads(output.splitlines()[-1])}
    expected = {
        path.relative_to(REPOSITORY)
        for package in ("modeling_alignzeg", "zeroshot")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == expected
    assert {path.suffix for path in packaged} == {".py", ".json", ".md"}


def test_registered_classes_need_no_remote_code(saved: Path, root: Path) -> None:
    for source in (saved, root):
        assert type(AutoConfig.from_pretrained(source)) is AlignZegConfig
        assert type(AutoModel.from_pretrained(source)) is AlignZegModel
        assert type(AutoModelForSemanticSegmentation.from_pretrained(source)) is AlignZegModel
        assert type(AutoImageProcessor.from_pretrained(source)) is AlignZegImageProcessor
        assert type(AutoProcessor.from_pretrained(source)) is AlignZegProcessor
        assert AutoTokenizer.from_pretrained(source)("grass").input_ids
    assert type(AutoModel.from_config(tiny_config())) is AlignZegModel


@pytest.fixture(scope="module")
def pixels(saved: Path, image: Path) -> BatchFeature:
    return AlignZegProcessor.from_pretrained(saved)(images=str(image), return_tensors="pt")


def logits(model: AlignZegModel, pixels: BatchFeature) -> torch.Tensor:
    with torch.no_grad():
        return model(**pixels).class_queries_logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa", {"vision_config": "eager", "text_config": "sdpa"}])
def test_attention_implementations(
    saved: Path, pixels: BatchFeature, expected: dict[str, torch.Tensor], implementation: str | dict[str, str]
) -> None:
    model = AlignZegModel.from_pretrained(saved, attn_implementation=implementation)
    if isinstance(implementation, str):
        tower = model.recognizer.vision_model
        configs = (model.config, model.config.vision_config, model.config.text_config, tower.config)
        assert {config._attn_implementation for config in configs} == {implementation}
    torch.testing.assert_close(logits(model, pixels), expected["stored/class_queries_logits"], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    parts = (model, model.recognizer.vision_model, model.text_encoder.text_model)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    torch.testing.assert_close(logits(model, pixels), expected["stored/class_queries_logits"], rtol=1e-4, atol=1e-4)


def test_an_attention_that_is_not_installed_is_named(saved: Path) -> None:
    with pytest.raises((ValueError, ImportError), match="(?i)flash"):
        AlignZegModel.from_pretrained(saved, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_dtypes(
    saved: Path, pixels: BatchFeature, expected: dict[str, torch.Tensor], dtype: torch.dtype | str, tmp_path: Path
) -> None:
    model = AlignZegModel.from_pretrained(saved, dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    torch.testing.assert_close(
        logits(model, pixels).float(), expected["stored/class_queries_logits"], rtol=0.1, atol=0.3
    )
    model.save_pretrained(tmp_path)
    assert AlignZegModel.from_pretrained(tmp_path, dtype="auto").dtype == model.dtype
    assert torch.equal(logits(AlignZegModel.from_pretrained(tmp_path, dtype="auto"), pixels), logits(model, pixels))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(
    saved: Path, pixels: BatchFeature, expected: dict[str, torch.Tensor], device_map: str | dict[str, str]
) -> None:
    pytest.importorskip("accelerate", reason="placing weights on devices needs accelerate")
    model = AlignZegModel.from_pretrained(saved, device_map=device_map)
    assert torch.equal(logits(model, pixels), expected["stored/class_queries_logits"])


def test_text_tower_on_disk(
    saved: Path, pixels: BatchFeature, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="placing weights on devices needs accelerate")
    parts = [name for name, _ in AlignZegModel(tiny_config()).named_children()]
    device_map = dict.fromkeys([*parts, "logit_scale", "class_text_embeds", "seen_class_mask"], "cpu")
    device_map["text_encoder"] = "disk"
    model = AlignZegModel.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    assert model.text_encoder.text_model.embeddings.token_embedding.weight.device.type == "meta"
    assert torch.equal(logits(model, pixels), expected["stored/class_queries_logits"])
    prototypes = model.get_text_prototypes(AlignZegProcessor.from_pretrained(saved), list(CLASSES))
    torch.testing.assert_close(prototypes.cpu(), model.class_text_embeds)


def test_meta_device(saved: Path) -> None:
    with torch.device("meta"):
        model = AlignZegModel(tiny_config())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu").init_weights()
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    assert model.seen_class_mask.tolist() == [name not in UNSEEN for name in CLASSES]
    assert model.classifier.adapter.mlp.layers[-1].weight.abs().max() == 0, "the adapter starts as the identity"


def test_missing_weights_are_initialised(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(("classifier", "class_text"))}
    shutil.copy(saved / "config.json", tmp_path)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AlignZegModel.from_pretrained(tmp_path)
    assert model.classifier.adapter.mlp.layers[-1].weight.abs().max() == 0
    assert torch.equal(model.class_text_embeds, torch.eye(4, 24))
    assert 0.05 < model.classifier.background.prototypes.std() < 1
    assert torch.equal(model.side_network.query_embeddings, weights["side_network.query_embeddings"])


@pytest.mark.parametrize("text", ["[1]", "null", "3"])
def test_a_config_without_fields_is_answered_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(OSError, match="config.json' contains .*; expected a JSON object"):
        AlignZegModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_queries": 7}, RuntimeError, "mismatched"),
        ({"id2label": {"0": "a", "2": "b"}}, StrictDataclassError, "`id2label` maps 2 to 'b' at position 1"),
    ],
)
def test_an_edited_config_is_answered_with_a_sentence(
    saved: Path, tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    shutil.copy(saved / "model.safetensors", tmp_path)
    config = {**json.loads((saved / "config.json").read_text(encoding="utf-8")), "unseen_labels": [], **change}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(error, match=message):
        AlignZegModel.from_pretrained(tmp_path)


# --- the repository's root


def test_installing_replaces_an_earlier_checkpoint(saved: Path, root: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(root, clone)
    AlignZegModel.from_pretrained(saved).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AlignZegProcessor.from_pretrained(saved).save_pretrained(tmp_path / "sharded")
    files = install_as_root(tmp_path / "sharded", clone)
    assert not (clone / "model.safetensors").exists() and (clone / "model.safetensors.index.json") in files
    ours, theirs = (AlignZegModel.from_pretrained(folder).state_dict() for folder in (saved, clone))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    install_as_root(saved, clone)
    assert sorted(p.name for p in clone.glob("*.safetensors*")) == ["model.safetensors"]
    assert not list(clone.glob(".*")), "nothing half written is left"
    references = json.loads((clone / "config.json").read_text())["auto_map"].values()
    assert all(reference.startswith("modeling_alignzeg/") and reference.count("/") == 1 for reference in references)


def test_installing_from_the_command_line(saved: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "modeling_alignzeg", tmp_path / "modeling_alignzeg")
    script = REPOSITORY / "scripts" / "install_checkpoint.py"
    run = subprocess.run([sys.executable, script, saved, "--root", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {Path(line).name for line in run.stdout.split()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    run = subprocess.run([sys.executable, script, tmp_path / "nothing"], capture_output=True, text=True)
    assert run.returncode != 0 and "has no config.json" in run.stderr and "Traceback" not in run.stderr


def test_what_is_no_checkpoint_or_no_clone_is_refused(saved: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`checkpoint`.*has no config.json"):
        install_as_root(tmp_path, root)
    with pytest.raises(ValueError, match="`root`.*has no folder modeling_alignzeg"):
        install_as_root(saved, tmp_path)
    for name, content in (("config.json", "[1]"), ("model.safetensors", "")):
        damaged, clone = tmp_path / name, tmp_path / f"{name}-clone"
        shutil.copytree(saved, damaged)
        shutil.copytree(root / "modeling_alignzeg", clone / "modeling_alignzeg")
        (damaged / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} (is damaged|contains \[1\])"):
            install_as_root(damaged, clone)
        assert [path.name for path in clone.iterdir()] == ["modeling_alignzeg"]


# --- the Hub


def test_pushed_to_the_hub_it_loads_from_there(
    saved: Path, image: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    push = """
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(SAVED, trust_remote_code=True)
model.push_to_hub("tester/alignzeg", commit_message="A model")
AutoProcessor.from_pretrained(SAVED, trust_remote_code=True).push_to_hub("tester/alignzeg")
ModelCard(CARD).push_to_hub("tester/alignzeg")
result = segment("tester/alignzeg")[2]
"""
    card = "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n# A card\n"
    with hub_standin() as hub:
        values = {"SAVED": str(saved), "IMAGE": str(image), "NEW_NAMES": NEW_NAMES, "CARD": card}
        result = run_alone(SEGMENT + push, tmp_path / "process", hub.environment(), **values)
        files = hub.repositories["tester/alignzeg"]
    check(result, expected)
    assert set(files) >= set(os.listdir(saved))
    assert files["README.md"].decode() == card
    assert [message for _, message in hub.commits][:2] == ["A model", "Upload processor"]
