# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own common tests, of the version that is installed.

They are not part of the installed package, but of its source distribution: pip downloads it once, and its folder `tests`
is stored in `tests/.transformers/<version>`. Some modules that these files import are missing in the distribution; the
stand-ins below do not contain tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers
from tiny import picture


CACHE = Path(__file__).resolve().parent / ".transformers"
PACKAGE = "transformers_tests"


class SourceUnavailable(RuntimeError):
    """The source distribution is not available; the message contains pip's last output."""


def common_tests_folder() -> Path:
    """The folder `tests` of the source distribution of the installed transformers; downloads it the first time.

    Raises:
        SourceUnavailable: There is no such distribution, or no access to the package index.
    """
    version = transformers.__version__
    folder = CACHE / version / "tests"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            temporary,
        ]
        # pip builds its metadata, with the installed setuptools if there is one.
        for isolation in (["--no-build-isolation"], []):
            run = subprocess.run([*pip, *isolation, f"transformers=={version}"], capture_output=True, text=True)
            if run.returncode == 0:
                break
        archives = list(Path(temporary).glob("transformers-*.tar.gz"))
        if run.returncode or not archives:
            raise SourceUnavailable(
                f"Transformers' common tests come from the source distribution of transformers {version}, which pip could "
                f"not download: {(run.stderr.strip().splitlines() or ['it gave no reason'])[-1]}"
            )
        with tarfile.open(archives[0]) as archive:
            # Only regular files inside the folder, like `filter="data"`, which Python supports from 3.11.4 on.
            for member in archive:
                target = Path(temporary, member.name).resolve()
                if (
                    member.isfile()
                    and Path(member.name).parts[1:2] == ("tests",)
                    and target.is_relative_to(Path(temporary).resolve())
                ):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
        unpacked = archives[0].with_suffix("").with_suffix("") / "tests"
        # Read when `test_pipeline_mixin` is imported; the tiny models of the Hub, of which none is ours.
        (unpacked / "utils").mkdir(exist_ok=True)
        (unpacked / "utils" / "tiny_model_summary.json").write_text("{}\n", encoding="utf-8")
        folder.parent.mkdir(exist_ok=True)
        try:
            unpacked.rename(folder)
        except OSError:  # another process created it first
            if not folder.is_dir():
                raise
    return folder


def local_picture(url: str) -> str:
    """Replaces the download of images from the Hub: a synthetic scene for a photo, other URLs unchanged."""
    name = url.rsplit("/", 1)[-1]
    if not name.endswith((".jpg", ".png")):
        return url
    path = CACHE / "pictures" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(size=(160, 120)).save(path)
    return str(path)


def _module(name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


def load(name: str) -> ModuleType:
    """Imports one of transformers' test modules, such as `"test_modeling_common"`.

    Raises:
        SourceUnavailable: See [`common_tests_folder`].
    """
    if PACKAGE not in sys.modules:
        spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(common_tests_folder())]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        for package in ("exporters", "generation", "utils"):
            _module(f"{PACKAGE}.{package}", __path__=[])
        # Export and generation have separate tests in transformers' repository.
        _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        # Read for configs without parts only.
        _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
        _module("fetch_hub_objects_for_ci", url_to_local_path=local_picture)
    # They import transformers again from its path in the repository; use the installed one instead.
    with mock.patch("transformers.utils.direct_transformers_import", lambda *_: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")
