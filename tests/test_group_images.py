"""A scan's image made by a network that takes four frames at a time.

The network here is a stub that knows the right patch of every frame: it looks its frame number up
in the frame itself. So every pixel of the image is known beforehand, and a flipped or swapped
offset, a patch that is added twice or one that is lost shows up.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scan_samples import running_header

from ptycho_stream.errors import StoreError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.patches import PatchMaker
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.saved_image import STATE_FILE
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import PAIR_RECORD, ScanReader, ScanWriter

SIZE, TILE, PIXEL_M = 32, 32, 1e-8
COLUMNS, ROWS = 7, 6
FRAMES = COLUMNS * ROWS


def sample():
    """A letter F: no rotation, mirror image or transposition of it is like it."""
    obj = np.full((96, 96), 0.5 + 0j, np.complex64)
    obj[15:80, 25:35] = np.exp(0.7j)
    obj[15:25, 25:70] = np.exp(0.7j)
    obj[40:50, 25:55] = np.exp(0.7j)
    return obj


def corners():
    """Canvas pixels (FRAMES, 2) of the patches' corners: a raster with uneven steps."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:ROWS, :COLUMNS].reshape(2, -1) * 9
    return np.stack([y, x], 1) + rng.integers(0, 3, (FRAMES, 2))


def patch_of(number):
    y, x = corners()[number]
    return sample()[y : y + SIZE, x : x + SIZE]


class KnownPatches(Network):
    """Gives each frame's own patch; with a fault the frames of a group get each other's."""

    group_frames = 4

    def __init__(self, swap=False):
        super().__init__()
        self.groups = []
        self._swap = swap

    def settings_json(self):
        return {}

    def stages(self, amplitude, probe, valid):
        numbers = amplitude[:, 0, 0].square().round().long().tolist()
        assert len(numbers) % 4 == 0
        if any(number < FRAMES for number in numbers):
            self.groups += [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
        if self._swap:
            numbers = [numbers[i ^ 1] for i in range(len(numbers))]
        patches = torch.as_tensor(np.stack([patch_of(number) for number in numbers]))
        return [Prediction(patches, torch.ones_like(amplitude))]


@pytest.fixture
def recipe():
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    probe = np.exp(-(y**2 + x**2) / 60).astype(np.complex64)[None]
    return Recipe(
        network=KnownPatches(),
        model="known",
        model_sha256="0",
        probe=Probe(probe),
        photons=1e3,
        device=torch.device("cpu"),
        batch_frames=16,
    )


@pytest.fixture
def store(tmp_path):
    header = running_header((SIZE, SIZE), "<u2", SIZE, pixel_yx_m=(PIXEL_M, PIXEL_M))
    with ScanWriter.create(tmp_path, header, frames_per_file=32) as writer:
        yield writer, tmp_path


def write(writer, numbers):
    position = (corners() + (SIZE - 1) / 2) * PIXEL_M
    pairs = np.zeros(len(numbers), PAIR_RECORD)
    for row, number in enumerate(numbers):
        counts = np.zeros((SIZE, SIZE), np.uint16)
        counts[SIZE // 2, SIZE // 2] = number
        slot = writer.append(int(number), counts, received_ns=0, received_monotonic_ns=0)
        pairs["number"][row], pairs["slot"][row] = number, slot
        pairs["y_m"][row], pairs["x_m"][row] = position[number]
        pairs["paired_monotonic_ns"][row] = number
    writer.append_pairs(pairs)
    writer.commit()


def open_image(store, recipe):
    writer, root = store
    return ScanImage(ScanReader.open(root, writer.header.scan_id), recipe, TILE)


def run(image, limit=16):
    shown = []
    image.reader.refresh()
    while image.has_work:
        shown += image.step(limit, list[int]().extend).tolist()
    return shown


def expected_object():
    """The weighted mean of patches whose mean is turned real, as the predictor turns them."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    weight = np.exp(-(y**2 + x**2) / 30)
    numerator, denominator = np.zeros((96, 96), complex), np.zeros((96, 96))
    for number, (top, left) in enumerate(corners().tolist()):
        patch = patch_of(number)
        patch = patch * np.exp(-1j * np.angle((patch * weight).sum()))
        numerator[top : top + SIZE, left : left + SIZE] += patch * weight
        denominator[top : top + SIZE, left : left + SIZE] += weight
    seen = denominator > 1e-3
    return np.where(seen, numerator / np.where(seen, denominator, 1), np.nan)


def stitched(image):
    """On the grid of ``expected_object``."""
    picture = Image(image.image(final=False))
    top, left = np.round(np.array(picture.origin_yx_m) / PIXEL_M).astype(int)
    found = np.full((96, 96), np.nan + 0j)
    height, width = picture.object_yx.shape
    found[top : top + height, left : left + width] = picture.object_yx
    return found


def assert_is_the_sample(image):
    """Where both have weight; at the faint edge they may draw the line a pixel apart."""
    found, expected = stitched(image), expected_object()
    both = np.isfinite(found) & np.isfinite(expected)
    assert both.sum() > 0.97 * np.isfinite(expected).sum() > 2000
    np.testing.assert_allclose(found[both], expected[both], atol=1e-3)


def test_the_positions_used_here_lie_on_whole_pixels():
    position = (corners() + (SIZE - 1) / 2) * PIXEL_M
    corner, shift = patch_corners(position, (PIXEL_M, PIXEL_M), SIZE)
    assert np.array_equal(corner, corners()) and np.abs(shift).max() < 1e-6


def test_every_patch_of_a_group_lands_at_its_own_frame(store, recipe):
    write(store[0], range(FRAMES))
    store[0].seal("complete", {})
    image = open_image(store, recipe)
    shown = run(image)
    assert sorted(shown) == list(range(FRAMES))
    assert_is_the_sample(image)
    swapped = open_image(store, replace(recipe, network=KnownPatches(swap=True)))
    run(swapped)
    assert np.nanmax(np.abs(stitched(swapped) - expected_object())) > 0.2  # the test can see it


def test_frames_wait_for_their_group_and_the_last_ones_for_the_end(store, recipe):
    write(store[0], range(3))
    image = open_image(store, recipe)
    assert run(image) == []
    assert image.counts()["waiting"] == 3 and image.counts()["reconstructed"] == 0
    assert image.backlog == 0 and not image.has_work
    assert image.oldest_pending_monotonic_ns() is None
    write(store[0], [3])
    assert image.backlog == 1
    assert sorted(run(image)) == [0, 1, 2, 3]
    write(store[0], range(4, FRAMES))
    run(image)
    waiting = image.counts()["waiting"]
    assert 0 < waiting < FRAMES // 2 and waiting + image.counts()["reconstructed"] == FRAMES
    store[0].seal("complete", {})
    image.reader.refresh()
    assert image.backlog == waiting
    assert len(run(image)) == waiting
    assert "waiting" not in image.counts() and image.counts()["reconstructed"] == FRAMES
    assert_is_the_sample(image)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_scan_of_fewer_frames_than_a_group_has_an_image_too(store, recipe, frames):
    write(store[0], range(frames))
    store[0].seal("complete", {})
    image = open_image(store, recipe)
    run(image)
    assert sorted(image.image(final=True).frame_numbers.tolist()) == list(range(frames))


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_groups_hang_on_the_order_of_pairs_and_not_on_batches(store, recipe, limit):
    write(store[0], range(FRAMES))
    store[0].seal("complete", {})
    groups = []
    for batch in (16, limit):
        network = KnownPatches()
        image = open_image(store, replace(recipe, network=network))
        run(image, batch)
        groups.append(network.groups)
    assert groups[0] == groups[1]


def test_the_totals_do_not_hang_on_the_order_of_arrival(store, recipe):
    write(store[0], np.random.default_rng(1).permutation(FRAMES))
    store[0].seal("complete", {})
    image = open_image(store, recipe)
    run(image)
    assert sorted(image.image(final=True).frame_numbers.tolist()) == list(range(FRAMES))
    assert_is_the_sample(image)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_after_a_kill_no_patch_is_lost_or_added_twice(store, recipe, steps):
    """What was done since the last save is forgotten, as by ``kill -9``, and done again alike."""
    write(store[0], range(FRAMES))
    through_network, killed_network = KnownPatches(), KnownPatches()
    killed = open_image(store, replace(recipe, network=killed_network))
    for _ in range(steps):
        killed.step(7, list[int]().extend)
    killed.save()
    saved_groups = list(killed_network.groups)
    if killed.has_work:
        killed.step(7, list[int]().extend)  # never saved
    again = open_image(store, replace(recipe, network=KnownPatches()))
    run(again, 5)
    store[0].seal("complete", {})
    run(again, 5)
    again_groups = again._recipe.network.groups
    (again.reader.directory / STATE_FILE).unlink()
    through = open_image(store, replace(recipe, network=through_network))
    run(through)
    assert saved_groups + again_groups == through_network.groups
    assert again.current is not None and through.current is not None
    assert again.current.ledger.added.tolist() == through.current.ledger.added.tolist()
    assert sorted(again.current.frame_numbers.tolist()) == list(range(FRAMES))
    np.testing.assert_allclose(stitched(again), stitched(through), atol=1e-5)
    np.testing.assert_allclose(
        Image(again.image(True)).weight_yx, Image(through.image(True)).weight_yx, atol=1e-5
    )


def test_a_batch_that_the_store_could_not_give_is_done_again(store, recipe, monkeypatch):
    write(store[0], range(FRAMES))
    store[0].seal("complete", {})
    undisturbed, disturbed = KnownPatches(), KnownPatches()
    run(open_image(store, replace(recipe, network=undisturbed)))
    image = open_image(store, replace(recipe, network=disturbed))
    make, calls = PatchMaker.make, iter(range(1000))

    def refuse_now_and_then(*given):
        if next(calls) % 3 == 1:
            raise StoreError("the disk is away")
        return make(*given)

    monkeypatch.setattr(PatchMaker, "make", refuse_now_and_then)
    refused = 0
    while image.has_work:
        try:
            image.step(7, list[int]().extend)
        except StoreError:
            refused += 1
    assert refused > 2
    assert disturbed.groups == undisturbed.groups


def test_a_former_knows_the_frames_whose_patches_were_no_numbers(store, recipe):
    write(store[0], range(FRAMES))
    image = open_image(store, recipe)
    run(image)
    generation = image.current
    assert generation is not None
    arrived = generation.ledger.taken
    lost = generation.ledger.added[:4]
    generation.ledger._added = [generation.ledger.added[4:]]
    generation.ledger._skipped = [lost]
    assert len(image._former(generation, 4)._place) == arrived


def test_a_running_scan_changes_to_a_network_of_single_frames_and_back(store, recipe):
    """The other model takes over although some frames wait for their group in the new image."""
    write(store[0], range(30))
    image = open_image(store, recipe)
    run(image)
    network, manifest = ModelRegistry().load()
    image.use(replace(recipe, network=network, model=manifest.name, model_sha256=manifest.sha256))
    run(image)
    state = image.image(final=False)
    assert state.generation == 2 and len(state.frame_numbers) == 30
    image.use(recipe)
    run(image)
    state = image.image(final=False)
    assert state.generation == 3 and state.model == "known"
    assert len(state.frame_numbers) + image.counts()["waiting"] == 30
    write(store[0], range(30, FRAMES))
    store[0].seal("complete", {})
    run(image)
    assert len(image.image(final=True).frame_numbers) == FRAMES
    assert_is_the_sample(image)


def test_the_setting_of_neighbours_opens_a_generation_for_groups_only(store, recipe):
    write(store[0], range(20))
    image = open_image(store, recipe)
    run(image)
    image.use(replace(recipe, neighbours=12))
    assert image.has_work
    run(image)
    assert image.image(final=False).generation == 2
