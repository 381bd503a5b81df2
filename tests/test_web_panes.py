"""Panes catch up with the newest picture: what is sent is what has changed, and never too much."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_mirror import PageMirror
from results_source import grown

from ptycho_stream.errors import ControlError
from ptycho_stream.results import Image, ImageState, MisfitTile, Tile
from ptycho_stream.wire import control
from ptycho_stream.wire.stored import StoredImage, image_of
from ptycho_streamd.stored_images import IMAGE_FILE, stored_image
from ptycho_streamd.web import pane as pane_module
from ptycho_streamd.web import pictures as pictures_module
from ptycho_streamd.web.messages import Look
from ptycho_streamd.web.pane import Pane
from ptycho_streamd.web.pictures import GrowingPicture, KeptPicture, Picture

T = 32
PLENTY = 1e9


def tile(seed: int, version: int = 1, part: slice = slice(None)) -> Tile:
    random = np.random.default_rng(seed)
    phase, amplitude = random.normal(0, 0.3, (2, T, T))
    values = np.full((T, T), np.nan, np.complex64)
    weight = np.zeros((T, T), np.float32)
    values[part] = ((1 + 0.1 * amplitude) * np.exp(1j * phase))[part]
    weight[part] = random.random((T, T))[part] + 0.1
    return Tile(version, values, weight)


@pytest.fixture
def picture() -> GrowingPicture:
    held = GrowingPicture(T)
    held.show({(ty, tx): tile(50 + 10 * ty + tx) for ty in range(-2, 2) for tx in range(3)})
    return held


class Page:
    """A pane and what the page makes of what it sends."""

    def __init__(self, **look: Any) -> None:
        self.pane = Pane(Look("a", 1, **look))
        self.mirror = PageMirror()

    def turn(self, picture: Picture, budget: float = PLENTY) -> list[tuple[int, int, int]]:
        update = asyncio.run(self.pane.update(picture, budget))
        if update is None:
            return []
        dropped = [list(place) for place in update.dropped]
        return self.mirror.take(picture.tile_px, update.tiles, update.payload, dropped)

    def all(self, picture: Picture) -> set[tuple[int, int, int]]:
        """Turns until nothing is left."""
        places: set[tuple[int, int, int]] = set()
        while new := self.turn(picture):
            places |= set(new)
        return places


@pytest.mark.parametrize("quantity", ["phase", "amplitude", "coverage"])
def test_a_page_gets_all_tiles_once_and_their_values(picture, quantity):
    page = Page(quantity=quantity)
    assert page.all(picture) == {(0, *key) for key in picture.tiles}
    assert page.turn(picture) == []
    for key, held in picture.tiles.items():
        wanted = {
            "phase": np.angle(held.object_yx),
            "amplitude": np.abs(held.object_yx),
            "coverage": held.weight_yx,
        }[quantity]
        found = page.mirror.values((0, *key))
        # What lies beyond the range, a few pixels in a thousand, is at its end.
        off = np.abs(found - wanted) > 0.51 * page.mirror.step((0, *key))
        assert off.mean() < 0.005


def test_only_tiles_that_have_changed_are_sent_again(picture):
    page = Page()
    page.all(picture)
    changed = replace(picture.tiles[0, 1], object_yx=picture.tiles[0, 1].object_yx * 1j)
    picture.show({**picture.tiles, (0, 1): changed, (5, 5): tile(99)})
    assert page.all(picture) == {(0, 0, 1), (0, 5, 5)}
    # The same tiles once more, as after a resync, are no change.
    picture.show(dict(picture.tiles))
    assert page.turn(picture) == []
    # A change that no page could show is none either.
    nearly = picture.tiles[0, 1].object_yx * np.complex64(1 + 1e-5j)
    picture.show({**picture.tiles, (0, 1): replace(changed, object_yx=nearly)})
    assert page.turn(picture) == []


def test_a_picture_that_changes_all_the_time_stays_within_a_step_on_the_page(picture):
    page = Page(quantity="amplitude")
    random = np.random.default_rng(5)
    for _ in range(12):
        shaken = {
            key: replace(held, object_yx=held.object_yx * (1 + 0.004 * random.normal(size=(T, T))))
            for key, held in picture.tiles.items()
        }
        picture.show(shaken)
        page.all(picture)
    for key, held in picture.tiles.items():
        place = (0, *key)
        off = np.abs(page.mirror.values(place) - np.abs(held.object_yx))
        assert (off > 1.51 * page.mirror.step(place)).mean() < 0.005


def test_a_small_budget_makes_small_messages_and_new_tiles_come_first(picture):
    page = Page()
    sent = page.turn(picture, budget=3 * T * T)
    assert len(sent) == 3
    # From the middle of what is not there yet: rows -2 to 1, columns 0 to 2.
    assert all(abs(ty + 0.5) < 1 and tx == 1 for _, ty, tx in sent[:2])
    assert len(page.turn(picture, budget=0)) == 1, "a turn always gets on by a tile"
    page.all(picture)
    picture.show({key: tile(1000 + i) for i, key in enumerate(picture.tiles)} | {(9, 9): tile(7)})
    first = page.turn(picture, budget=T * T)
    assert first == [(0, 9, 9)]


def test_a_window_limits_what_is_sent_and_the_level_how_fine(picture):
    window = (0, 0, T - 1, T - 1)
    page = Page(window=window)
    assert page.all(picture) == {(0, 0, 0)}
    coarse = Page(level=1)
    assert coarse.all(picture) == {(1, ty, tx) for ty in (-1, 0) for tx in (0, 1)}
    means = coarse.mirror.values((1, 0, 0))[: T // 2, : T // 2]
    blocks = picture.tiles[0, 0].object_yx.reshape(T // 2, 2, T // 2, 2).mean((1, 3))
    off = np.abs(means - np.angle(blocks)) > 0.51 * coarse.mirror.step((1, 0, 0))
    assert off.mean() < 0.01
    assert np.isnan(coarse.mirror.values((1, 0, 1))[:, T // 2 :]).all(), "there is no fourth column"
    assert Page(level=16).all(picture) == {(5, 0, 0), (5, -1, 0)}


def test_of_a_window_with_too_many_tiles_a_coarser_level_is_sent(picture, monkeypatch):
    monkeypatch.setattr(pane_module, "MAX_SENT_BYTES", 12 * T * T)
    page = Page()
    assert {level for level, _, _ in page.all(picture)} == {1}


def test_a_page_forgets_what_it_has_not_looked_at_for_longest(picture, monkeypatch):
    monkeypatch.setattr(pane_module, "MAX_SENT_BYTES", 4 * T * T)
    page = Page(window=(0, 0, 10, 10))
    for column in (0, 1, 2):
        for row in (0, 1):
            at = T * row + 5, T * column + 5
            page.pane.wish(Look("a", 1, window=(*at, *at)))
            page.all(picture)
    assert set(page.mirror.levels) == {(0, ty, tx) for ty in (0, 1) for tx in (1, 2)}
    page.pane.wish(Look("a", 1, window=(0, 0, 5, 5)))
    assert page.all(picture) == {(0, 0, 0)}, "it is sent whole again"


def test_another_wish_begins_anew_and_a_moved_window_does_not(picture):
    page = Page()
    page.all(picture)
    page.pane.picture = 7
    page.pane.wish(Look("a", 1, window=(0, 0, 5, 5)))
    assert page.pane.picture == 7
    page.pane.wish(Look("a", 2, quantity="amplitude"))
    assert page.pane.picture is None


def test_a_wish_that_changes_while_tiles_are_fetched_makes_no_mixture(picture):
    page = Page()

    class Changing(GrowingPicture):
        async def tile(self, quantity: Any, level: int, key: Any) -> Any:
            page.pane.wish(Look("a", 2, quantity="amplitude"))
            return await super().tile(quantity, level, key)

    changing = Changing(T)
    changing.show(picture.tiles)
    assert page.turn(changing) == []


def test_a_tile_that_cannot_be_read_just_now_costs_no_other(picture):
    page = Page()

    class Troubled(GrowingPicture):
        read = 0

        async def tile(self, quantity: Any, level: int, key: Any) -> Any:
            self.read += 1
            if self.read == 3:
                raise ControlError("timeout", "the disk is too slow: try again")
            return await super().tile(quantity, level, key)

    troubled = Troubled(T)
    troubled.show(picture.tiles)
    assert len(page.turn(troubled)) == 2, "those that were read before it are sent"
    assert page.all(troubled) | set(page.mirror.levels) == {(0, *key) for key in picture.tiles}
    troubled.read = 2
    with pytest.raises(ControlError):
        Page().turn(troubled)


def test_tiles_that_look_the_same_take_no_more_time_than_others(picture, monkeypatch):
    page = Page()
    page.all(picture)
    monkeypatch.setattr(pane_module, "WORK_S", 0.0)
    nearly = np.complex64(1 + 1e-5j)
    picture.show(
        {k: replace(held, object_yx=held.object_yx * nearly) for k, held in picture.tiles.items()}
    )
    made: list[Any] = []
    quantised = pictures_module.quantised
    monkeypatch.setattr(
        pictures_module, "quantised", lambda *given: made.append(1) or quantised(*given)
    )
    assert page.turn(picture) == []
    assert len(made) == 1, "a turn gives way to other pages"
    for _ in picture.tiles:
        page.turn(picture)
    assert len(made) == len(picture.tiles), "and the next one goes on with the others"


def test_bounds_are_of_what_was_seen(picture):
    held = GrowingPicture(T)
    assert held.bounds_yx_px is None
    held.show({(0, 0): tile(1, part=np.s_[5:9, 7:30])})
    assert held.bounds_yx_px == (5, 7, 9, 30)
    held.show({**held.tiles, (-1, 2): tile(2, part=np.s_[31:, 3:4])})
    assert held.bounds_yx_px == (-1, 7, 9, 68)


def test_the_misfit_is_shown_on_its_own_grid(picture):
    page = Page(quantity="misfit")
    assert page.all(picture) == set()
    excess = np.arange(64, dtype=np.float32).reshape(8, 8) / 100
    picture.show_misfit({(0, 0): MisfitTile(1, excess), (1, 0): MisfitTile(1, 0 * excess)})
    assert page.all(picture) == {(2, 0, 0)}
    found = page.mirror.values((2, 0, 0))
    assert np.abs(found[:8, :8] - excess).max() <= page.mirror.step((2, 0, 0))
    assert np.isnan(found[16:]).all()
    picture.show_misfit({**picture.misfit, (1, 0): MisfitTile(2, 0 * excess + 0.4)})
    assert page.all(picture) == {(2, 0, 0)}


# -- images that are kept with their scans -------------------------------------------------------


class StoreClient:
    """The control client of a kept picture, which asks the real command without a socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0

    async def image(self, scan_id: str, snapshot: str | None = None, **more: Any) -> StoredImage:
        self.asked += 1
        arguments = {"scan_id": None, "snapshot": snapshot, **more}
        request = control.decode_request(control.encode_request(1, "image", arguments))
        return image_of(stored_image(self.folder, request.arguments))


def kept(folder: Path, state: ImageState) -> tuple[KeptPicture, StoreClient]:
    Image(state).save(folder / IMAGE_FILE)
    client = StoreClient(folder)
    image = asyncio.run(client.image("X", parts=["misfit"]))
    return KeptPicture(client, image), client  # type: ignore[arg-type]


def test_a_kept_image_is_shown_as_the_one_that_grew(tmp_path, picture):
    excess = np.random.default_rng(3).random((8, 8)).astype(np.float32)
    misfit = {(-2, 0): MisfitTile(1, excess), (0, 2): MisfitTile(1, excess + 1)}
    state = replace(grown(0), tiles=dict(picture.tiles), misfit=misfit)
    stored, client = kept(tmp_path, state)
    picture.show_misfit(misfit)
    assert stored.bounds_yx_px == picture.bounds_yx_px
    for quantity in ("phase", "amplitude", "coverage", "misfit"):
        for level in (0, 1, 3):
            live, old = (Page(quantity=quantity, level=level) for _ in range(2))
            live.all(picture)
            old.all(stored)
            before, after = whole(live.mirror, T), whole(old.mirror, stored.tile_px)
            np.testing.assert_array_equal(np.isnan(after), np.isnan(before))
            step = max(map(old.mirror.step, old.mirror.levels))
            assert (np.abs(after - before) > 2 * step).mean() < 0.005
    asked = client.asked
    page = Page()
    page.all(stored)
    assert client.asked == asked, "what was made for one page is there for the next"


def whole(mirror: PageMirror, side: int) -> np.ndarray:
    """All tiles joined, cut to what was seen."""
    level = next(iter(mirror.levels))[0]
    assert {place[0] for place in mirror.levels} == {level}
    joined = np.full((2048, 2048), np.nan, np.float32)
    for place in mirror.levels:
        y, x = 1024 + place[1] * side, 1024 + place[2] * side
        joined[y : y + side, x : x + side] = mirror.values(place)
    seen = np.argwhere(np.isfinite(joined))
    (top, left), (bottom, right) = seen.min(0), seen.max(0) + 1
    return joined[top:bottom, left:right]


def test_a_large_misfit_map_comes_binned_and_lies_where_it_should(tmp_path):
    excess = np.zeros((256, 256), np.float32)
    excess[128:, :128] = 1.0
    big = 1024
    tiles = {(0, 0): Tile(1, np.ones((big, big), np.complex64), np.ones((big, big), np.float32))}
    misfit = {(0, n): MisfitTile(1, excess) for n in range(5)}
    state = replace(grown(0), tiles=tiles, tile_px=big, misfit=misfit)
    stored, client = kept(tmp_path, state)
    piece = asyncio.run(client.image("X", parts=["misfit"])).misfit
    assert piece is not None and piece.bin_px == 8
    page = Page(quantity="misfit", level=2, window=(0, 0, 1023, 1023))
    page.all(stored)
    found = page.mirror.values((2, 0, 0))
    assert np.abs(found[130:250, 5:120] - 1).max() < 0.02
    assert np.abs(found[5:120]).max() < 0.02 and np.abs(found[130:, 130:]).max() < 0.02
