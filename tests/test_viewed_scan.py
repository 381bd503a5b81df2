"""Frames through a view: which corrections are made, which frames are left out, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scan_samples import make_header

from ptycho_stream.errors import StoreError
from ptycho_stream.geometry import View
from ptycho_stream.scans import (
    FRAME_FLAG_DARK,
    FRAME_FLAG_SKIP,
    PAIR_FLAG_GATED,
    ScanReader,
    ScanWriter,
)
from ptycho_stream.scans.view_data import keep_view_data, view_data
from ptycho_stream.scans.viewed_scan import ViewedScan

SIZE, FRAMES = 32, 20
RNG = np.random.default_rng(4)
COUNTS = RNG.poisson(40.0, (FRAMES, SIZE, SIZE)).astype("<u2")
FLAGS = [FRAME_FLAG_DARK] * 2 + [0] * 3 + [FRAME_FLAG_SKIP] + [0] * 14
I0 = np.where(np.arange(FRAMES) % 3 == 0, 0.0, np.arange(FRAMES) + 1.0)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[ScanReader]:
    header = make_header(frame_shape_yx=(SIZE, SIZE), size_px=SIZE)
    with ScanWriter.create(tmp_path, header, 8) as writer:
        for number in range(FRAMES):
            flags = FLAGS[number]
            slot = writer.append(100 + number, COUNTS[number], 0, 0, flags=flags, i0=I0[number])
            if flags != FRAME_FLAG_DARK:
                gate = PAIR_FLAG_GATED if flags else 0
                writer.append_pair(100 + number, slot, 0.0, 0.0, 0, flags=gate, i0=I0[number])
        writer.seal("complete", {})
    with ScanReader.open(tmp_path, writer.scan_id) as opened:
        yield opened


def keep(reader: ScanReader, values: np.ndarray) -> str:
    return keep_view_data(reader.directory, values)


def test_without_corrections_frames_are_as_stored_and_not_copied(reader):
    scan = ViewedScan(reader)
    shown = scan.counts(slice(9, 12))
    assert not scan.corrects and shown.dtype == np.uint16 and not shown.flags.owndata
    np.testing.assert_array_equal(shown, COUNTS[9:12])
    assert scan.valid.all()


def test_counts_lose_the_background_and_are_divided_by_the_flat_field(reader):
    background = RNG.uniform(0, 60, (SIZE, SIZE))
    flat = RNG.uniform(0.5, 1.5, (SIZE, SIZE))
    flat[3, 4], flat[5, 6], background[7, 8] = 0.0, np.nan, np.nan
    view = View(SIZE, background=keep(reader, background), flat_field=keep(reader, flat))
    scan = ViewedScan(reader, view)
    found = scan.counts([6, 2])
    assert scan.corrects and found.dtype == np.float32 and np.isfinite(found).all()
    expected = np.maximum((COUNTS[[6, 2]] - background) / np.where(flat > 0, flat, 1), 0)
    np.testing.assert_allclose(found[:, scan.valid], expected[:, scan.valid], rtol=1e-5, atol=1e-5)
    assert np.argwhere(~scan.valid).tolist() == [[3, 4], [5, 6], [7, 8]]
    assert (found == 0).any()  # never below


def test_corrections_are_those_of_the_pixels_that_a_view_shows(reader):
    """Turned, off its centre and partly beyond the frame: corrected first would be the same."""
    background, flat = RNG.uniform(0, 9, (SIZE, SIZE)), RNG.uniform(0.5, 1.5, (SIZE, SIZE))
    plain = View(24, center_yx_px=(25.0, 12.0), orientation="transpose")
    view = plain.next(background=keep(reader, background), flat_field=keep(reader, flat))
    found = ViewedScan(reader, view).counts([3])
    expected = plain.apply(np.maximum((COUNTS[[3]] - background) / flat, 0))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_frames_are_scaled_to_the_reading_that_the_view_names(reader):
    scan = ViewedScan(reader, View(SIZE, i0_reference=8.0))
    found = scan.counts(slice(2, 20))
    scale = [8.0 / reading if reading else 1.0 for reading in I0[2:]]
    np.testing.assert_allclose(found, COUNTS[2:] * np.array(scale)[:, None, None], rtol=1e-5)


def test_the_views_mask_adds_to_the_streams(reader):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[1, 2] = True
    turned = View(SIZE, orientation="flip_y", bad_pixels=keep(reader, mask))
    bad = np.argwhere(~ViewedScan(reader, turned).valid).tolist()
    assert bad == [[SIZE - 1, 2]]


def test_dark_gated_and_listed_frames_are_left_out(reader):
    ranges = np.array([[90, 102], [110, 111], [119, 500]])
    scan = ViewedScan(reader, View(SIZE, bad_frames=keep(reader, ranges)))
    pairs = reader.pairs()
    kept = pairs["number"][scan.usable(pairs)].tolist()
    assert kept == [n for n in range(103, 119) if n not in (105, 110, 111)]
    assert scan.first_open(4).tolist() == [3, 4, 6, 7]
    assert len(scan.first_open(1000)) == len(kept)
    every = ViewedScan(reader)
    assert every.usable(pairs).sum() == FRAMES - 3
    assert every.first_open(3).tolist() == [2, 3, 4]


def test_what_a_view_needs_is_kept_once_and_known_by_its_content(reader):
    first, again = keep(reader, np.arange(6.0)), keep(reader, np.arange(6.0))
    assert first == again and len(list(reader.directory.glob("view-*.npy"))) == 1
    np.testing.assert_array_equal(view_data(reader.directory, first), np.arange(6.0))
    (path,) = reader.directory.glob("view-*.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="has been altered"):
        view_data(reader.directory, first)
    path.unlink()
    with pytest.raises(StoreError, match="which the scan's view needs"):
        ViewedScan(reader, View(SIZE, background=first)).counts([0])
    with pytest.raises(StoreError, match="is no digest"):
        view_data(reader.directory, "../../etc/passwd")
