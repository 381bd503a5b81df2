"""What the image of a scan is made with, and whose probe goes on to the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from daemon_harness import DaemonHarness
from image_bench import SIZE, shipped_recipe
from scan_samples import make_header, make_scan

from ptycho_stream.errors import ModelError, ProbeError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.probe_life import PROBE_FILE
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_streamd.image_store import REQUEST_FILE, ImageStore, Reprocessing

REFINED = Probe(np.random.default_rng(2).normal(size=(3, SIZE, SIZE)).astype(np.complex64))
BEAM: dict[str, Any] = {"size_px": SIZE, "pixel_yx_m": (1e-8, 1e-8)}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return shipped_recipe(simulate_experiment(seed=6, frames=2, size_px=SIZE))


@pytest.fixture
def harness(tmp_path: Path) -> DaemonHarness:
    """For its settings only."""
    return DaemonHarness(tmp_path, {"trust": {"enabled": True}})


@pytest.fixture
def store(harness: DaemonHarness, recipe: Recipe) -> ImageStore:
    made = ImageStore(harness.settings)
    made.recipe = recipe
    return made


@pytest.fixture
def former(harness: DaemonHarness) -> Path:
    """The folder of a scan that is over."""
    scan_id = make_scan(harness.data, 1, **BEAM | {"scan_id": new_scan_id()})
    return scan_directory(harness.data, scan_id)


def next_scan() -> ScanHeader:
    return make_header(**BEAM | {"scan_id": new_scan_id()})


def ended(folder: Path, verdict: str | None, sweeps: float = 20.0) -> Any:
    """An open scan that has been refined and, unless None, judged."""
    layer = SimpleNamespace(shown_sweeps=sweeps, shown_probe=REFINED.modes)
    report = None if verdict is None else SimpleNamespace(verdict=verdict)
    return SimpleNamespace(
        image=SimpleNamespace(refined=layer),
        trust=SimpleNamespace(report=report),
        reader=SimpleNamespace(directory=folder, scan_id=folder.name),
    )


def test_the_probe_of_a_scan_that_went_well_begins_the_next_one(store, former):
    store.keep_probe(ended(former, "good"))
    recipe = store.recipe_for(next_scan())
    np.testing.assert_array_equal(recipe.probe.modes, REFINED.modes)
    assert recipe.model == store.recipe.model
    # The scan itself begins as it did, also when it is opened again.
    header = replace(next_scan(), scan_id=former.name)
    assert store.recipe_for(header) == store.recipe


@pytest.mark.parametrize("verdict", ["probe suspect", "undecided", None])
def test_that_of_another_does_not(store, former, verdict):
    store.keep_probe(ended(former, verdict))
    assert not (former / PROBE_FILE).exists()
    assert store.recipe_for(next_scan()) == store.recipe


def test_nor_one_that_was_hardly_refined(store, former):
    store.keep_probe(ended(former, "good", sweeps=2.0))
    assert not (former / PROBE_FILE).exists()
    scan = ended(former, "good")
    scan.image.refined = None
    store.keep_probe(scan)
    assert not (former / PROBE_FILE).exists()


def test_where_nobody_judges_the_sweeps_decide(harness, store, former):
    harness.write_config({"trust": {"enabled": False}})
    store.settings = harness.settings
    scan = ended(former, None)
    scan.trust = None
    store.keep_probe(scan)
    assert (former / PROBE_FILE).exists()


def test_the_settings_may_keep_to_their_own_probe_or_to_fewer_modes(harness, store, former):
    store.keep_probe(ended(former, "good"))
    told = store.recipe
    store.recipe = replace(told, modes=1)
    assert store.recipe_for(next_scan()).probe.modes.shape == (1, SIZE, SIZE)
    store.recipe = told
    harness.write_config({"probe": {"carry": False}})
    store.settings = harness.settings
    assert store.recipe_for(next_scan()) == store.recipe


def test_another_probe_in_the_settings_begins_anew(store, former):
    store.keep_probe(ended(former, "good"))
    store.recipe = replace(store.recipe, probe=Probe(store.recipe.probe.modes * 2))
    assert store.recipe_for(next_scan()) == store.recipe


def test_a_folder_that_cannot_be_written_costs_the_probe_only(store, former, caplog):
    (former / PROBE_FILE).mkdir()
    store.keep_probe(ended(former, "good"))
    assert "its probe is not kept" in caplog.text


def test_what_a_scan_was_told_holds_until_it_is_told_otherwise(store, former, tmp_path):
    np.savez(tmp_path / "told.npz", probe=REFINED.modes)
    header = replace(next_scan(), scan_id=former.name)
    store.reprocess(former.name, Reprocessing(probe=str(tmp_path / "told.npz")))
    np.testing.assert_array_equal(store.recipe_for(header).probe.modes, REFINED.modes)
    for wrong, error in (
        (Reprocessing(probe=str(tmp_path / "none.npz")), ProbeError),
        (Reprocessing(model="no-such-model"), ModelError),
    ):
        with pytest.raises(error):
            store.reprocess(former.name, wrong)
        np.testing.assert_array_equal(store.recipe_for(header).probe.modes, REFINED.modes)
    store.reprocess(former.name, Reprocessing())
    assert store.recipe_for(header) == store.recipe
    assert (former / REQUEST_FILE).exists()
