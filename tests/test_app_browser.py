# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The demo in a real browser, at desktop and phone width: upload, classes, segment, sliders, views, downloads.

Set ALIGNZEG_SCREENSHOTS to a folder to keep the screenshots.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_server import DemoServer, serve_demo
from PIL import Image
from tiny import tiny_checkpoint

from zeroshot.data.scenes import draw_scene


webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
SUFFIXES = (".png", ".json")  # of finished downloads
PATIENCE = 120  # seconds; machines that also train are slow
ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """The demo with the repository's checkpoint, or with a tiny one if there is none."""
    shipped = (ROOT / "config.json").is_file() and (ROOT / "model.safetensors").is_file()
    folder = tmp_path_factory.mktemp("demo")
    with serve_demo(ROOT if shipped else tiny_checkpoint(folder / "tiny"), folder / "server") as running:
        yield running


class Page:
    """A browser with the demo open."""

    def __init__(self, url: str, size: tuple[int, int], is_phone: bool, folder: Path) -> None:
        self.url, self.size, self.is_phone = url, size, is_phone
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        self.pictures = Path(os.environ.get("ALIGNZEG_SCREENSHOTS", folder / "screenshots"))
        self.pictures.mkdir(parents=True, exist_ok=True)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}"]:
            options.add_argument(flag)
        if is_phone:
            metrics = {"width": size[0], "height": size[1], "pixelRatio": 2.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        preferences = {
            "download.default_directory": str(self.downloads),
            "profile.default_content_setting_values.automatic_downloads": 1,
        }
        options.add_experimental_option("prefs", preferences)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver: WebDriver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.get(url)
        self.wait(lambda: self.find("#az-start"), "the page")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline, problem = time.monotonic() + PATIENCE, None
        while time.monotonic() < deadline:
            try:
                if value := condition():
                    return value
            except Exception as error:  # elements are replaced while the page is built
                problem = error
            time.sleep(0.05)
        self.shoot("failure")
        raise AssertionError(f"waited {PATIENCE} s for {what}: {problem}")

    def shoot(self, name: str) -> None:
        """A screenshot of the whole page."""
        height = self.run("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.size[0], "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        file = self.pictures / f"{'phone' if self.is_phone else 'desktop'}_{name}.png"
        file.write_bytes(base64.b64decode(shot["data"]))

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    @property
    def result(self) -> dict[str, str]:
        """The data attributes of the viewer: view, gamma, threshold, and the number of redraws."""
        return self.run("return {...document.querySelector('#az-viewer [data-part=result]').dataset}")

    def redraw(self, action: Callable[[], None], ready: str = "true") -> None:
        """Acts and waits until the viewer has drawn again and `ready` (JavaScript over its dataset `d`) holds."""
        drawn = int(self.result.get("drawn", 0))
        action()
        self.wait(
            lambda: (
                int(self.result.get("drawn", 0)) > drawn
                and self.run("return Function('d', 'return ' + arguments[1])(arguments[0])", self.result, ready)
            ),
            ready,
        )

    def segment(self) -> None:
        self.redraw(lambda: self.run("document.querySelector('#az-start').click()"))

    def move(self, slider: str, value: float) -> None:
        """Moves a slider to `value`, like dragging."""

        def drag() -> None:
            self.run(
                """
                const range = document.querySelector(arguments[0] + ' input[type=range]');
                const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;
                set.call(range, arguments[1]);
                range.dispatchEvent(new Event('input', { bubbles: true }));
                """,
                slider,
                value,
            )

        name = "gamma" if "gamma" in slider else "threshold"
        self.redraw(drag, f"Number(d.{name}) === {value}")

    def rows(self) -> list[list[str]]:
        return [row.text.split("\n") for row in self.all("#az-viewer tbody tr")]

    def download(self, selector: str) -> Path:
        self.wait(lambda: self.find(selector).is_enabled(), "a download")
        before = set(self.downloads.iterdir())
        self.click(selector)
        fresh = self.wait(
            lambda: [file for file in set(self.downloads.iterdir()) - before if file.suffix in SUFFIXES], "it"
        )
        return fresh[0]


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, server: DemoServer, tmp_path: Path) -> Iterator[Page]:
    opened = Page(server.url, request.param, request.param[0] < 600, tmp_path)
    yield opened
    opened.driver.quit()


def test_the_whole_way(page: Page, tmp_path: Path, server: DemoServer) -> None:
    scene = draw_scene(0, "test", 5)
    image = Image.fromarray(scene.image)
    image.save(tmp_path / "scene.png")
    markup = "<img src=x onerror=window.hacked=1>"
    names = [*scene.classes, markup, "${window.hacked=2}", "{{value}}"]
    page.shoot("start")

    # Upload an image, type names, mark unseen ones, and press Enter.
    page.find("#az-input input[type=file]").send_keys(str(tmp_path / "scene.png"))
    page.wait(lambda: page.find("#az-input img").is_displayed(), "the upload")
    box = page.find("#az-names textarea")
    box.send_keys(", ".join(names))
    page.wait(lambda: len(page.all("#az-unseen label input")) == len(names), "a box for every name")
    page.all("#az-unseen label input")[0].click()
    box.send_keys(Keys.ENTER)
    page.wait(lambda: page.result.get("drawn"), "the segmentation")
    page.wait(lambda: "\n" not in box.get_attribute("value").strip(), "Enter to make no new line")
    assert page.result["view"] == "segmentation"
    page.shoot("segmentation")

    # The table is sorted and complete, and markup is shown as text.
    shares = [float(row[-2].split()[0].replace("<", "0")) for row in page.rows()]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    shown = page.find("#az-viewer").text + page.find("#az-unseen").text
    assert markup in shown and "${window.hacked=2}" in shown and "{{value}}" in shown
    assert page.run("return window.hacked === undefined && !document.querySelector('img[src=x]')")

    # Hovering or touching shows the class under the pointer.
    spot = page.run(
        """
        const canvas = document.querySelector('#az-viewer canvas');
        canvas.scrollIntoView({block: 'center'});
        const box = canvas.getBoundingClientRect();
        const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
        canvas.dispatchEvent(new PointerEvent('pointermove', at));
        const tip = document.querySelector('#az-viewer [data-part=tip]');
        return [tip.hidden, tip.textContent, document.querySelectorAll('tr.az-active').length];
        """
    )
    assert spot[0] is False and spot[1].removesuffix(" (unseen)") in names and spot[2] == 1

    # Sliders redraw; the views switch.
    for gamma in (0, 3, 10):
        page.move("#az-gamma", gamma)
    page.move("#az-threshold", 0.1)
    for view, panels in (("compare", 2), ("unseen", 1), ("segmentation", 1)):
        page.click(f"#az-viewer input[value={view}]")
        page.wait(lambda view=view: page.result["view"] == view, view)
        assert len(page.all("#az-viewer canvas")) == panels
        page.shoot(view)
    page.click("#az-else input")
    page.wait(lambda: page.result["everythingElse"] == "true", "the grey class")

    # Downloads contain the values of the table.
    facts = json.loads(page.download("#az-json-file").read_text(encoding="utf-8"))
    with Image.open(page.download("#az-label-file")) as label:
        assert label.size == image.size and label.mode == "P"
        labels = np.asarray(label)
    assert [entry["name"] for entry in facts["classes"][: len(names)]] == names
    assert facts["threshold"] == 0.1 and facts["gamma"] == 10 and facts["everything_else"] is True
    for entry in facts["classes"]:
        assert entry["coverage"] == pytest.approx((labels == entry["id"]).mean())

    # An error is shown as a sentence.
    box.clear()
    box.send_keys("grass,, water")
    page.click("#az-start")
    toast = page.wait(lambda: page.find("[data-testid=toast-body]").text, "the message")
    assert "Class name 2 is empty" in toast and "Traceback" not in toast
    page.wait(lambda: page.find("#az-json-file").is_enabled(), "the downloads of the result before, which still shows")
    page.shoot("error")

    # Nothing is wider than the screen, loaded from other servers, broken, or sent elsewhere.
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth + 1")
    outside = page.run(
        """return performance.getEntriesByType('resource').map((entry) => entry.name)
        .filter((name) => !/^(data|blob):/.test(name) && new URL(name).host !== location.host)"""
    )
    assert outside == []
    severe = [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    assert "Traceback" not in server.log
    page.driver.switch_to.new_window("tab")
    page.driver.get(page.url)
    page.wait(lambda: page.find("#az-viewer [data-part=empty]").is_displayed(), "an empty page")


def test_examples_run_by_themselves(page: Page) -> None:
    examples = page.wait(lambda: page.all("#az-examples button"), "the examples")
    assert len(examples) >= 6
    page.run("arguments[0].click()", examples[0])
    page.wait(lambda: page.result.get("drawn"), "the segmentation")
    marked = [box for box in page.all("#az-unseen label input") if box.is_selected()]
    assert marked, "examples mark their unseen classes"
    page.shoot("example")
