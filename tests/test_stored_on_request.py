"""The commands ``frame`` and ``image``: what lies in the store, in answers of bounded size."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_source import grown
from scan_samples import make_frame, make_header, make_scan, write_frames

from ptycho_stream.errors import ControlError, FileFormatError, MalformedMessage, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.results import Image, ImageState, MisfitTile, Tile
from ptycho_stream.scans import Catalogue, ScanWriter
from ptycho_stream.wire import control as wire
from ptycho_stream.wire.stored import StoredFrame, StoredImage, frame_of, image_of
from ptycho_streamd import store_desk
from ptycho_streamd.control import Request
from ptycho_streamd.store_desk import MAX_WAITING, StoreDesk
from ptycho_streamd.stored_frames import StoredFrames
from ptycho_streamd.stored_images import IMAGE_FILE, MAX_PIECE_PX, stored_image

SHAPE = (24, 40)


def arguments(command: str, **changes: Any) -> dict[str, Any]:
    """As they come out of a request, defaults and limits applied."""
    return wire.decode_request(wire.encode_request(1, command, changes)).arguments


@pytest.fixture
def frames(tmp_path: Path) -> Iterator[StoredFrames]:
    held = StoredFrames(Catalogue(tmp_path))
    yield held
    held.close()


def asked(frames: StoredFrames, scan_id: str, **changes: Any) -> StoredFrame:
    told = frames.frame(scan_id, changes.get("frame"), changes.get("look", "view"))
    sent = wire.decode_reply(wire.encode_result(1, told))
    return frame_of(wire.result_of(sent))


# -- frames ------------------------------------------------------------------------------------


def test_the_newest_frame_and_where_it_was_taken(tmp_path, frames):
    scan_id = make_scan(tmp_path, frames=5)
    frame = asked(frames, scan_id, look="stored")
    assert (frame.frame, frame.slot, frame.frames) == (4, 4, 5)
    assert frame.position_yx_m == (4e-6, -4e-6) and frame.bin_px == 1
    good = make_frame(4) < 65534
    np.testing.assert_array_equal(frame.valid_yx, good)
    np.testing.assert_array_equal(frame.counts_yx, np.where(good, make_frame(4), 0))


def test_through_the_view_it_is_what_the_network_sees(tmp_path, frames):
    view = View(16, orientation="flip_y", bad_value_from=60_000)
    scan_id = make_scan(tmp_path, frames=3, size_px=16, views=(view,))
    frame = asked(frames, scan_id, frame=1)
    seen = view.apply(make_frame(1))
    assert frame.counts_yx.shape == (16, 16) and frame.look == "view"
    valid = view.valid(make_frame(0), None)
    np.testing.assert_array_equal(frame.counts_yx, np.where(valid, seen, 0))


def test_a_frame_is_found_by_its_number_wherever_it_lies(tmp_path, frames):
    with ScanWriter.create(tmp_path, make_header(state="running"), 100) as writer:
        write_frames(writer, range(10, 14))
        write_frames(writer, range(3, 4))
        write_frames(writer, range(20, 21), pairs=False)
        writer.commit()
        for number, slot in ((10, 0), (13, 3), (3, 4), (20, 5)):
            frame = asked(frames, writer.scan_id, frame=number, look="stored")
            assert (frame.frame, frame.slot) == (number, slot)
        assert frame.position_yx_m is None
        with pytest.raises(ControlError, match="no frame 5") as refused:
            asked(frames, writer.scan_id, frame=5)
        assert refused.value.code == "not_found"
        # While it grows the newest is another one each time.
        write_frames(writer, range(32, 33))
        writer.commit()
        newest = asked(frames, writer.scan_id, look="stored")
        assert (newest.frame, newest.position_yx_m) == (32, (32e-6, -32e-6))


def test_a_scan_without_frames_or_none_at_all_is_said(tmp_path, frames):
    writer = ScanWriter.create(tmp_path, make_header(), 100)
    with writer, pytest.raises(ControlError, match="no frame yet"):
        asked(frames, writer.scan_id)
    with pytest.raises(StoreError):
        asked(frames, "01JBQ3N8Z5T0V6W7X8Y9ZABCDE")


def test_large_frames_are_summed_into_bins(tmp_path, frames):
    shape = (1500, 2100)
    header = make_header(frame_shape_yx=shape, state="running")
    stored = np.random.default_rng(0).integers(0, 50, shape).astype("<u2")
    stored[0, 0] = 65535
    with ScanWriter.create(tmp_path, header, 1) as writer:
        writer.append(0, stored, 0, 0)
        writer.commit()
        frame = asked(frames, writer.scan_id, look="stored")
    assert frame.bin_px == 3 and frame.counts_yx.shape == (500, 700)
    stored[0, 0] = 0
    wanted = stored.reshape(500, 3, 700, 3).sum((1, 3))
    np.testing.assert_array_equal(frame.counts_yx, wanted)
    assert frame.valid_yx.all()


@pytest.mark.parametrize("change", [{"shape_yx": [3, 3]}, {"counts": 7}, {"shape_yx": None}])
def test_an_answer_that_is_no_frame_is_refused(tmp_path, frames, change):
    told = frames.frame(make_scan(tmp_path, frames=1), None, "view")
    with pytest.raises(MalformedMessage):
        frame_of(told | change)
    del told["slot"]
    with pytest.raises(MalformedMessage):
        frame_of(told)


# -- images ------------------------------------------------------------------------------------


def pixels(tile: Tile, key: tuple[int, int]) -> Tile:
    """A tile whose every pixel is another value, a corner of it unseen."""
    y, x = np.mgrid[:32, :32] + 32 * np.array(key)[:, None, None]
    values = (y + 1j * x).astype(np.complex64)
    weight = np.ones((32, 32), np.float32)
    values[:4, :4], weight[:4, :4] = np.nan, 0
    return replace(tile, object_yx=values, weight_yx=weight)


@pytest.fixture
def image() -> ImageState:
    state = grown(9, layer="refined", trust={"r_factor": 0.2}, verdict="good", reasons=("fits",))
    excess = np.arange(64, dtype=np.float32).reshape(8, 8)
    return replace(
        state,
        tiles={key: pixels(tile, key) for key, tile in state.tiles.items()},
        misfit={(-1, -2): MisfitTile(1, excess), (-1, 1): MisfitTile(4, excess + 100)},
        final=True,
    )


@pytest.fixture
def folder(tmp_path: Path, image: ImageState) -> Path:
    Image(image).save(tmp_path / IMAGE_FILE)
    return tmp_path


def told(folder: Path, **changes: Any) -> StoredImage:
    found = stored_image(folder, arguments("image", scan_id="X", **changes))
    return image_of(wire.result_of(wire.decode_reply(wire.encode_result(1, found))))


def test_words_come_without_arrays(folder, image):
    held = told(folder)
    assert (held.object, held.misfit, held.probe, held.position_yx_m) == (None,) * 4
    words = held.words
    assert words["scan_id"] == image.scan_id and words["layer"] == "refined"
    assert (words["verdict"], words["reasons"]) == ("good", ["fits"])
    assert words["corner_yx_px"] == [-32, -64] and words["shape_yx"] == [32, 128]
    assert words["frames"] == 9 and words["modes"] == 2 and words["final"]
    assert words["metadata"]["sample"] == "siemens star" and words["snapshot"] is None


def test_the_whole_object_comes_as_it_was_kept(folder, image):
    held = told(folder, parts=["object", "probe", "positions", "misfit"])
    whole = Image(image)
    assert held.object.corner_yx_px == (-32, -64) and held.object.bin_px == 1
    np.testing.assert_array_equal(held.object.values_yx, whole.object_yx)
    np.testing.assert_array_equal(held.object.weight_yx, whole.weight_yx)
    np.testing.assert_array_equal(held.probe, image.probe)
    np.testing.assert_array_equal(held.position_yx_m, image.position_yx_m)
    assert held.misfit.corner_yx_px == (-32, -64) and held.misfit.bin_px == 4
    np.testing.assert_array_equal(held.misfit.values_yx, whole.misfit_yx)


def test_a_window_lies_where_it_was_asked_for(folder):
    window = {"corner_yx_px": [-40, 60], "shape_yx": [16, 16], "bin_px": 1}
    piece = told(folder, parts=["object"], **window).object
    values = piece.values_yx
    assert np.isnan(values[:8]).all(), "above the image nothing was seen"
    assert np.isnan(values[:, 4:]).all(), "nor to the right of it"
    assert values[12, 2] == -28 + 62j
    np.testing.assert_array_equal(piece.weight_yx > 0, np.isfinite(values))


def test_bins_are_means_and_lie_on_the_canvas(folder):
    window = {"corner_yx_px": [-32, -64], "shape_yx": [8, 32], "bin_px": 4}
    piece = told(folder, parts=["object"], **window).object
    assert np.isnan(piece.values_yx[0, 0]), "all of it unseen"
    # Canvas rows -28 to -25 and columns -60 to -57.
    assert piece.values_yx[1, 1] == -26.5 - 58.5j
    moved = told(folder, parts=["object"], corner_yx_px=[-30, -62], bin_px=4).object
    assert moved.corner_yx_px == (-32, -64), "bins begin at multiples of their size"


def test_an_answer_is_bounded_however_large_the_image(tmp_path, image):
    tile_px = 512
    one = np.ones((tile_px, tile_px), np.complex64)
    tiles = {(0, n): Tile(1, n * one, np.ones_like(one, np.float32)) for n in range(3)}
    probe = np.ones((5, 600, 600), np.complex64)
    positions = np.zeros((50_000, 2))
    arrays = {"probe": probe, "position_yx_m": positions, "frame_numbers": np.arange(50_000)}
    large = replace(image, tiles=tiles, tile_px=tile_px, **arrays)
    Image(replace(large, misfit={})).save(tmp_path / IMAGE_FILE)
    held = told(tmp_path, parts=["object", "misfit", "probe", "positions"])
    assert held.object.bin_px == 2 and held.object.values_yx.shape == (256, 768)
    assert held.object.values_yx[0, 0] == 0 and held.object.values_yx[0, -1] == 2
    assert held.misfit is None and held.probe.shape == (2, 600, 600)
    assert len(held.position_yx_m) == len(held.frame_numbers) == 16_667, "every third"
    assert held.frame_numbers[:3].tolist() == [0, 3, 6]
    side = int(MAX_PIECE_PX**0.5)
    with pytest.raises(ControlError, match="at once") as refused:
        told(tmp_path, parts=["object"], shape_yx=[side + 1, side], bin_px=1)
    assert refused.value.code == "bad_arguments"


def test_snapshots_are_read_by_name(folder, image):
    (folder / "snapshots").mkdir()
    Image(replace(image, model="other")).save(folder / "snapshots" / "noon.npz")
    held = told(folder, snapshot="noon", parts=["object"])
    assert held.words["model"] == "other" and held.words["snapshot"] == "noon"
    with pytest.raises(ControlError, match="no snapshot 'never'") as refused:
        told(folder, snapshot="never")
    assert refused.value.code == "not_found"


def test_what_is_not_kept_or_damaged_is_said(tmp_path, folder, image):
    with pytest.raises(ControlError, match="no finished image") as refused:
        told(tmp_path / "nowhere")
    assert refused.value.code == "not_found"
    path = folder / IMAGE_FILE
    content = path.read_bytes()
    for damaged in (content[:-2000], b"nothing", content.replace(b"object.npy", b"objekt.npy")):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"image\.npz"):
            told(folder, parts=["object"])
    np.savez_compressed(path, object=np.zeros(3))
    with pytest.raises(FileFormatError, match="compressed"):
        told(folder)


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("image", {"snapshot": "../../etc/passwd"}),
        ("image", {"bin_px": 3}),
        ("image", {"bin_px": 0}),
        ("image", {"shape_yx": [0, 5]}),
        ("image", {"shape_yx": [1 << 30, 1]}),
        ("image", {"corner_yx_px": [1 << 60, 0]}),
        ("image", {"parts": ["secrets"]}),
        ("image", {"parts": ["object"] * 5}),
        ("frame", {"frame": -1}),
        ("frame", {"look": "sideways"}),
    ],
)
def test_arguments_are_checked_before_anything_is_read(command, change):
    with pytest.raises(ControlError) as refused:
        arguments(command, **change)
    assert refused.value.code == "bad_arguments"


# -- the thread --------------------------------------------------------------------------------


@pytest.fixture
def desk() -> Iterator[StoreDesk]:
    def work(what: dict[str, Any]) -> Any:
        time.sleep(what.get("takes_s", 0.0))
        if "fault" in what:
            raise StoreError(what["fault"])
        return what["answer"]

    held = StoreDesk({"work": work})
    yield held
    held.close()


def outcomes(desk: StoreDesk, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        assert select.select([desk.wakes], [], [], 10)[0], "nothing is answered"
        for request, outcome in desk.answered():
            try:
                found.append((request.id, outcome()))
            except (StoreError, ControlError) as error:
                found.append((request.id, error))
    return found


def test_answers_come_in_order_with_their_faults(desk):
    for number, what in enumerate([{"answer": 1, "takes_s": 0.05}, {"fault": "no"}, {"answer": 3}]):
        desk.submit(Request((), number, "work", what))
    first, second, third = outcomes(desk, 3)
    assert (first, third) == ((0, 1), (2, 3))
    assert second[0] == 1 and str(second[1]) == "no"
    assert "work" in desk and "other" not in desk


def test_more_than_it_can_hold_are_refused(desk):
    desk.submit(Request((), 0, "work", {"answer": 0, "takes_s": 0.2}))
    for number in range(1, MAX_WAITING):
        desk.submit(Request((), number, "work", {"answer": number}))
    with pytest.raises(ControlError) as refused:
        desk.submit(Request((), 99, "work", {"answer": 99}))
    assert refused.value.code == "unavailable"
    assert len(outcomes(desk, MAX_WAITING)) == MAX_WAITING


def test_what_waited_too_long_is_not_worked_on(desk, monkeypatch):
    monkeypatch.setattr(store_desk, "PATIENCE_S", 0.05)
    desk.submit(Request((), 0, "work", {"answer": 0, "takes_s": 0.2}))
    desk.submit(Request((), 1, "work", {"answer": 1}))
    (_, first), (_, second) = outcomes(desk, 2)
    assert first == 0 and second.code == "timeout"
