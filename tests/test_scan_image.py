"""The image of a scan, made from the store without any daemon."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scan_samples import running_header

from ptycho_stream.errors import GeometryError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.saved_image import STATE_FILE
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import (
    PAIR_FLAG_OUT_OF_EXTENT,
    PAIR_RECORD,
    ScanHeader,
    ScanReader,
    ScanWriter,
    new_scan_id,
)
from ptycho_stream.simulate.experiment import simulate_experiment

pytestmark = pytest.mark.usefixtures("place")

SIZE = 64
TILE = 64


@pytest.fixture(scope="module")
def experiment():
    return simulate_experiment(seed=5, frames=60, size_px=SIZE)


@pytest.fixture
def recipe(experiment):
    network, manifest = ModelRegistry().load()
    return Recipe(
        network=network,
        model=manifest.name,
        model_sha256=manifest.sha256,
        probe=experiment.probe,
        photons=None,
        device=torch.device("cpu"),
        batch_frames=16,
    )


@pytest.fixture
def store(experiment, tmp_path):
    """A running scan with its writer, still without frames."""
    header = running_header(
        (SIZE, SIZE), experiment.counts.dtype.str, SIZE, pixel_yx_m=experiment.pixel_yx_m
    )
    with ScanWriter.create(tmp_path, header, frames_per_file=32) as writer:
        yield writer, tmp_path


def write(writer, experiment, numbers, flags=0):
    pairs = np.zeros(len(numbers), PAIR_RECORD)
    for row, number in enumerate(numbers):
        slot = writer.append(
            number, experiment.counts[number], received_ns=0, received_monotonic_ns=0
        )
        y_m, x_m = experiment.positions_yx_m[number]
        pairs["number"][row], pairs["slot"][row], pairs["flags"][row] = number, slot, flags
        pairs["y_m"][row], pairs["x_m"][row] = y_m, x_m
    writer.append_pairs(pairs)
    writer.commit()


def run(image):
    damaged = []
    while image.has_work:
        image.step(16, damaged.extend)
    return damaged


def open_image(store, recipe):
    writer, root = store
    return ScanImage(ScanReader.open(root, writer.header.scan_id), recipe, TILE)


def seen_object(image):
    return Image(image.image(final=False)).object_yx


def test_a_scan_grows_into_an_image_of_the_sample(store, experiment, recipe):
    image = open_image(store, recipe)
    assert not image.has_work and not image.image(final=False).tiles
    write(store[0], experiment, range(20))
    run(image)
    first = image.image(final=False)
    write(store[0], experiment, range(20, 60))
    run(image)
    last = image.image(final=True)
    assert sorted(first.frame_numbers.tolist()) == list(range(20))
    assert sorted(last.frame_numbers.tolist()) == list(range(60))
    assert np.array_equal(last.position_yx_m, experiment.positions_yx_m[last.frame_numbers])
    assert last.counts["reconstructed"] == 60 and last.final and last.generation == 1
    assert all(last.tiles[key].version >= tile.version for key, tile in first.tiles.items())
    obj = seen_object(image)
    phase = np.angle(obj[np.isfinite(obj)])
    assert phase.std() > 0.05  # not a flat image


def test_batching_and_restarts_do_not_change_the_image(store, experiment, recipe):
    write(store[0], experiment, range(60))
    through = open_image(store, recipe)
    run(through)
    expected = seen_object(through)

    broken = open_image(store, recipe)
    broken.step(7, list[int]().extend)
    broken.step(7, list[int]().extend)
    broken.save()
    again = open_image(store, recipe)
    assert again.backlog == 60 - 14
    run(again)
    assert np.allclose(seen_object(again), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert again.current is not None
    assert sorted(again.current.frame_numbers.tolist()) == list(range(60))


def test_a_damaged_state_is_made_again_from_the_frames(store, experiment, recipe):
    write(store[0], experiment, range(20))
    image = open_image(store, recipe)
    run(image)
    image.save()
    path = image.reader.directory / STATE_FILE
    path.write_bytes(path.read_bytes()[:5000])
    again = open_image(store, recipe)
    assert again.current is None and again.has_work
    run(again)
    assert np.array_equal(seen_object(again), seen_object(image), equal_nan=True)


def test_a_state_of_other_pairs_is_not_believed(store, experiment, recipe, tmp_path):
    write(store[0], experiment, range(20))
    image = open_image(store, recipe)
    run(image)
    image.save()
    other = ScanHeader(
        **{f: getattr(store[0].header, f) for f in ScanHeader.__dataclass_fields__}
        | {"scan_id": new_scan_id()}
    )
    with ScanWriter.create(tmp_path, other) as writer:
        write(writer, experiment, range(30, 50))
        reader = ScanReader.open(tmp_path, other.scan_id)
        shutil.copy(image.reader.directory / STATE_FILE, reader.directory / STATE_FILE)
        assert ScanImage(reader, recipe, TILE).current is None


def test_flagged_positions_are_left_out_and_counted(store, experiment, recipe):
    write(store[0], experiment, range(10))
    write(store[0], experiment, range(10, 14), flags=PAIR_FLAG_OUT_OF_EXTENT)
    image = open_image(store, recipe)
    run(image)
    assert image.counts()["reconstructed"] == 10
    assert image.counts()["skipped"] == 4
    assert not image.has_work


def test_frames_with_flipped_bits_are_left_out_and_told(store, experiment, recipe):
    write(store[0], experiment, range(10))
    image = open_image(store, recipe)
    (batch,) = sorted(image.reader.directory.glob("frames-*.bin"))[:1]
    with batch.open("r+b") as file:
        file.seek(3 * experiment.counts[0].nbytes + 100)
        file.write(b"\xff\xfe\xfd")
    assert run(image) == [3]
    assert image.counts()["reconstructed"] == 9


def test_a_change_of_probe_opens_a_generation_that_never_mixes_with_the_old(
    store, experiment, recipe
):
    write(store[0], experiment, range(40))
    image = open_image(store, recipe)
    run(image)
    old = seen_object(image)
    changed = replace(recipe, probe=Probe(experiment.probe.modes * np.exp(0.3j).astype("c8")))
    image.use(changed)
    assert image.has_work
    image.step(16, list[int]().extend)  # 16 of 40: subscribers still see the whole old one
    assert np.array_equal(seen_object(image), old, equal_nan=True)
    state = image.image(final=False)
    assert state.generation == 1
    run(image)
    state = image.image(final=False)
    assert state.generation == 2 and len(state.frame_numbers) == 40
    fresh = open_image(store, changed)
    run(fresh)
    assert np.allclose(seen_object(image), seen_object(fresh), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_while_a_generation_is_rebuilt_new_frames_still_reach_the_image(store, experiment, recipe):
    write(store[0], experiment, range(40))
    image = open_image(store, recipe)
    run(image)
    image.use(replace(recipe, probe=Probe(experiment.probe.modes * np.complex64(1j))))
    image.step(16, list[int]().extend)
    write(store[0], experiment, range(40, 50))
    image.step(16, list[int]().extend)
    state = image.image(final=False)
    assert state.generation == 1 and len(state.frame_numbers) == 50


def test_the_photon_count_does_not_hang_on_timing(store, experiment, recipe):
    """An image that began with one frame is made again once eight are there, and then stays."""
    write(store[0], experiment, range(1))
    early = open_image(store, recipe)
    run(early)
    early.save()
    write(store[0], experiment, range(1, 40))
    run(early)
    late = open_image(store, recipe)
    run(late)
    fresh_path = late.reader.directory / STATE_FILE
    fresh_path.unlink()
    fresh = open_image(store, recipe)
    run(fresh)
    assert early.current is not None and late.current is not None and fresh.current is not None
    photons = fresh.current.identity.photons
    assert photons == pytest.approx(experiment.probe.photons, rel=0.3)
    assert early.current.identity.photons == late.current.identity.photons == photons
    assert early.current.number == 2 and fresh.current.number == 1
    for image in (early, late):
        assert np.allclose(seen_object(image), seen_object(fresh), atol=1e-4, equal_nan=True)


def test_a_sealed_scan_of_few_frames_uses_them_all(store, experiment, recipe):
    write(store[0], experiment, range(2))
    image = open_image(store, recipe)
    run(image)
    write(store[0], experiment, range(2, 5))
    store[0].seal("complete", {})
    image.reader.refresh()
    run(image)
    assert image.current is not None and image.current.identity.photon_frames == 5
    assert image.counts()["reconstructed"] == 5


def correct(writer, number, slot, position_yx_m):
    pairs = np.zeros(1, PAIR_RECORD)
    pairs["number"], pairs["slot"], pairs["revision"] = number, slot, 1
    pairs["y_m"], pairs["x_m"] = position_yx_m
    writer.append_pairs(pairs)
    writer.commit()


def test_a_corrected_position_moves_its_frame_in_a_new_generation(store, experiment, recipe):
    write(store[0], experiment, range(40))
    image = open_image(store, recipe)
    run(image)
    right_yx_m = experiment.positions_yx_m[7] + 1e-7
    correct(store[0], 7, 7, right_yx_m)
    assert image.has_work
    run(image)
    state = image.image(final=True)
    assert state.generation == 2
    assert sorted(state.frame_numbers.tolist()) == list(range(40))
    row = state.frame_numbers.tolist().index(7)
    assert np.array_equal(state.position_yx_m[row], right_yx_m)
    image.save()
    again = open_image(store, recipe)
    assert not again.has_work
    assert np.array_equal(seen_object(again), seen_object(image), equal_nan=True)


def test_a_correction_that_came_in_time_needs_no_new_generation(store, experiment, recipe):
    write(store[0], experiment, range(10))
    correct(store[0], 3, 3, experiment.positions_yx_m[3] + 1e-7)
    image = open_image(store, recipe)
    run(image)
    state = image.image(final=True)
    assert state.generation == 1
    assert sorted(state.frame_numbers.tolist()) == list(range(10))


def test_a_state_of_another_version_is_made_again(store, experiment, recipe):
    write(store[0], experiment, range(10))
    image = open_image(store, recipe)
    run(image)
    image.save()
    path = image.reader.directory / STATE_FILE
    with np.load(path) as held:
        arrays = dict(held)
    arrays["current.identity"] = np.array('{"model": "old", "pixel_yx_m": [1, 1]}')
    np.savez(path, **arrays)
    again = open_image(store, recipe)
    assert again.current is None and again.has_work


def test_a_scan_without_pixel_size_says_what_to_set(store, experiment, recipe):
    writer, root = store
    write(writer, experiment, range(10))
    writer.update_header(pixel_yx_m=None)
    image = ScanImage(ScanReader.open(root, writer.header.scan_id), recipe, TILE)
    assert "[geometry]" in image.problem
    assert not image.has_work
    assert image.image(final=True).tiles == {}


def test_a_probe_of_another_size_is_refused_by_name(store, experiment, recipe):
    write(store[0], experiment, range(10))
    wrong = replace(recipe, probe=Probe(np.ones((1, 32, 32), np.complex64)))
    with pytest.raises(GeometryError, match="probe of 64 pixels"):
        open_image(store, wrong).step(16, list[int]().extend)
