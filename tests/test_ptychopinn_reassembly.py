"""Patches at fractions of a pixel: golden figures, two implementations, orientation end to end."""

import numpy as np
import pytest
from ptychopinn_scans import SIZE, make_scan, write_files

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.ptychopinn import comparators, reassembly
from ptycho_stream.ptychopinn.comparators import TOLERANCE, compare, shift_and_sum
from ptycho_stream.ptychopinn.raw_data import RawData
from ptycho_stream.ptychopinn.reassembly import extract, listed, reassemble

both = pytest.mark.parametrize("implementation", [reassembly, comparators], ids=["ours", "numpy"])


def placed(found, shape=(16, 16)):
    """The result of a reassembly on a canvas that begins at (0, 0)."""
    whole = np.zeros(shape, np.complex64), np.zeros(shape, np.float32)
    (y, x), (height, width) = found.corner_yx_px, found.object_yx.shape
    for canvas, part in zip(whole, (found.object_yx, found.weight_yx), strict=True):
        canvas[y : y + height, x : x + width] = part
    return whole


def weights_of(implementation, x, y):
    """Summed weights of 4 x 4 ones at a centre, on a canvas of 16 x 16."""
    if implementation is comparators:
        ones, place = np.ones((1, 1, 4, 4)), np.reshape([x, y], (1, 1, 2, 1))
        total = shift_and_sum(ones, place, 4, corner_yx_px=(0, 0), shape_yx=(16, 16))
        return total.real
    return placed(reassemble(np.ones((1, 4, 4)), np.array([[x, y]]), 4))[1]


@both
def test_a_patch_on_the_grid_fills_its_pixels_with_weight_one(implementation):
    weight = weights_of(implementation, 8, 8)
    expected = np.zeros((16, 16))
    expected[6:10, 6:10] = 1
    np.testing.assert_allclose(weight, expected, atol=1e-6)


@both
def test_a_patch_off_the_grid_spreads_over_one_pixel_more(implementation):
    weight = weights_of(implementation, 8.25, 7.5)
    rows, columns = np.flatnonzero(weight.any(1)), np.flatnonzero(weight.any(0))
    assert list(rows) == [5, 6, 7, 8, 9] and list(columns) == [6, 7, 8, 9, 10]
    assert weight.sum() == pytest.approx(16, rel=1e-6)
    assert weight[5, 6] == pytest.approx(0.5 * 0.75)
    assert weight[9, 10] == pytest.approx(0.5 * 0.25)


@pytest.fixture
def random_patches():
    rng = np.random.default_rng(0)
    shape = (12, 4, 16, 16)
    patches = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return patches.astype(np.complex64), rng.uniform(-60, 80, (12, 1, 2, 4))


@pytest.mark.parametrize("M", [2, 10, 16])
@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_shift_and_sum_for_any_number_of_workers(random_patches, M, workers):
    obj, offsets = random_patches
    patches, centres = listed(obj, offsets)
    found = reassemble(patches, centres, M, workers=workers)
    place = {"corner_yx_px": found.corner_yx_px, "shape_yx": found.object_yx.shape}
    weight = shift_and_sum(np.ones_like(obj), offsets, M, **place).real
    total = shift_and_sum(obj, offsets, M, **place)
    assert compare(found.weight_yx, weight).agrees
    assert compare(found.object_yx * found.weight_yx, total).agrees
    assert TOLERANCE == 5e-5
    reference = comparators.reassemble_position(obj, offsets, M)
    assert compare(found.object_yx, reference).agrees
    np.testing.assert_array_equal(
        reassembly.reassemble_position(obj, offsets, M), reassemble(patches, centres, M).object_yx
    )


def test_the_comparison_notices_what_is_beyond_the_tolerance(random_patches):
    obj, offsets = random_patches
    reference = comparators.reassemble_position(obj, offsets, 16)
    offsets[0, 0, 0, 0] += 1e-3
    moved = comparators.reassemble_position(obj, offsets, 16)
    assert not compare(moved[: len(reference)], reference[: len(moved)]).agrees
    with pytest.raises(PtychoPinnError, match="cannot compare"):
        compare(reference, reference[1:])
    with pytest.raises(PtychoPinnError, match="NaN"):
        compare(reference, reference * np.nan)


def test_the_default_is_the_central_20_pixels():
    found = reassembly.reassemble_position(np.ones((1, 1, 64, 64)), np.zeros((1, 1, 2, 1)))
    assert found.shape == (20, 20) and (found == 1).all()


@both
def test_the_periphery_is_weighted_alike_in_numerator_and_denominator(implementation):
    """Trap: weighted differently, the periphery comes out 1000 times too large."""
    rng = np.random.default_rng(1)
    obj, offsets = np.full((30, 1, 16, 16), 0.7 + 0.2j), rng.uniform(0, 50, (30, 1, 2, 1))
    found = implementation.reassemble_position(obj, offsets, 16)
    seen = found != 0
    assert seen.mean() > 0.5
    np.testing.assert_allclose(found[seen], 0.7 + 0.2j, rtol=1e-5)


def test_a_probe_weighs_both_alike_too():
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:16, 0:16] - 7.5
    power = np.exp(-(y**2 + x**2) / 4)
    patches, centres = np.full((30, 16, 16), 0.7 + 0.2j), rng.uniform(0, 50, (30, 2))
    found = reassemble(patches, centres, 16, power=power)
    seen = found.weight_yx > 0
    assert found.weight_yx[seen].min() < 1e-6
    np.testing.assert_allclose(found.object_yx[seen], 0.7 + 0.2j, rtol=1e-4)


def test_a_probe_decides_between_patches_that_differ():
    power = np.zeros((8, 8))
    power[:, 4:] = 1
    left, right = np.full((8, 8), 2.0), np.full((8, 8), 5.0)
    found = reassemble(np.stack([left, right]), np.array([[4.0, 4.0], [8.0, 4.0]]), 8, power=power)
    # The right half of each counts: [4, 8) is the left patch's, [8, 12) the right one's.
    np.testing.assert_allclose(found.object_yx[0], [0] * 4 + [2] * 4 + [5] * 4)


def test_no_patch_is_dropped_at_the_border():
    """Trap: patches dropped at the border without a count."""
    centres = np.array([[-1000.4, 17.0], [31.0, -250.9], [0.0, 0.0]])
    found = reassemble(np.ones((3, 8, 8)), centres, 8)
    assert found.weight_yx.sum() == pytest.approx(3 * 64, rel=1e-5)
    assert found.corner_yx_px == (-255, -1005)


def test_more_patches_do_not_move_the_others():
    """Trap: a canvas anchored on the moving centre of mass."""
    rng = np.random.default_rng(2)
    patches = rng.standard_normal((6, 8, 8)) + 0j
    centres = rng.uniform(20, 30, (6, 2))
    few = placed(reassemble(patches[:3], centres[:3], 8), (200, 200))[0]
    far = np.concatenate([centres[:3], centres[3:] + 100])
    many = placed(reassemble(patches, far, 8), (200, 200))[0]
    np.testing.assert_allclose(many[:60, :60], few[:60, :60], atol=1e-6)


@pytest.mark.parametrize(
    ("obj", "offsets", "M", "said"),
    [
        ((2, 4, 8, 8), (2, 1, 2, 1), 4, "coords_nn, the position of each patch"),
        ((2, 8, 8, 4), (2, 1, 2, 4), 4, "move the channels"),
        ((2, 8, 8), (2, 1, 2, 1), 4, r"not \(B, C, N, N\)"),
        ((2, 1, 8, 8), (2, 1, 2, 1), 5, "M is 5"),
        ((2, 1, 8, 8), (2, 1, 2, 1), 9, "M is 9"),
        ((0, 1, 8, 8), (0, 1, 2, 1), 4, "needs patches"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(obj, offsets, M, said):
    with pytest.raises(PtychoPinnError, match=said):
        reassembly.reassemble_position(np.ones(obj), np.zeros(offsets), M)


def test_positions_that_are_no_pixels_are_refused():
    patches = np.ones((2, 8, 8))
    with pytest.raises(PtychoPinnError, match="another unit"):
        reassemble(patches, np.array([[0.0, 0.0], [1e9, 1e9]]), 8)
    with pytest.raises(PtychoPinnError, match="finite position"):
        reassemble(patches, np.array([[0.0, 0.0], [np.nan, 1.0]]), 8)
    with pytest.raises(PtychoPinnError, match="0 in its central"):
        reassemble(patches, np.zeros((2, 2)), 4, power=np.pad(np.zeros((6, 6)), 1) + 0.0)
    with pytest.raises(PtychoPinnError, match="not negative"):
        reassemble(patches, np.zeros((2, 2)), 4, power=-np.ones((8, 8)))


# Extraction


def test_extraction_is_the_transpose_of_reassembly():
    rng = np.random.default_rng(3)
    obj = rng.standard_normal((40, 50)) + 1j * rng.standard_normal((40, 50))
    centres = rng.uniform(8, 30, (5, 2))
    patches = rng.standard_normal((5, 12, 12)) + 1j * rng.standard_normal((5, 12, 12))
    windows = extract(obj, centres, 12)
    offsets = np.moveaxis(centres[:, None, :, None], 0, 0)
    place = {"corner_yx_px": (0, 0), "shape_yx": obj.shape}
    total = shift_and_sum(patches[:, None], offsets, 12, **place)
    assert np.vdot(windows, patches) == pytest.approx(np.vdot(obj, total), rel=1e-5)


def test_a_window_is_columns_x_and_rows_y():
    obj = np.arange(20 * 30).reshape(20, 30).astype(complex)
    np.testing.assert_array_equal(extract(obj, np.array([[21.0, 9.0]]), 8)[0], obj[5:13, 17:25])


def test_windows_that_leave_the_object_are_refused():
    for centre in ([3.9, 10], [10, 3.9], [26.1, 10], [10, 16.1]):
        with pytest.raises(PtychoPinnError, match="leaves the object"):
            extract(np.ones((20, 30)) + 0j, np.array([centre]), 8)
    assert extract(np.ones((20, 30)) + 0j, np.array([[4.0, 4.0], [26.0, 16.0]]), 8).all()


# From a simulated scan of an asymmetric sample to its object, four channels a group


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_files(folder, make_scan(80))
    raw = RawData.from_file(folder / "train_data.npz")
    return raw.generate_grouped_data(SIZE, K=8, nsamples=80, gridsize=2, seed=5)


def misfit(grouped, offsets, obj=None):
    """How far a reassembly is from the object, over the object's own contrast."""
    truth = grouped["objectGuess"]
    patches, centres = listed(np.moveaxis(grouped["Y"], -1, 1) if obj is None else obj, offsets)
    found = reassemble(patches, centres, SIZE)
    (y, x), (height, width) = found.corner_yx_px, found.object_yx.shape
    top, left = max(y, 0), max(x, 0)
    part = truth[top : y + height, left : x + width]
    ours = found.object_yx[top - y :, left - x :][: part.shape[0], : part.shape[1]]
    weight = found.weight_yx[top - y :, left - x :][: part.shape[0], : part.shape[1]]
    # Bilinear shifts blur: compare where several patches agree, against the object's contrast.
    seen = weight > 1
    assert seen.sum() > 1000
    contrast = np.abs(part[seen] - part[seen].mean()).mean()
    return float(np.abs(ours - part)[seen].mean() / contrast)


def absolute(grouped, sign=1, swap=False):
    """Positions from offsets and relative coordinates, as a reader of the contract makes them."""
    relative = sign * grouped["coords_relative"]
    offsets = grouped["coords_offsets"]
    if swap:
        relative, offsets = relative[:, :, ::-1], offsets[:, :, ::-1]
    return offsets - relative


@both
def test_known_patches_of_groups_give_the_object(grouped, implementation):
    obj = np.moveaxis(grouped["Y"], -1, 1)
    found = implementation.reassemble_position(obj, grouped["coords_nn"], SIZE)
    assert compare(found, reassembly.reassemble_position(obj, grouped["coords_nn"], SIZE)).agrees
    assert misfit(grouped, grouped["coords_nn"]) < 0.1
    assert misfit(grouped, absolute(grouped)) < 0.1


def test_a_flipped_sign_or_swapped_axis_does_not(grouped):
    """Trap: an offset sign that is flipped and compensated elsewhere, invisible at gridsize 1."""
    right = misfit(grouped, absolute(grouped))
    assert misfit(grouped, absolute(grouped, sign=-1)) > 4 * right
    # Swapped axes move whole groups: far off, so that most windows miss the object.
    swapped = absolute(grouped, swap=True)
    assert misfit(grouped, swapped) > 4 * right
    turned = np.moveaxis(grouped["Y"], -1, 1).swapaxes(-1, -2)
    assert misfit(grouped, absolute(grouped), turned) > 4 * right
    mirrored = np.moveaxis(grouped["Y"], -1, 1)[..., ::-1]
    assert misfit(grouped, absolute(grouped), mirrored) > 4 * right


def test_swapped_channels_do_not(grouped):
    """The channels' order belongs to the positions': patches and offsets have the same."""
    obj = np.moveaxis(grouped["Y"], -1, 1)[:, [1, 0, 3, 2]]
    assert misfit(grouped, grouped["coords_nn"], obj) > 4 * misfit(grouped, grouped["coords_nn"])


def test_merging_moves_content_by_minus_relative(grouped):
    """About a group's mean, each patch is moved by -relative; extracting moves by +relative."""
    group = 3
    truth, mean = grouped["objectGuess"], grouped["coords_offsets"][group, 0, :, 0]
    for channel in range(4):
        relative = grouped["coords_relative"][group, 0, :, channel]
        known = grouped["Y"][group, :, :, channel]
        np.testing.assert_allclose(extract(truth, (mean - relative)[None], SIZE)[0], known)
        merged = reassemble(known[None], (SIZE / 2 - relative)[None], SIZE)
        shift = np.array(merged.corner_yx_px)
        assert np.abs(shift + relative[::-1]).max() < 1
