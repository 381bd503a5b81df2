"""The misfit of a running scan's newest frames: that of the whole image, however far they lie."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_scan_image import (
    experiment,  # noqa: F401
    open_image,
    recipe,  # noqa: F401
    run,
    store,  # noqa: F401
    write,
)

from ptycho_stream.errors import ModelError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.live_misfit import NEWEST, live_misfit
from ptycho_stream.reconstruct.misfit import compared_frames, stitched_misfit
from ptycho_stream.results import Image
from ptycho_streamd.misfit_watch import MisfitWatch


@pytest.fixture
def image(store, experiment, recipe):  # noqa: F811
    """An image of 60 frames."""
    write(store[0], experiment, range(60))
    image = open_image(store, recipe)
    run(image)
    yield image
    image.reader.close()


def test_it_is_the_misfit_of_the_newest_frames_to_the_stitched_object(image):
    picture = Image(image.image(final=False))
    generation = image.current
    corner, shift = patch_corners(
        picture.positions_yx_m, picture.pixel_yx_m, generation.probe.shape[-1]
    )
    top = np.rint(np.array(picture.origin_yx_m) / picture.pixel_yx_m).astype(int)
    pairs = image.reader.pairs()[generation.ledger.added]
    counts = image.reader.frames(pairs["slot"])
    newest = np.arange(len(pairs))[-NEWEST:]
    margin = generation.probe.shape[-1]  # a window's dark rim may leave the picture
    whole = stitched_misfit(
        np.pad(picture.object_yx, margin, constant_values=complex(np.nan, np.nan)),
        corner[newest] - top + margin,
        shift[newest],
        lambda part: counts[newest[part]],
        Probe(generation.probe),
    )
    live = live_misfit(image)
    assert live.frames == whole.frames > NEWEST // 2
    assert live.excess == pytest.approx(whole.excess, rel=1e-6)
    assert live.r_factor == pytest.approx(whole.r_factor, rel=1e-6)


def test_a_wrong_probe_shows(image, recipe):  # noqa: F811
    right = live_misfit(image)
    modes = recipe.probe.modes
    image.use(replace(recipe, probe=Probe(modes.conj().swapaxes(-1, -2).copy())))
    run(image)
    assert live_misfit(image).excess > 1.2 * right.excess > 0


def test_without_an_image_there_is_none(store, recipe):  # noqa: F811
    image = open_image(store, recipe)
    assert live_misfit(image) is None
    image.reader.close()


def test_no_more_pixels_are_compared_where_frames_are_large():
    compared = [compared_frames(n, NEWEST) for n in (64, 128, 256, 512, 1024)]
    assert compared == [NEWEST, NEWEST, 8, 2, 1]


def test_an_image_that_is_being_made_again_is_not_judged(image, monkeypatch):
    monkeypatch.setattr(image, "following", image.current)
    assert live_misfit(image) is None
    monkeypatch.setattr(image, "following", None)
    assert live_misfit(image) is not None
    identity = image.current.identity
    older = replace(identity, view_version=identity.view_version - 1)
    monkeypatch.setattr(image.current, "identity", older)
    assert live_misfit(image) is None


def test_a_device_without_room_is_an_error_of_the_package(image, monkeypatch):
    def refuse(*_args, **_named):
        raise torch.OutOfMemoryError("no room for 2 GiB")

    monkeypatch.setattr("ptycho_stream.reconstruct.live_misfit.stitched_misfit", refuse)
    with pytest.raises(ModelError, match="no room"):
        live_misfit(image)
    assert MisfitWatch().look(image, torch.device("cpu")) is None


def test_looks_that_take_long_are_rare(image, monkeypatch):
    looks = []

    def slow(*_args):
        looks.append(time.sleep(0.05))

    monkeypatch.setattr("ptycho_streamd.misfit_watch.live_misfit", slow)
    monkeypatch.setattr("ptycho_streamd.misfit_watch.INTERVAL_S", 0.0)
    watch = MisfitWatch()
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        watch.look(image, torch.device("cpu"))
        time.sleep(0.001)
    assert len(looks) == 1
