"""Layers beside the image: only what is new is sent, and what comes is what was made."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from results_source import SCANS, Source, free_ports, grown

from ptycho_stream.client import AsyncLayerReader, LayerReader
from ptycho_stream.errors import EndpointError, LimitExceeded, MalformedMessage
from ptycho_stream.results import MISFIT_BIN_PX, ImageState, MisfitTile, Tile
from ptycho_stream.wire.layers import Layer, LayerUpdate, decode_layer, encode_layer

SIDE = 32 // MISFIT_BIN_PX


def misfit(version: int, value: float) -> MisfitTile:
    return MisfitTile(version, np.full((SIDE, SIDE), value, np.float32))


def refined(step: int, misfits: dict[tuple[int, int], MisfitTile], **changes: object) -> ImageState:
    """An image that physics has polished: what the network made is another layer of it."""
    image = grown(step)
    tiles = {
        key: replace(tile, version=tile.version + 1000, object_yx=2 * tile.object_yx)
        for key, tile in image.tiles.items()
    }
    told = {"layer": "refined", "tiles": tiles, "predicted": image.tiles, "misfit": misfits}
    return replace(image, **{**told, **changes})


def update(name="misfit", **changes) -> LayerUpdate:
    tiles = {(0, -1): misfit(3, 0.5)} if name == "misfit" else grown(3).tiles
    content = Layer(name, SCANS[0], 2, 32, (1e-9, 2e-9), tiles)
    return replace(LayerUpdate(7, "e", False, content), **changes)


def sent(what: LayerUpdate) -> list[bytes]:
    return [bytes(part) for part in encode_layer(what)]


@pytest.mark.parametrize("name", ["misfit", "predicted"])
def test_a_layer_is_read_back_as_it_was_sent(name):
    before = update(name, more=True)
    after = decode_layer(sent(before))
    assert isinstance(after, LayerUpdate)
    assert (after.reply_to, after.epoch, after.more) == (7, "e", True)
    was, read = before.content, after.content
    assert (read.name, read.scan_id, read.generation) == (name, SCANS[0], 2)
    assert (read.tile_px, read.pixel_yx_m) == (32, (1e-9, 2e-9))
    assert read.tiles.keys() == was.tiles.keys()
    for key, tile in was.tiles.items():
        assert read.tiles[key].version == tile.version
    for one, other in zip(was.joined(), read.joined(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tile_px": 100_000}, LimitExceeded),
        ({"tile_px": 0}, LimitExceeded),
        ({"tiles": [[0, 0, 1], [0, 1, 1]]}, MalformedMessage),
        ({"tile_px": 64}, MalformedMessage),
        ({"layer": "secret"}, MalformedMessage),
        ({"v": 2}, MalformedMessage),
    ],
)
def test_what_is_no_layer_is_refused(change, error):
    header, *blobs = sent(update())
    raw = msgspec.msgpack.decode(header) | change
    with pytest.raises(error):
        decode_layer([msgspec.msgpack.encode(raw), *blobs])
    with pytest.raises(MalformedMessage):
        decode_layer([])


def test_a_reader_gets_what_the_network_made_beside_the_refined_image():
    with Source() as source, LayerReader("predicted", source.endpoints[1]) as reader:
        assert reader.read() is None, "there is no image yet"
        source.publish(grown(5))
        layer = reader.read()
        assert layer is not None and layer.scan_id == SCANS[0]
        source.publish(refined(6, {}))
        object_yx, corner_yx_px = reader.read().joined()
        wanted, _, corner = _stitched(grown(6).tiles)
        np.testing.assert_array_equal(object_yx, wanted)
        assert corner_yx_px == corner


def _stitched(tiles: dict[tuple[int, int], Tile]):
    from ptycho_stream.results import stitch

    return stitch(tiles, 32)


def test_only_tiles_that_are_new_travel():
    tiles = {(0, 0): misfit(1, 0.1), (0, 1): misfit(1, 0.2)}
    with Source() as source, LayerReader("misfit", source.endpoints[1]) as reader:
        source.publish(refined(3, tiles))
        first = reader.read()
        assert first.tiles.keys() == tiles.keys()
        # Nothing else has changed: the publisher has nothing to send, and knows it all the same.
        assert source.publish(refined(3, {**tiles, (0, 1): misfit(2, 0.3)})).messages == 0
        second = reader.read()
        assert second.tiles[0, 0] is first.tiles[0, 0]
        assert second.tiles[0, 1].version == 2
        excess, corner = second.joined()
        assert excess.shape == (SIDE, 2 * SIDE) and corner == (0, 0)
        assert excess[0, -1] == np.float32(0.3)
        source.publish(refined(3, {(5, 5): misfit(1, 0.7)}, generation=2))
        assert list(reader.read().tiles) == [(5, 5)], "of another generation nothing is kept"


def test_a_large_layer_comes_in_several_answers():
    with Source() as source, LayerReader("predicted", source.endpoints[1]) as reader:
        image = grown(20, tile_px=256, tiles=20)
        source.publish(image)
        assert reader.read().tiles.keys() == image.tiles.keys()


def test_readers_of_asyncio_get_the_same():
    async def main(endpoint: str) -> list[tuple[int, int]]:
        async with AsyncLayerReader("misfit", endpoint, scan_id=SCANS[0]) as reader:
            layer = await reader.read()
            assert layer is not None and (await reader.read()) is not None
            return list(layer.tiles)

    with Source() as source:
        source.publish(refined(3, {(2, 3): misfit(1, 0.4)}))
        source.publish(grown(3, SCANS[1]))
        assert asyncio.run(main(source.endpoints[1])) == [(2, 3)]


def test_a_daemon_that_is_not_there_is_said():
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    silent = LayerReader("misfit", endpoint, timeout_s=0.1)
    with silent as reader, pytest.raises(EndpointError, match="resync_endpoint"):
        reader.read()

    async def main() -> None:
        async with AsyncLayerReader("misfit", endpoint, timeout_s=0.1) as reader:
            await reader.read()

    with pytest.raises(EndpointError, match="is ptycho-streamd running"):
        asyncio.run(main())
    with LayerReader("misfit", "nonsense") as reader, pytest.raises(EndpointError, match="connect"):
        reader.read()


def test_files_keep_the_misfit(tmp_path):
    from ptycho_stream.files.image_npz import load_image
    from ptycho_stream.results import Image

    image = Image(refined(3, {(-1, -1): misfit(1, 0.1), (0, 0): misfit(1, 0.2)}))
    image.save(tmp_path / "image.npz")
    with np.load(tmp_path / "image.npz") as held:
        np.testing.assert_array_equal(held["misfit"], image.misfit_yx)
        # The middle of the first four pixels of canvas row and column -32, 5 nm each.
        np.testing.assert_allclose(held["misfit_origin_yx_m"], (-32 + 1.5) * 5e-9)
    again = load_image(tmp_path / "image.npz")
    seen, was = again.misfit_yx, image.misfit_yx
    np.testing.assert_array_equal(seen[np.isfinite(seen)], was[np.isfinite(was)])
    y, x = np.argwhere(np.isfinite(seen))[0] * MISFIT_BIN_PX + again.misfit_corner_yx_px
    assert (y, x) == (-32, -32)
