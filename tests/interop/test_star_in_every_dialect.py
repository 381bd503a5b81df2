"""The measured siemens star makes the same image in whatever dialect its frames and positions come.

Each dialect's simulator streams the first frames to a daemon of its own, which makes the network's
image and nothing else; it is compared with that of what is sent natively.  Another dialect is
another entry of ``WAYS`` or ``POSITIONERS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_harness import DaemonHarness
from make_siemens_star import siemens_star

from ptycho_stream.client import Image, ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import BlueskySettings, PandaSettings
from ptycho_stream.simulate.detector import (
    PUBLISHERS,
    DetectorSimulator,
    PositionSimulator,
    SimulatedDetector,
    play,
)
from ptycho_stream.simulate.position_series import PositionOptions
from ptycho_stream.simulate.pva_detector import PvaDetectorSimulator
from ptycho_stream.simulate.series import DetectorOptions

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]
FRAMES = 60
NATIVE = DetectorOptions("native")
WAYS = {
    "dectris-v1 part by part": DetectorOptions("dectris-v1", one_part_each=True),
    "dectris-v2": DetectorOptions("dectris-v2"),
    "stins": DetectorOptions("stins"),
    "psi": DetectorOptions("psi"),
    "slsdet in 2 x 2 modules": DetectorOptions("slsdet", modules_yx=(2, 2)),
    "odin": DetectorOptions("odin"),
    "pva": DetectorOptions("pva", "bslz4", rate_hz=200),
}
PANDA = PandaSettings(y="/Y", x="/X", scale_yx_m=(-1e-9, 2e-9), samples_per_frame=10)
POSITIONERS = {
    "panda": PositionOptions("panda", PANDA, jitter_m=1e-9),
    "bluesky": PositionOptions("bluesky", bluesky=BlueskySettings(y="samy", x="samx")),
}
WITHOUT_LIBRARY = importlib.util.find_spec("p4p") is None


@pytest.fixture(scope="module")
def scan(data_folder: Path) -> ScanFile:
    star = siemens_star(data_folder)
    return replace(
        star,
        counts=star.counts[:FRAMES],
        positions_yx_m=star.positions_yx_m[:FRAMES],
        frame_numbers=star.frame_numbers[:FRAMES],
    )


@pytest.fixture(scope="module")
def natively(scan: ScanFile, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return streamed(scan, NATIVE, tmp_path_factory.mktemp("native"))


def streamed(
    scan: ScanFile,
    options: DetectorOptions,
    folder: Path,
    positioner: PositionOptions | None = None,
) -> Image:
    """The final image of a scan whose frames were stored bit by bit."""
    motion = positioner or PositionOptions()
    native = motion.dialect == "native"
    np.savez(folder / "probe.npz", probe=scan.probe)
    with ExitStack() as stack:
        detector, settings = opened(options, stack.enter_context)
        tables = {
            "detector": {"dialect": options.dialect, "silence_s": 1.0, **settings},
            "geometry": {
                "photon_energy_eV": scan.photon_energy_eV,
                "detector_distance_m": scan.detector_distance_m,
                "detector_pixel_yx_m": scan.detector_pixel_yx_m,
            },
            "reconstruct": {"size_px": 128, "threads": 2},
        }
        if not native:
            own = getattr(motion, motion.dialect).model_dump()
            tables[f"positions.{motion.dialect}"] = own
            tables["positions"] = {"source": motion.dialect}
        if options.dialect == "pva":
            tables["detector.pva"] = tables["detector"].pop("pva")
        daemon = stack.enter_context(DaemonHarness(folder, tables))
        results = stack.enter_context(
            ResultStream(daemon.settings.results.endpoint, daemon.settings.results.resync_endpoint)
        )
        positions = stack.enter_context(
            PositionSimulator(daemon.positions_endpoint, options=motion)
        )
        detector.wait_for_receiver()
        positions.wait_for_receiver()
        play(scan, detector, positions, "before" if native else "during")
        image = next(image for image in results if image.final)
        assert image.complete, daemon.log
        with Catalogue(daemon.data).open(image.scan_id) as reader:
            assert reader.records()["number"].tolist() == list(range(FRAMES))
            np.testing.assert_array_equal(reader.frames(slice(0, FRAMES)), scan.counts)
    return image


def opened(
    options: DetectorOptions, enter: Callable[[Any], Any]
) -> tuple[SimulatedDetector, dict[str, Any]]:
    """A simulated detector, and what the daemon's ``[detector]`` says of it."""
    if options.dialect == "pva":
        simulator = PvaDetectorSimulator("pva://STAR:Image", options, "127.0.0.1:0")
        server = {"servers": [simulator.server]}
        return enter(simulator), {"endpoint": simulator.endpoint, "pva": server}
    detector = enter(DetectorSimulator(options=options))
    return detector, {
        "endpoint": detector.endpoints[0],
        "more_endpoints": list(detector.endpoints[1:]),
        "socket": "sub" if options.dialect in PUBLISHERS else "pull",
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_image_is_that_of_natively_sent_frames(
    way: str, scan: ScanFile, natively: Image, tmp_path: Path
) -> None:
    options = WAYS[way]
    if options.dialect == "pva" and WITHOUT_LIBRARY:
        pytest.skip("pip install '.[pva]'")
    check(streamed(scan, options, tmp_path), natively)


@pytest.mark.parametrize("dialect", POSITIONERS)
def test_the_image_is_that_of_natively_sent_positions(
    dialect: str, scan: ScanFile, natively: Image, tmp_path: Path
) -> None:
    check(streamed(scan, NATIVE, tmp_path, POSITIONERS[dialect]), natively)


def check(image: Image, natively: Image) -> None:
    assert sorted(image.frame_numbers) == list(range(FRAMES))
    assert image.origin_yx_m == natively.origin_yx_m
    seen = np.isfinite(natively.object_yx)
    np.testing.assert_array_equal(np.isfinite(image.object_yx), seen)
    difference = np.abs(image.object_yx - natively.object_yx)[seen]
    assert difference.max() < 1e-4 * np.abs(natively.object_yx[seen]).max()
    assert np.abs(natively.object_yx[seen]).std() > 0.01  # of something
