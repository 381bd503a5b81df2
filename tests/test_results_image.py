"""An image is the smallest rectangle of what was seen, and knows where it lies."""

import base64
import io
import re
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image as Picture
from results_source import PIXEL_M, SCANS, TILE_PX, grown, tile

from ptycho_stream.errors import FileFormatError, MissingPackage
from ptycho_stream.files.images import save_png
from ptycho_stream.pictures import coloured, phase
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
    assert "0 frames, 0 x 0 px" in repr(image) and SCANS[0] in repr(image)
    assert image._repr_png_() is None and "nothing seen yet" in image._repr_html_()


def test_stray_tiles_do_not_make_it_larger_than_memory(tmp_path):
    image = Image(replace(grown(0), tiles={(0, 0): tile(1, 1.0), (9999, 9999): tile(1, 1.0)}))
    with pytest.raises(FileFormatError, match="stray positions"):
        image.save(tmp_path / "image.npz")
    assert not list(tmp_path.iterdir())
    assert "2 tiles too far apart" in repr(image)
    assert "2 tiles too far apart" in image._repr_html_() and "<img" not in image._repr_html_()


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


def test_it_says_what_it_is():
    known = {"layer": "refined", "verdict": "good", "trust": {"resolution_nm": 23.7}}
    said = repr(Image(grown(4, **known)))
    assert said == (
        f"<Image of scan {SCANS[0]} (running): 4 frames, 32 x 128 px of 5 x 5 nm, refined, good, "
        "resolution 23.7 nm>"
    )
    assert repr(Image(grown(4))).endswith("5 x 5 nm, predicted>")


@pytest.fixture
def pyplot(monkeypatch):
    from matplotlib import pyplot

    with matplotlib.rc_context({"backend": "agg"}):
        pyplot.switch_backend("agg")
        yield pyplot
        pyplot.close("all")


def test_a_plot_shows_phase_and_amplitude_where_they_are_on_the_stage(pyplot):
    image = Image(grown(4))
    of_phase, of_amplitude = image.plot()
    left, right, bottom, top = of_phase.images[0].get_extent()
    (y_m, x_m), (height, width) = image.origin_yx_m, image.object_yx.shape
    assert (left, top) == pytest.approx(((x_m - 2.5e-9) * 1e6, (y_m - 2.5e-9) * 1e6))
    assert (right - left, bottom - top) == pytest.approx((width * 5e-3, height * 5e-3))
    np.testing.assert_array_equal(of_amplitude.images[0].get_array(), abs(image.object_yx))
    assert "µm" in of_phase.get_xlabel() and SCANS[0] in of_phase.figure.get_suptitle()
    assert len(of_phase.figure.axes) == 4, "each has a colour bar"
    held = io.BytesIO()
    of_phase.figure.savefig(held)
    assert pyplot.get_fignums() == [1]


def test_a_plot_goes_into_axes_that_it_is_given(pyplot):
    given = matplotlib.figure.Figure().subplots(1, 2)
    assert Image(grown(0)).plot(given) == tuple(given)
    assert [ax.texts[0].get_text() for ax in given] == ["nothing seen yet"] * 2
    assert not pyplot.get_fignums()


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"a plot needs .* 'ptycho-stream\[report\]'"):
        Image(grown(4)).plot()


def test_jupyter_shows_a_picture_of_bounded_size_and_words_that_run_nothing():
    image = Image(grown(4, tile_px=400, verdict="good", reasons=("it <fits> & more",)))
    encoded = re.search('base64,([^"]+)"', image._repr_html_())[1]
    assert base64.b64decode(encoded) == image._repr_png_()
    with Picture.open(io.BytesIO(image._repr_png_())) as picture:
        # 1600 x 400 pixels, by blocks of 4 x 4, twice with a gap between
        assert picture.size == (400 + 8 + 400, 100)
    assert "it &lt;fits&gt; &amp; more" in image._repr_html_()
