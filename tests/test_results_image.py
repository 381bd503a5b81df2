"""An image is the smallest rectangle of what was seen, and knows where it lies."""

from dataclasses import replace

import numpy as np
import pytest
from results_source import PIXEL_M, SCANS, TILE_PX, grown, tile

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.images import coloured, phase, save_png
from ptycho_stream.results import Image


def test_it_is_cropped_to_what_was_seen_and_its_origin_follows():
    content = grown(1)
    ((key, whole),) = content.tiles.items()
    weight = np.zeros_like(whole.weight_yx)
    weight[3:10, 5:25] = 1
    partly = replace(
        whole, object_yx=np.where(weight > 0, whole.object_yx, np.nan), weight_yx=weight
    )
    image = Image(replace(content, tiles={key: partly}))
    assert image.object_yx.shape == image.weight_yx.shape == (7, 20)
    assert np.isfinite(image.object_yx).all()
    expected = np.array([key[0] * TILE_PX + 3, key[1] * TILE_PX + 5]) * PIXEL_M
    np.testing.assert_allclose(image.origin_yx_m, expected)


def test_tiles_that_were_never_reached_are_nan_between_others():
    content = replace(grown(0), tiles={(0, 0): tile(1, 2.0), (1, 2): tile(1, 3.0)})
    image = Image(content)
    assert image.object_yx.shape == (2 * TILE_PX, 3 * TILE_PX)
    assert np.isnan(image.object_yx[0, -1]) and image.weight_yx[0, -1] == 0
    assert abs(image.object_yx[-1, -1]) == pytest.approx(3)


def test_an_image_of_nothing_is_empty():
    image = Image(grown(0))
    assert image.object_yx.shape == (0, 0) and image.origin_yx_m == (0, 0)
    assert "0 frames in 0 tiles" in repr(image) and SCANS[0] in repr(image)


def test_stray_tiles_do_not_make_it_larger_than_memory(tmp_path):
    image = Image(replace(grown(0), tiles={(0, 0): tile(1, 1.0), (9999, 9999): tile(1, 1.0)}))
    with pytest.raises(FileFormatError, match="stray positions"):
        image.save(tmp_path / "image.npz")
    assert not list(tmp_path.iterdir())


def test_only_the_last_image_of_a_whole_scan_is_complete():
    over = grown(2, state="complete", final=True)
    assert Image(over).complete
    assert not Image(over, settled=False).final
    assert not Image(grown(2, state="aborted", final=True)).complete


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="no pixel"):
        save_png(Image(grown(0)), tmp_path / "preview.png")


def test_the_phase_is_shown_about_its_mean_so_that_it_does_not_wrap():
    object_yx = np.exp(1j * (np.pi + np.linspace(-0.5, 0.5, 50)[None])).astype(np.complex64)
    np.testing.assert_allclose(phase(object_yx)[0], np.linspace(-0.5, 0.5, 50), atol=1e-5)
    unseen = np.full((2, 2), np.nan, np.complex64)
    assert np.isnan(phase(unseen)).all() and coloured(phase(unseen)).shape == (2, 2, 3)
