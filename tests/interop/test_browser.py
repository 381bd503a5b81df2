"""The viewer in a browser against a live daemon: the picture grows, every control works.

Headless Chromium shows pages of a daemon that reconstructs a simulated scan like the demo's.  Each
page is watched: no error in its console, no request to another machine.  With
``--update-pictures`` the screenshots in the documents are written anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for

pytest.importorskip("playwright", reason="pip install '.[interop]'")
from browser_pages import Viewer, chromium, opened
from playwright.sync_api import Browser

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.keys import new_key, write_private
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.series import DetectorOptions

pytestmark = [pytest.mark.interop, pytest.mark.timeout(400)]
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
KB_PER_S = 150
FRAMES, SMALL = 400, 120
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "light"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as held:
        yield held


class Beamline:
    """A daemon with a viewer, and scans that are played to it."""

    def __init__(self, folder: Path) -> None:
        experiment = simulate_experiment(seed=1, frames=FRAMES, size_px=128)
        np.savez(folder / "probe.npz", probe=experiment.probe.modes)
        self.demo = scan_file_of(experiment)
        tables = {
            "detector": {"dialect": "dectris-v1"},
            "geometry": None,  # the stream's header tells it
            "reconstruct": {"size_px": 128, "threads": 2},
            "refine": {"enabled": True, "seconds": 4.0},
            "trust": {"enabled": True, "seconds": 2.0, "diagnosis": "off"},
            "model": {"registry": "models"},
            "positions": {"wait_s": 5.0},
        }
        self.daemon = DaemonHarness(folder, tables, stages=("ingest", "reconstruct", "viewer"))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.daemon.settings.viewer.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}/"

    def part(self, frames: int) -> ScanFile:
        """The first frames of the demo's scan."""
        return replace(
            self.demo,
            counts=self.demo.counts[:frames],
            positions_yx_m=self.demo.positions_yx_m[:frames],
            frame_numbers=self.demo.frame_numbers[:frames],
        )

    def begin(self, scan: ScanFile, rate_hz: float, **options: Any) -> threading.Thread:
        """Play a scan in a thread."""
        thread = threading.Thread(target=self._play, args=(scan, rate_hz), kwargs=options)
        thread.start()
        return thread

    def _play(self, scan: ScanFile, rate_hz: float, **options: Any) -> None:
        daemon = self.daemon
        with (
            DetectorSimulator(
                daemon.detector_endpoint, DetectorOptions(rate_hz=rate_hz, **options)
            ) as detector,
            PositionSimulator(daemon.positions_endpoint) as positions,
        ):
            detector.wait_for_receiver()
            positions.wait_for_receiver()
            play(scan, detector, positions)

    def pages(self, other_than: int = 0) -> int:
        """How many are open, at another viewer than that process."""
        stage = self.daemon.status()["stages"]["viewer"]
        return 0 if stage["pid"] in (None, other_than) else stage["status"].get("pages", 0)

    def kept(self) -> list[str]:
        """Scans whose final image is kept, oldest first."""
        return sorted(path.parent.name for path in self.daemon.data.glob("scans/*/image.npz"))


@pytest.fixture(scope="module")
def beamline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beamline]:
    held = Beamline(tmp_path_factory.mktemp("browser"))
    with held.daemon:
        yield held


@pytest.fixture(scope="module")
def finished(beamline: Beamline, request: pytest.FixtureRequest) -> str:
    """A small scan that is over, older than all others; its identity."""
    beamline.begin(beamline.part(SMALL), 60).join()
    return wait_for(beamline.kept, 90, "the small scan's image")[0]


@pytest.fixture
def newest(beamline: Beamline, finished: str) -> str:
    """Another scan that is over, newer than :func:`finished`; its identity."""
    if len(beamline.kept()) < 2:
        beamline.begin(beamline.part(SMALL - 30), 60).join()
    return wait_for(lambda: beamline.kept()[1:], 90, "the newer scan's image")[-1]


def shows_scan(viewer: Viewer) -> bool:
    return viewer.pixels[1] > 100


def test_three_pages_follow_a_scan_from_its_first_frame_to_its_end(
    browser, beamline, finished, pytestconfig
):
    with ExitStack() as stack:
        desk, light, phone = (
            stack.enter_context(opened(browser, beamline.url, **context))
            for context in ({}, {"color_scheme": "light"}, PHONE)
        )
        pages = (desk, light, phone)
        for page in pages:
            page.until(lambda one=page: shows_scan(one), "the finished scan")
        began_s = time.monotonic()
        received = len(desk.received)
        taken = not pytestconfig.getoption("update_pictures")
        # Slower for the pictures, so that the network keeps up.
        beamline.begin(beamline.demo, 40 if taken else 12)
        for page in pages:
            page.until(lambda one=page: one.text("#state") == "running", "the new scan", 60)
        pictures: list[set[int]] = [set() for _ in pages]
        while len(beamline.kept()) < 2:
            assert time.monotonic() - began_s < 300, "the scan does not end"
            for page, seen in zip(pages, pictures, strict=True):
                seen.add(page.pixels[0])
            desk.page.wait_for_timeout(200)
            if (
                not taken
                and int(desk.at("#progress-bar").evaluate("bar => bar.value")) > FRAMES // 2
            ):
                taken = True
                desk.page.screenshot(path=PICTURES / "viewer.png")
                phone.page.screenshot(path=PICTURES / "viewer-phone.png")
        for page in pages:
            page.until(lambda one=page: one.text("#state") == "complete", "the end", 60)
            page.until(lambda one=page: one.text("#verdict"), "a verdict", 30)
            page.steady()
        seconds = time.monotonic() - began_s
        rate = desk.kilobytes_per_s(seconds)
        tiles = len(desk.received) - received
        print(
            f"a page: {rate:.0f} kB/s over {seconds:.0f} s, {tiles} messages, "
            f"{[len(seen) for seen in pictures]} different pictures seen"
        )
        assert rate <= KB_PER_S
        assert all(len(seen) > 8 for seen in pictures), "the picture grows on every page"
        assert f"{FRAMES} of {FRAMES}" in desk.text("#progress-text")
        assert desk.at("#scan-list .scan").count() == 2
        newest = desk.at("#scan-list .scan >> nth=0")
        assert newest.get_attribute("aria-current") == "true", "the page follows the newest scan"
        desk.until(lambda: desk.at("#scan-list img").count() == 2, "both thumbnails")
        assert float(desk.text("#trust dd >> nth=0")) > 0, "the misfit"
        assert desk.at("#chart-r path").count() == 2
        assert desk.at("#probe canvas").count() == 3, "the modes that refinement has added"
        assert "photons" in desk.text("#frame-words")
        for page in pages:
            page.check(beamline.address)


def test_the_first_picture_comes_at_once(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer:
        viewer.until(lambda: shows_scan(viewer))
        found = "performance.getEntriesByName('first picture')[0]?.startTime"
        first_ms = viewer.until(lambda: viewer.page.evaluate(found), "the first picture")
        print(f"first picture {first_ms:.0f} ms after the page was opened")
        assert first_ms < 5000  # on a machine that is busy with other things
        viewer.check(beamline.address)


def test_a_page_that_fails_at_a_message_begins_anew(browser, beamline):
    with opened(browser, beamline.url) as viewer:
        viewer.until(lambda: viewer.text("#link") == "live", "a connection")
        # The next message cannot be read, those after it can.
        viewer.page.evaluate("""() => {
            const parse = JSON.parse;
            JSON.parse = () => { JSON.parse = parse; throw new Error("cut short"); };
        }""")
        viewer.until(lambda: viewer.text("#link") == "connecting again", "an end", 30)
        viewer.until(lambda: viewer.text("#link") == "live", "another connection")
        viewer.check(beamline.address, allowed="cut short")


def test_what_is_shown_is_chosen_by_mouse_and_by_key(browser, beamline, finished, pytestconfig):
    with opened(browser, beamline.url) as viewer:
        page = viewer.page
        viewer.until(lambda: shows_scan(viewer))
        viewer.steady()
        for key, name in (("2", "amplitude"), ("3", "misfit"), ("4", "coverage"), ("1", "phase")):
            button = f"[data-quantity={name}]"
            for act in (lambda b=button: viewer.at(b).click(), lambda k=key: viewer.key(k)):
                other = "phase" if name != "phase" else "amplitude"
                if viewer.pressed(button):
                    viewer.at(f"[data-quantity={other}]").click()
                    viewer.until(lambda o=other: viewer.pressed(f"[data-quantity={o}]"))
                    viewer.steady()
                before = viewer.pixels[0]
                act()
                viewer.until(lambda b=before: viewer.pixels[0] != b, f"the {name}")
                assert viewer.pressed(button)
        viewer.until(lambda: viewer.text("#unit") == "rad", "the unit")
        for act in (lambda: viewer.at("[data-part=predicted]").click(), lambda: viewer.key("p")):
            viewer.steady()
            before = viewer.pixels[0]
            act()
            viewer.until(lambda b=before: viewer.pixels[0] != b, "the other layer")
        assert viewer.pressed("[data-part=shown]")
        for act in (lambda: viewer.at("#ramp").click(), lambda: viewer.key("r")):
            viewer.steady()
            was = viewer.pressed("#ramp")
            act()
            viewer.until(lambda w=was: viewer.pressed("#ramp") != w, "flattening")
        for act in (lambda: viewer.at("#path").click(), lambda: viewer.key("w")):
            viewer.steady()
            before = viewer.pixels[0]
            act()
            viewer.until(lambda b=before: viewer.pixels[0] != b, "the path")
        for act in (lambda: viewer.at("#theme").click(), lambda: viewer.key("t")):
            before = page.evaluate("document.documentElement.dataset.theme")
            act()
            assert page.evaluate("document.documentElement.dataset.theme") != before
        for act in (lambda: viewer.at("#help").click(), lambda: viewer.key("?")):
            act()
            viewer.until(lambda: "Keyboard" in viewer.text("#dialog"), "the list of keys")
            page.keyboard.press("Escape")
            viewer.until(lambda: not viewer.at("#dialog").is_visible(), "its end")
        viewer.check(beamline.address)


def test_the_image_is_moved_zoomed_and_read_out(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer:
        page, box = viewer.page, viewer.at("#view").bounding_box()
        assert box is not None
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        viewer.until(lambda: shows_scan(viewer))
        viewer.steady()

        def drag() -> None:
            page.mouse.move(*middle)
            page.mouse.down()
            page.mouse.move(middle[0] + 120, middle[1] + 60, steps=4)
            page.mouse.up()

        def press(key: str) -> None:
            viewer.at("#view").focus()
            page.keyboard.press(key)

        acts = {
            "zoom in": lambda: viewer.at("#zoom-in").click(),
            "drag": drag,
            "fit": lambda: viewer.at("#zoom-fit").click(),
            "wheel": lambda: (page.mouse.move(*middle), page.mouse.wheel(0, -400)),
            "double click": lambda: page.mouse.dblclick(*middle),
            "zoom out": lambda: viewer.at("#zoom-out").click(),
            "key +": lambda: viewer.key("+"),
            "arrow": lambda: press("ArrowRight"),
            "key -": lambda: viewer.key("-"),
            "key 0": lambda: viewer.key("0"),
            "cross hair": lambda: press("Shift+ArrowDown"),
        }
        for name, act in acts.items():
            before = viewer.steady()
            act()
            viewer.until(lambda b=before: viewer.pixels[0] != b, name)
        first = viewer.text("#readout")
        assert "µm" in first and "phase" in first and "rad" in first
        press("Shift+ArrowDown")
        assert viewer.text("#readout") != first
        page.mouse.move(middle[0] + 30, middle[1])
        viewer.until(lambda: "rad" in viewer.text("#readout"), "the value under the pointer")
        page.mouse.move(box["x"] + 3, box["y"] + 3)
        viewer.until(lambda: "not seen" in viewer.text("#readout"), "that nothing is there")
        viewer.check(beamline.address)


def test_contrast_and_colours_are_set(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer:
        page = viewer.page
        viewer.until(lambda: shows_scan(viewer))
        before = viewer.steady()
        assert viewer.pressed("#auto")
        viewer.at("#high").fill("2.5")
        viewer.at("#high").press("Enter")
        viewer.until(lambda: viewer.pixels[0] != before, "another contrast")
        assert not viewer.pressed("#auto") and viewer.at("#high").input_value() == "2.5"
        viewer.at("#low").fill("7")  # above the other end: refused
        viewer.at("#low").press("Tab")
        viewer.until(lambda: viewer.at("#low").input_value() != "7", "the former value")
        viewer.at("#auto").click()
        viewer.until(lambda: viewer.pressed("#auto"), "the automatic contrast")
        before = viewer.steady()
        bar = viewer.at("#colourbar").bounding_box()
        assert bar is not None
        page.mouse.move(bar["x"] + 5, bar["y"] + 5)
        page.mouse.down()
        page.mouse.move(bar["x"] + 60, bar["y"] + 5, steps=3)
        page.mouse.up()
        viewer.until(lambda: viewer.pixels[0] != before, "the dragged contrast")
        viewer.key("a")
        viewer.until(lambda: viewer.pressed("#auto"), "the key for it")
        for name in ("cividis", "magma", "twilight", "grey", "viridis"):
            before = viewer.steady()
            viewer.at("#colormap").select_option(name)
            viewer.until(lambda b=before: viewer.pixels[0] != b, f"colours of {name}")
        viewer.check(beamline.address)


def test_scans_are_chosen_and_compared(browser, beamline, finished, newest, pytestconfig):
    with opened(browser, beamline.url) as viewer:
        page = viewer.page
        viewer.until(lambda: shows_scan(viewer))
        viewer.until(lambda: viewer.at("#scan-list .scan").count() >= 2, "the list")
        progress = viewer.text("#progress-text")
        viewer.at("#scan-list .scan >> nth=-1").click()
        viewer.until(lambda: viewer.text("#progress-text") != progress, "the older scan")
        assert f"{SMALL}" in viewer.text("#progress-text")
        assert not viewer.pressed("#follow") and finished in page.url
        page.reload()
        viewer.until(lambda: f"{SMALL}" in viewer.text("#progress-text"), "it after a reload")
        viewer.key("l")
        viewer.until(lambda: viewer.text("#progress-text") == progress, "the newest by key")
        viewer.key("j")
        viewer.until(lambda: viewer.text("#progress-text") != progress, "an older one by key")
        viewer.key("k")
        viewer.until(lambda: viewer.text("#progress-text") == progress, "back by key")
        viewer.at("#follow").click()
        viewer.until(lambda: viewer.pressed("#follow"), "following")
        viewer.at("#scan-list .scan >> nth=0").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        viewer.until(lambda: viewer.text("#progress-text") != progress, "a choice by arrow keys")
        viewer.key("l")
        viewer.until(lambda: viewer.text("#progress-text") == progress, "the newest")
        before = viewer.steady()
        viewer.at("#compare").select_option("predicted:")
        viewer.until(lambda: "predicted" in viewer.text("#label-b"), "the comparison")
        viewer.until(lambda: viewer.pixels[0] != before, "two halves")
        before = viewer.steady()
        viewer.key("[")
        viewer.until(lambda: viewer.pixels[0] != before, "the line moved by key")
        box = viewer.at("#view").bounding_box()
        assert box is not None
        before = viewer.steady()
        at = box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 2
        page.mouse.move(*at)
        page.mouse.down()
        page.mouse.move(at[0] + 150, at[1], steps=4)
        page.mouse.up()
        viewer.until(lambda: viewer.pixels[0] != before, "the line moved by mouse")
        viewer.key("c")
        viewer.until(lambda: not viewer.at("#label-b").is_visible(), "one image again")
        viewer.key("c")
        viewer.until(lambda: viewer.at("#label-b").is_visible(), "two again")
        if pytestconfig.getoption("update_pictures"):
            viewer.key("2")
            viewer.key("t")
            viewer.steady()
            page.screenshot(path=PICTURES / "viewer-compare.png")
        viewer.at("#compare").select_option(f"scan:{finished}")
        viewer.until(lambda: viewer.at("#label-b").inner_text().startswith("simulated"), "a scan")
        viewer.check(beamline.address)


def test_actions_ask_back_and_are_done(browser, beamline, finished):
    folder = beamline.daemon.data / "scans" / finished
    exports = beamline.daemon.settings.export.directory
    with opened(browser, f"{beamline.url}#scan={finished}") as viewer:
        page = viewer.page
        viewer.until(lambda: f"{SMALL}" in viewer.text("#progress-text"), "the small scan")
        # Asked, and thought better of it: by button and by key.
        viewer.at("#snapshot").click()
        page.get_by_role("button", name="Cancel").click()
        viewer.key("s")
        viewer.until(lambda: "Keep the image" in viewer.text("#dialog"), "the question")
        page.keyboard.press("Escape")
        assert not (folder / "snapshots").exists()
        # Asked again before the page has heard that the question before was closed.
        viewer.key("s")
        viewer.until(lambda: "Keep the image" in viewer.text("#dialog"), "the question")
        page.evaluate(
            "document.getElementById('dialog').close();"
            "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 's', bubbles: true}))"
        )
        name = viewer.at("#dialog input[name=name]")
        name.fill("not / a name")
        name.press("Enter")
        assert viewer.at("#dialog").is_visible(), "the name is refused at once"
        name.fill("first")
        name.press("Enter")
        viewer.until(lambda: "Snapshot first" in viewer.text("#toasts"), "what came of it", 60)
        assert (folder / "snapshots" / "first.npz").exists()
        viewer.at("#compare").select_option(f"snapshot:{finished}/first")
        viewer.until(lambda: "snapshot first" in viewer.text("#label-b"), "it in the comparison")
        viewer.key("e")
        page.get_by_role("button", name="Export").last.click()
        viewer.until(lambda: "Written" in viewer.text("#toasts"), "the export", 60)
        assert {path.suffix for path in exports.glob(f"{finished}.*")} == {".npz", ".png"}
        viewer.at("#export").click()
        page.get_by_role("button", name="Cancel").click()
        viewer.at("#reprocess").click()
        page.get_by_role("button", name="Make anew").last.click()
        viewer.until(lambda: "being made anew" in viewer.text("#toasts"), "it", 60)
        viewer.check(beamline.address)


def test_models_are_trained_used_and_rolled_back(browser, beamline, finished):
    with opened(browser, f"{beamline.url}#scan={finished}") as viewer:
        page = viewer.page
        viewer.until(lambda: f"{SMALL}" in viewer.text("#progress-text"), "the small scan")
        viewer.at("#tab-models").click()
        viewer.until(lambda: "unrolled" in viewer.text("#model-list"), "the models")
        viewer.at("#rollback").click()
        page.get_by_role("button", name="Roll back").last.click()
        viewer.until(lambda: "no model to go back" in viewer.text("#toasts"), "why not", 60)
        viewer.key("m")
        viewer.until(lambda: "Fine-tune the model" in viewer.text("#dialog"), "the question")
        viewer.at("#dialog input[name=minutes]").fill("0.1")
        viewer.at("#dialog select[name=promote]").select_option("always")
        viewer.at("#dialog input[name=keep]").uncheck()
        page.get_by_role("button", name="Fine-tune").last.click()
        viewer.until(lambda: "is queued" in viewer.text("#toasts"), "the job", 60)
        # A second one waits, and is cancelled.
        viewer.at("#finetune").click()
        viewer.at("#dialog input[name=keep]").uncheck()
        page.get_by_role("button", name="Fine-tune").last.click()
        viewer.at("#tab-models").focus()
        page.keyboard.press("ArrowRight")
        viewer.until(lambda: viewer.at("#job-list .job").count() == 2, "both jobs")
        viewer.at("#job-list .job >> nth=0").get_by_role("button").click()
        page.get_by_role("button", name="Cancel training").click()
        viewer.until(lambda: "cancelled" in viewer.text("#job-list"), "the cancelled one")
        viewer.until(lambda: "done" in viewer.text("#job-list"), "the new model", 200)
        assert "in use since" in viewer.text("#job-list"), viewer.text("#job-list")
        page.keyboard.press("ArrowLeft")
        viewer.until(lambda: viewer.at("#model-list .model").count() >= 2, "it in the list")
        viewer.at("#tab-models").click()
        viewer.until(lambda: "in use" in viewer.text("#model-list .model >> nth=0"))
        viewer.at("#rollback").click()
        page.get_by_role("button", name="Roll back").last.click()
        viewer.until(lambda: "In use: unrolled" in viewer.text("#toasts"), "the roll back", 30)
        viewer.at("#model-list .model:not(.in-use)").get_by_role("button").first.click()
        page.get_by_role("button", name="Use it").click()
        viewer.until(lambda: viewer.at("#toasts .toast").count() >= 1, "the use of it", 30)
        viewer.check(beamline.address)


def test_a_running_scan_is_ended_or_given_up(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer:
        page = viewer.page
        viewer.until(lambda: shows_scan(viewer))
        viewer.until(lambda: viewer.at("#abort").is_disabled(), "that nothing runs")
        for act, button, state in (
            (lambda: viewer.at("#stop").click(), "End scan", ("complete", "interrupted")),
            (lambda: viewer.key("x"), "Abort", ("aborted",)),
        ):
            playing = beamline.begin(beamline.part(SMALL), 25)
            viewer.until(lambda: viewer.text("#state") == "running", "the scan", 60)
            viewer.until(lambda: viewer.at("#abort").is_enabled(), "the button")
            act()
            page.get_by_role("button", name=button).last.click()
            viewer.until(lambda s=state: viewer.text("#state") in s, f"{state}", 60)
            playing.join()
        viewer.check(beamline.address)


def test_frames_are_looked_at_one_by_one(browser, beamline, finished):
    with opened(browser, f"{beamline.url}#scan={finished}") as viewer:
        viewer.until(lambda: f"frame {SMALL - 1}" in viewer.text("#frame-words"), "the last frame")
        viewer.at("#frame-number").fill("3")
        viewer.at("#frame-number").press("Enter")
        viewer.until(lambda: "frame 3:" in viewer.text("#frame-words"), "frame 3")
        viewer.at("#frame-look").select_option("stored")
        viewer.until(lambda: "frame 3:" in viewer.text("#frame-words"), "it as it is stored")
        viewer.at("#frame-number").fill("100000")
        viewer.at("#frame-number").press("Enter")
        viewer.until(lambda: "no frame 100000" in viewer.text("#frame-words"), "that there is none")
        viewer.at("#frame-number").fill("")
        viewer.at("#frame-number").press("Enter")
        viewer.until(lambda: f"frame {SMALL - 1}" in viewer.text("#frame-words"), "the newest")
        viewer.check(beamline.address)


NAME = "one.id || one.dataset.quantity || one.dataset.part || one.className"
FOCUSED = f"""() => {{
  const one = document.activeElement;
  const name = one.ariaLabel || one.title || one.innerText || one.labels?.[0]?.innerText;
  return [{NAME}, Boolean(name?.trim()), getComputedStyle(one).outlineStyle];
}}"""
USABLE = f"""() => [...document.querySelectorAll("button, select, input, a, canvas[tabindex]")]
  .filter((one) => !one.disabled && one.tabIndex >= 0 && one.checkVisibility())
  .map((one) => {NAME})"""


def test_everything_can_be_reached_by_keyboard_and_has_a_name(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer:
        viewer.until(lambda: shows_scan(viewer))
        viewer.steady()
        reached: set[str] = set()
        for _ in range(90):
            viewer.page.keyboard.press("Tab")
            one, has_name, outline = viewer.page.evaluate(FOCUSED)
            reached.add(one)
            assert one == "" or has_name, f"{one} has no name"
            assert one in ("", "skip") or outline != "none", f"the focus on {one}"
        usable = set(viewer.page.evaluate(USABLE))
        assert reached >= usable
        assert usable >= {
            *("theme", "help", "tab-scans", "follow", "scan", "phase", "amplitude", "misfit"),
            *("coverage", "compare", "path", "zoom-in", "zoom-out", "zoom-fit", "view", "low"),
            *("high", "auto", "colormap", "ramp", "snapshot", "export", "reprocess"),
            *("frame-number", "frame-look"),
        }
        viewer.check(beamline.address)


def test_the_page_of_a_daemon_with_keys_asks_for_the_word(browser, tmp_path):
    new_key(tmp_path, "daemon")
    (tmp_path / "allowed-keys").touch()
    write_private(tmp_path / "viewer-token", "a-word-that-nobody-guesses\n")
    tables = {
        "security": {"key_path": "daemon.key_secret", "allowed_keys_path": "allowed-keys"},
        "viewer": {"token_path": "viewer-token"},
    }
    with DaemonHarness(tmp_path, tables, stages=("ingest", "viewer")) as daemon:
        address = f"127.0.0.1:{daemon.settings.viewer.port}"
        with opened(browser, f"http://{address}/") as viewer:
            word = viewer.at("#dialog input[name=token]")
            for given in ("another-word-than-that", "a-word-that-nobody-guesses"):
                viewer.until(lambda: word.is_visible() and not word.input_value(), "the question")
                word.fill(given)
                word.press("Enter")
            viewer.until(lambda: viewer.text("#link") == "live", "the connection")
            viewer.page.reload()
            viewer.until(lambda: viewer.text("#link") == "live", "it after a reload")
            assert not viewer.at("#dialog").is_visible()
            viewer.check(address)
        url = f"http://{address}/#token=a-word-that-nobody-guesses"
        with opened(browser, url) as viewer:
            viewer.until(lambda: viewer.text("#link") == "live", "the connection")
            assert "token" not in viewer.page.url
            viewer.check(address)


def test_pages_survive_restarts_of_viewer_and_daemon(browser, beamline, finished):
    with opened(browser, beamline.url) as viewer, opened(browser, beamline.url) as other:
        pages = (viewer, other)
        for page in pages:
            page.until(lambda one=page: shows_scan(one))
        before = beamline.daemon.stage_pid("viewer")
        beamline.daemon.kill("viewer")
        viewer.until(lambda: beamline.pages(other_than=before) == 2, "both connections", 60)
        viewer.key("2")
        viewer.changed("after the viewer's restart")
        beamline.daemon.stop()
        beamline.daemon.start()
        viewer.until(lambda: beamline.pages() == 2, "both connections", 60)
        viewer.key("1")
        viewer.changed("after the daemon's restart", 60)
        beamline.begin(beamline.part(60), 40).join()
        for page in pages:
            page.until(lambda one=page: "60 of 60" in one.text("#progress-text"), "a scan", 60)
            page.check(beamline.address, allowed="WebSocket connection")
