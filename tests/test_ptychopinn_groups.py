"""Frames of a file or of the scan store, and groups of them: the same rules for both."""

import json
from pathlib import Path

import numpy as np
import pytest
from ptychopinn_scans import SIZE, make_scan, write_files

from ptycho_stream.errors import FileFormatError, PtychoPinnError
from ptycho_stream.files.npz import save_arrays
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn.grouping import draw_groups, group_coordinates
from ptycho_stream.ptychopinn.npz_contract import checked
from ptycho_stream.ptychopinn.raw_data import RawData, RawDataTorch
from ptycho_stream.scans import Catalogue

FRAMES = 60


@pytest.fixture(scope="module")
def scan():
    return make_scan(FRAMES)


@pytest.fixture(scope="module")
def file(scan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder, scan)
    return folder / "train_data.npz"


@pytest.fixture(scope="module")
def reader(scan, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    scan_id = store_scan(root, scan)
    with Catalogue(root).open(scan_id) as reader:
        yield reader


@pytest.fixture(params=["RawData", "RawDataTorch"])
def raw(request, file, reader, scan):
    """Both implementations over the same scan."""
    if request.param == "RawData":
        return RawData.from_file(file)
    return RawDataTorch.from_scan(reader, Probe(scan.probe), cache_bytes=1 << 20)


# The result


@pytest.mark.parametrize("gridsize", [1, 2, 3])
def test_names_shapes_and_dtypes_are_the_contract_s(raw, gridsize):
    channels = gridsize**2
    grouped = raw.generate_grouped_data(SIZE, K=10, nsamples=7, gridsize=gridsize, seed=1)
    frames, coords = (7, SIZE, SIZE, channels), (7, 1, 2, channels)
    expected = {
        "diffraction": (frames, np.float32),
        "X_full": (frames, np.float32),
        "coords_offsets": ((7, 1, 2, 1), np.float64),
        "coords_relative": (coords, np.float64),
        "coords_start_offsets": ((7, 1, 2, 1), np.float64),
        "coords_start_relative": (coords, np.float64),
        "coords_nn": (coords, np.float64),
        "coords_start_nn": (coords, np.float64),
        "nn_indices": ((7, channels), np.int32),
    }
    assert set(grouped) == {*expected, "Y", "objectGuess"}
    for name, (shape, dtype) in expected.items():
        assert grouped[name].shape == shape, name
        assert grouped[name].dtype == dtype, name
    if isinstance(raw, RawData):
        assert grouped["Y"].shape == frames and grouped["Y"].dtype == np.complex64
        assert grouped["objectGuess"].ndim == 2
    else:
        assert grouped["Y"] is None and grouped["objectGuess"] is None


def test_channels_hold_the_frames_that_the_indices_name(raw):
    grouped = raw.generate_grouped_data(SIZE, K=6, nsamples=5, gridsize=2, seed=2)
    for group, indices in enumerate(grouped["nn_indices"]):
        for channel, index in enumerate(indices):
            frame = raw.amplitude(np.array([index]))[0]
            np.testing.assert_array_equal(grouped["diffraction"][group, :, :, channel], frame)
            place = grouped["coords_nn"][group, 0, :, channel]
            np.testing.assert_array_equal(place, [raw.xcoords[index], raw.ycoords[index]])


def test_both_implementations_draw_the_same_groups_of_the_same_frames(file, reader, scan):
    held = RawData.from_file(file)
    stored = RawDataTorch.from_scan(reader, Probe(scan.probe))
    options = {"K": 6, "nsamples": 20, "gridsize": 2, "seed": 11}
    of_file = held.generate_grouped_data(SIZE, **options)
    of_store = stored.generate_grouped_data(SIZE, **options)
    np.testing.assert_array_equal(of_file["nn_indices"], of_store["nn_indices"])
    np.testing.assert_allclose(of_file["X_full"], of_store["X_full"], rtol=2e-6)
    # The store's positions count from another origin.
    for name in ("coords_relative", "coords_start_relative"):
        np.testing.assert_allclose(of_file[name], of_store[name], atol=1e-6)
    np.testing.assert_array_equal(held.scan_index, stored.scan_index)


def test_the_normalisation_is_by_the_mean_sum_of_squares(raw):
    grouped = raw.generate_grouped_data(SIZE, K=6, nsamples=20, gridsize=2, seed=1)
    squares = np.square(grouped["X_full"].astype(np.float64)).sum((1, 2))
    assert squares.mean() == pytest.approx((SIZE / 2) ** 2, rel=1e-6)
    ratio = grouped["X_full"] / np.maximum(grouped["diffraction"], 1e-12)
    lit = grouped["diffraction"] > 0
    assert np.ptp(ratio[lit]) < 1e-5 * ratio[lit].mean()


def test_counts_of_16_bits_are_not_squared_in_their_own_dtype():
    """Trap: uint16 squared in its own dtype, 300**2 becomes 24464."""
    counts = np.full((9, 8, 8), 300, np.uint16)
    counts[:, 4, 4] = 60000
    raw = from_counts(counts)
    grouped = raw.generate_grouped_data(8, K=4, nsamples=3, seed=0)
    np.testing.assert_allclose(grouped["diffraction"][..., 0] ** 2, counts[:3], rtol=1e-6)
    squares = np.square(grouped["X_full"].astype(np.float64)).sum((1, 2))
    np.testing.assert_allclose(squares, 16, rtol=1e-6)


# Drawing


def test_the_same_seed_draws_the_same_groups_and_another_others(raw):
    def drawn(seed):
        return raw.generate_grouped_data(SIZE, 6, 20, gridsize=2, seed=seed)["nn_indices"]

    np.testing.assert_array_equal(drawn(5), drawn(5))
    assert (drawn(5) != drawn(6)).any()
    assert (drawn(None) != drawn(None)).any()


def test_single_frames_are_seeds_without_replacement(raw):
    indices = raw.generate_grouped_data(SIZE, 4, FRAMES, seed=3)["nn_indices"][:, 0]
    assert sorted(indices) == list(range(FRAMES))
    assert list(indices) != list(range(FRAMES))


def test_sequential_sampling_takes_the_first_frames(raw):
    options = {"K": 5, "nsamples": 8, "seed": 3, "sequential_sampling": True}
    single = raw.generate_grouped_data(SIZE, **options)
    np.testing.assert_array_equal(single["nn_indices"][:, 0], np.arange(8))
    groups = raw.generate_grouped_data(SIZE, gridsize=2, **options)["nn_indices"]
    for seed, group in enumerate(groups):
        assert set(group) <= set(nearest(raw.coords_xy, seed, 5))


def nearest(coords_xy, seed, count):
    distance = np.hypot(*(coords_xy - coords_xy[seed]).T)
    return [int(i) for i in np.argsort(distance, kind="stable") if i != seed][:count]


def test_groups_are_different_neighbours_without_the_seed():
    rng = np.random.default_rng(4)
    coords = rng.uniform(0, 100, (200, 2))
    groups = draw_groups(coords, gridsize=2, K=6, nsamples=200, seed=1, sequential_sampling=True)
    for seed, group in enumerate(groups):
        assert len(set(group)) == 4
        assert set(group) <= set(nearest(coords, seed, 6))
    # Not always the nearest four: they are drawn from six.
    assert any(set(group) != set(nearest(coords, seed, 4)) for seed, group in enumerate(groups))


def test_a_scan_that_rests_on_a_place_has_groups_too():
    coords = np.zeros((30, 2))
    groups = draw_groups(coords, gridsize=2, K=5, nsamples=30, seed=1, sequential_sampling=True)
    for seed, group in enumerate(groups):
        assert seed not in group and len(set(group)) == 4


@pytest.mark.parametrize(
    ("frames", "options", "said"),
    [
        (3, {"gridsize": 2, "K": 4, "nsamples": 1}, "4 frames; there are 3 frames and K is 4"),
        (50, {"gridsize": 2, "K": 3, "nsamples": 1}, "there are 50 frames and K is 3"),
        (50, {"gridsize": 1, "K": 0, "nsamples": 1}, "K is 0"),
        (4, {"gridsize": 2, "K": 4, "nsamples": 1}, "one more is needed"),
        (50, {"gridsize": 1, "K": 4, "nsamples": 51}, "51 groups.*50 frames"),
        (50, {"gridsize": 1, "K": 4, "nsamples": 0}, "1 to 50"),
    ],
)
def test_too_few_frames_or_neighbours_are_a_value_error(frames, options, said):
    coords = np.random.default_rng(0).uniform(0, 9, (frames, 2))
    with pytest.raises(ValueError, match=said) as refusal:
        draw_groups(coords, seed=0, **options)
    assert isinstance(refusal.value, PtychoPinnError)


def test_the_frame_size_is_checked(raw):
    with pytest.raises(PtychoPinnError, match="N is 64, the frames have 32"):
        raw.generate_grouped_data(64, K=4, nsamples=1)


# Coordinates


def test_a_raster_group_has_the_signs_of_the_contract():
    """Channel c is row c // g, column c % g; relative = -(c - m); axes are [x, y]."""
    coords = np.array([[10.0, 20.0], [14.0, 20.0], [10.0, 26.0], [14.0, 26.0]])
    found = group_coordinates(coords, np.array([[0, 1, 2, 3]]))
    np.testing.assert_array_equal(found.offsets, np.reshape([12.0, 23.0], (1, 1, 2, 1)))
    for channel in range(4):
        row, column = divmod(channel, 2)
        x, y = found.relative[0, 0, :, channel]
        assert x == (2.0 if column == 0 else -2.0)
        assert y == (3.0 if row == 0 else -3.0)
    np.testing.assert_array_equal(found.offsets - found.relative, found.nn)


def test_start_positions_are_their_own(scan, file, tmp_path):
    with np.load(file) as held:
        arrays = dict(held)
    arrays["xcoords_start"] = arrays["xcoords"] + 1
    arrays["ycoords_start"] = arrays["ycoords"] - 2
    save_arrays(tmp_path / "x.npz", arrays)
    raw = RawData.from_file(tmp_path / "x.npz")
    grouped = raw.generate_grouped_data(SIZE, 6, 5, gridsize=2, seed=0)
    moved = grouped["coords_start_nn"] - grouped["coords_nn"]
    np.testing.assert_allclose(moved[:, 0, 0], 1)
    np.testing.assert_allclose(moved[:, 0, 1], -2)
    np.testing.assert_allclose(grouped["coords_start_relative"], grouped["coords_relative"])


# Memory


def test_each_frame_is_held_once_however_many_groups_it_is_in(reader, scan):
    """Trap: each frame stored 28 times."""
    raw = RawDataTorch.from_scan(reader, Probe(scan.probe), cache_bytes=1 << 30)
    assert raw.cached_bytes == 0
    for seed in range(8):
        raw.generate_grouped_data(SIZE, K=10, nsamples=FRAMES, gridsize=3, seed=seed)
    assert raw.cached_bytes == FRAMES * SIZE**2 * 4
    assert raw.draw_groups(10, FRAMES, gridsize=3).nbytes == FRAMES * 9 * 4


def test_the_cache_keeps_to_its_bound_and_changes_nothing(reader, scan):
    probe, frame_bytes = Probe(scan.probe), SIZE**2 * 4
    bounded = RawDataTorch.from_scan(reader, probe, cache_bytes=10 * frame_bytes + 7)
    plain = RawDataTorch.from_scan(reader, probe)
    for seed in (1, 2):
        options = {"K": 6, "nsamples": 30, "gridsize": 2, "seed": seed}
        a, b = (raw.generate_grouped_data(SIZE, **options) for raw in (bounded, plain))
        np.testing.assert_array_equal(a["diffraction"], b["diffraction"])
    assert bounded.cached_bytes == 10 * frame_bytes
    assert plain.cached_bytes == 0


def test_a_subsample_is_part_of_the_frames_in_their_order(raw):
    part = raw.subsample(20, seed=4)
    assert len(part) == 20 and len(raw) == FRAMES
    np.testing.assert_array_equal(part.scan_index, raw.subsample(20, seed=4).scan_index)
    assert (np.diff(part.scan_index) > 0).all()
    where = np.searchsorted(raw.scan_index, part.scan_index)
    np.testing.assert_array_equal(part.amplitude(np.arange(20)), raw.amplitude(where))
    np.testing.assert_array_equal(part.xcoords, raw.xcoords[where])
    with pytest.raises(PtychoPinnError, match="n_subsample is 61"):
        raw.subsample(FRAMES + 1)


def test_bad_pixels_are_dark(tmp_path):
    bad = np.zeros((SIZE, SIZE), bool)
    bad[3, 4] = bad[16, 16] = True
    scan = make_scan(12)
    counts = scan.counts.copy()
    counts[:, bad] = 65535
    store = store_scan(tmp_path, type(scan)(**{**vars(scan), "counts": counts, "bad_pixels": bad}))
    with Catalogue(tmp_path).open(store) as reader:
        raw = RawDataTorch.from_scan(reader, Probe(scan.probe))
        assert (raw.amplitude(np.arange(12))[:, bad] == 0).all()
        np.testing.assert_array_equal(raw.valid, ~bad)
    held = from_counts(counts, bad_pixels=bad)
    assert (held.amplitude(np.arange(12))[:, bad] == 0).all()


# The contract of the arrays


def contents(count=9, size=8, **changes):
    rng = np.random.default_rng(0)
    values = {
        "diff3d": rng.random((count, size, size)).astype(np.float32),
        "xcoords": rng.uniform(10, 20, count),
        "ycoords": rng.uniform(10, 20, count),
        "scan_index": np.arange(count),
        "probeGuess": np.ones((size, size), np.complex64),
        "objectGuess": np.ones((40, 40), np.complex64),
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def from_counts(counts, **changes):
    held = contents(len(counts), counts.shape[-1], diff3d=counts, **changes)
    return RawData(checked(held, "counts", "test"))


def test_the_call_that_ptychodus_makes():
    held = contents()
    raw = RawData.from_coords_without_pc(
        xcoords=held["xcoords"],
        ycoords=held["ycoords"],
        diff3d=held["diff3d"],
        probeGuess=np.stack([held["probeGuess"], 0.1 * held["probeGuess"]]),
        scan_index=np.zeros(9, dtype=int),
        objectGuess=held["objectGuess"],
    )
    assert raw.probeGuess.shape == (2, 8, 8)
    grouped = raw.generate_grouped_data(8, K=7, nsamples=1, gridsize=1)
    assert grouped["X_full"].shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(grouped["coords_start_nn"], grouped["coords_nn"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"diff3d": np.ones((8, 8, 9), np.float32)}, r"\(N, N, M\): move the last axis"),
        ({"diff3d": np.ones((9, 8, 7), np.float32)}, r"9 positions need \(9, N, N\)"),
        ({"diff3d": np.ones((9, 8, 8), complex)}, "not numbers"),
        ({"diff3d": np.full((9, 8, 8), 40.0, np.float32)}, "measurement_domain='counts'"),
        ({"diff3d": np.full((9, 8, 8), -1.0, np.float32)}, "no amplitudes"),
        ({"diff3d": np.full((9, 8, 8), np.nan, np.float32)}, "no amplitudes"),
        ({"xcoords": np.full(9, np.inf)}, "xcoords holds NaN or infinity"),
        ({"ycoords": np.zeros((9, 1))}, r"ycoords is float64 \(9, 1\)"),
        ({"scan_index": np.zeros(9)}, "not integers"),
        ({"scan_index": None}, "scan_index missing"),
        ({"probeGuess": None}, "probeGuess missing"),
        ({"probeGuess": np.ones((8, 8))}, "not complex"),
        ({"probeGuess": np.ones((16, 16), complex)}, r"not complex \(8, 8\)"),
        ({"probeGuess": np.zeros((8, 8), complex)}, "zero everywhere"),
        ({"objectGuess": np.ones((40, 40))}, "objectGuess is float64"),
        ({"Y": np.ones((8, 8, 8), complex)}, r"Y is complex128 \(8, 8, 8\)"),
        ({"bad_pixels": np.zeros((8, 8))}, "bad_pixels is float64"),
        ({"diffraction": np.ones((9, 8, 8))}, "one of diff3d and diffraction"),
        ({"diff3d": None}, "one of diff3d and diffraction"),
    ],
)
def test_arrays_that_break_the_contract_are_refused(changes, said, tmp_path):
    save_arrays(tmp_path / "x.npz", contents(**changes))
    with pytest.raises(PtychoPinnError, match=said) as refusal:
        RawData.from_file(tmp_path / "x.npz", "amplitude")
    assert "x.npz" in str(refusal.value)


def test_the_older_key_is_read_too(tmp_path):
    held = contents()
    held["diffraction"] = held.pop("diff3d")
    save_arrays(tmp_path / "x.npz", held)
    assert len(RawData.from_file(tmp_path / "x.npz", "amplitude")) == 9


# Amplitude or counts: told, never guessed


def test_the_domain_may_be_a_key_of_its_own(tmp_path):
    save_arrays(tmp_path / "x.npz", contents(measurement_domain=np.array("amplitude")))
    assert RawData.from_file(tmp_path / "x.npz").measurement_domain == "amplitude"


def tagged(folder, domain, frames):
    told = np.array(json.dumps({"measurement_domain": domain}))
    save_arrays(folder / "x.npz", contents(diff3d=frames, _metadata=told))
    return folder / "x.npz"


def test_the_domain_has_to_be_told(tmp_path):
    """Trap: amplitude and counts mixed."""
    save_arrays(tmp_path / "x.npz", contents())
    with pytest.raises(PtychoPinnError, match=r"does not tell whether.*measurement_domain"):
        RawData.from_file(tmp_path / "x.npz")
    counts = np.random.default_rng(0).poisson(90, (9, 8, 8)).astype(np.uint16)
    raw = RawData.from_file(tagged(tmp_path, "counts", counts))
    assert raw.measurement_domain == "counts"
    np.testing.assert_allclose(raw.amplitude(np.arange(9)) ** 2, counts, rtol=1e-6)


def test_a_file_s_own_word_is_not_overruled(tmp_path):
    path = tagged(tmp_path, "amplitude", contents()["diff3d"])
    with pytest.raises(PtychoPinnError, match="holds amplitude, as it says itself, and not counts"):
        RawData.from_file(path, "counts")
    assert RawData.from_file(path, "amplitude").measurement_domain == "amplitude"
    with pytest.raises(FileFormatError, match="'intensity', which is none of"):
        RawData.from_file(tagged(tmp_path, "intensity", contents()["diff3d"]))


def test_an_implausible_domain_is_refused(tmp_path):
    counts = np.random.default_rng(0).poisson(90, (9, 8, 8)).astype(np.uint16)
    with pytest.raises(PtychoPinnError, match=r"brightest pixel.*measurement_domain='counts'"):
        RawData.from_file(tagged(tmp_path, "amplitude", counts))
    with pytest.raises(PtychoPinnError, match=r"fractions.*measurement_domain"):
        RawData.from_file(tagged(tmp_path, "counts", contents()["diff3d"]))
    signed = counts.astype(np.int32)
    signed[3, 3, 3] = -1
    with pytest.raises(PtychoPinnError, match="not negative"):
        RawData.from_file(tagged(tmp_path, "counts", signed))


def test_pickled_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **contents(), extra=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FileFormatError, match="Python objects"):
        RawData.from_file(path, "amplitude")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileFormatError, match=r"x\.npz"):
        RawData.from_file(path, "amplitude")
    save_arrays(path, contents(_metadata=np.array("{")))
    with pytest.raises(FileFormatError, match="_metadata is not JSON"):
        RawData.from_file(path, "amplitude")
    for photons in (0, "many", float("nan")):
        save_arrays(path, contents(_metadata=np.array(json.dumps({"nphotons": photons}))))
        with pytest.raises(PtychoPinnError, match="nphotons of _metadata"):
            RawData.from_file(path, "amplitude")


# Known patches


def test_known_patches_come_from_the_object_where_the_windows_lie_in_it():
    held = contents()
    inside = RawData.from_coords_without_pc(**held)
    assert inside.known_patches(np.arange(3)).shape == (3, 8, 8)
    held["xcoords"] = held["xcoords"] + 30
    outside = RawData.from_coords_without_pc(**held)
    assert outside.known_patches(np.arange(3)) is None
    assert outside.generate_grouped_data(8, K=4, nsamples=2)["Y"] is None


def test_patches_that_came_with_the_frames_are_taken(tmp_path):
    known = np.random.default_rng(1).standard_normal((9, 8, 8)) + 0j
    save_arrays(tmp_path / "x.npz", contents(Y=known))
    raw = RawData.from_file(tmp_path / "x.npz", "amplitude")
    grouped = raw.generate_grouped_data(8, K=6, nsamples=4, gridsize=2, seed=0)
    for group, indices in enumerate(grouped["nn_indices"]):
        expected = np.moveaxis(known[indices], 0, -1).astype(np.complex64)
        np.testing.assert_array_equal(grouped["Y"][group], expected)
