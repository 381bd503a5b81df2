"""Where pictures come from: the results socket for what is being made, the store for what is over.

Pages that look at the same scan share a source.  A source is a client of the public protocol like
any other: it subscribes, asks for other layers while somebody looks at them, and reads kept images.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.client import AsyncDaemon, AsyncLayerReader, AsyncResultStream
from ptycho_stream.errors import ControlError, PtychoStreamError, ScanNotFound
from ptycho_stream.keys import ClientKeys
from ptycho_stream.results import Image, MisfitTile, Tile, TileKey
from ptycho_stream.settings import ResultSettings, reachable
from ptycho_stream.wire.layers import Layer, LayerName
from ptycho_streamd.web.byte_tiles import Quantity
from ptycho_streamd.web.pictures import GrowingPicture, KeptPicture, Picture

RETRY_S = 1.0
LOOKED_AT_S = 5.0
"""A layer that no page has looked at for so long is not asked for any more."""
LAYER_PAUSE_S: dict[LayerName, float] = {"predicted": 0.5, "misfit": 1.0}
FORMER_GENERATIONS = 2
KEPT_CHECK_S = 10.0
MAX_METADATA = 20

Part = Literal["shown", "predicted"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What a page is to show of a scan at this moment.

    Attributes:
        picture: its tiles; with another one a page begins anew.
        words: all that is said of it, JSON values.
        frame_numbers: int64 (n,) of the frames in it, only ever appended to.
        position_yx_m: float64 (n, 2), theirs.
        probe: complex64 (modes, N, N).
    """

    picture: Picture
    words: dict[str, Any]
    frame_numbers: NDArray[np.int64]
    position_yx_m: NDArray[np.float64]
    probe: NDArray[np.complex64]


class Source(ABC):
    """Pictures of one scan.  :meth:`run` is its life, as a task that is cancelled in the end.

    Attributes:
        problem: why there is nothing to show; empty if there is, or it is not known.
    """

    problem = ""

    @abstractmethod
    async def run(self) -> None:
        """Keep the pictures up to date."""

    @abstractmethod
    def shown(self, part: Part, generation: int | None, quantity: Quantity) -> Shown | None:
        """What there is to show; None: nothing yet.

        Args:
            part: the image as it is published, or what the network alone made.
            generation: an earlier one; None: that of now.
            quantity: of it that a page shows; what is not sent unasked is asked for then.
        """


class LiveSource(Source):
    """The image of a scan as it grows.

    Args:
        results: endpoints of the daemon.
        keys: to show there; None: none are asked for.
        scan_id: of the scan; None: of the newest.

    Attributes:
        held: of the stream, see :class:`~ptycho_stream.client.AsyncResultStream`.
        image: the newest.
        ended_at: generation and number of the update with the final image of the scan that was
            asked for; None: it has not come.
    """

    def __init__(
        self, results: ResultSettings, keys: ClientKeys | None, scan_id: str | None = None
    ) -> None:
        self._updates, self._resync = (
            reachable(results.endpoint),
            reachable(results.resync_endpoint),
        )
        self._keys, self._scan_id = keys, scan_id
        self._stream: AsyncResultStream | None = None
        self.image: Image | None = None
        self.ended_at: tuple[int, int] | None = None
        self._picture: GrowingPicture | None = None
        self._predicted: GrowingPicture | None = None
        self._former: OrderedDict[int, Shown] = OrderedDict()
        self._looked_at_s: dict[LayerName, float] = {}
        self._misfit: Layer | None = None

    @property
    def held(self) -> dict[str, tuple[int, int]]:
        """Images that the daemon holds."""
        return {} if self._stream is None else self._stream.held

    async def run(self) -> None:
        """See :class:`Source`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            for name in LAYER_PAUSE_S:
                tasks.create_task(self._follow_layer(name))

    async def _follow(self) -> None:
        while True:
            try:
                async with AsyncResultStream(
                    self._updates,
                    self._resync,
                    scan_id=self._scan_id,
                    timeout_s=None,
                    keys=self._keys,
                ) as self._stream:
                    async for image in self._stream:
                        self._take(image)
                    self.ended_at = self.held.get(self._scan_id or "")
                return
            except ScanNotFound as error:
                self.problem = str(error)
                return
            except PtychoStreamError as error:
                log.warning("the results are subscribed to again: %s", error)
                await asyncio.sleep(RETRY_S)

    def _take(self, image: Image) -> None:
        before, self.image = self.image, image
        content = image.content
        if before is not None and self._picture is not None:
            was = before.content
            same_scan = was.scan_id == content.scan_id
            if not same_scan:
                self._former.clear()
            if (was.scan_id, was.generation) != (content.scan_id, content.generation):
                if same_scan and was.tiles:
                    self._keep_former(before, self._picture)
                self._picture = self._predicted = self._misfit = None
            elif was.tile_px != content.tile_px or was.tiles.keys() - content.tiles.keys():
                self._picture = None  # made anew by a daemon that was started again
        if self._picture is None:
            self._picture = GrowingPicture(content.tile_px)
        self._picture.show(content.tiles)

    def _keep_former(self, image: Image, picture: GrowingPicture) -> None:
        """Keep the image of an earlier generation, to be compared with."""
        generation = image.content.generation
        self._former[generation] = self._of(image, picture, "shown")
        while len(self._former) > FORMER_GENERATIONS:
            self._former.popitem(last=False)

    def shown(self, part: Part, generation: int | None, quantity: Quantity) -> Shown | None:
        """See :class:`Source`."""
        image = self.image
        if image is None:
            return None
        if quantity == "misfit":
            self._looked_at_s["misfit"] = time.monotonic()
        if generation is not None and generation != image.content.generation:
            return self._former.get(generation)
        if part == "predicted" and image.layer == "refined":
            self._looked_at_s["predicted"] = time.monotonic()
            return self._predicted and self._of(image, self._predicted, part)
        return self._picture and self._of(image, self._picture, part)

    def _of(self, image: Image, picture: GrowingPicture, part: Part) -> Shown:
        content = image.content
        words = {
            **image.known(),
            "scan_id": content.scan_id,
            "part": part,
            "layer": "predicted" if part == "predicted" else content.layer,
            "frames": int(content.frame_numbers.size),
            "metadata": told_metadata(content.metadata),
            "pixel_yx_m": list(content.pixel_yx_m),
            "snapshot": None,
            "live": True,
            "predicted": content.layer == "refined",
            "former": [
                {"generation": number, "model": held.words["model"]}
                for number, held in self._former.items()
            ],
        }
        return Shown(picture, words, content.frame_numbers, content.position_yx_m, content.probe)

    async def _follow_layer(self, name: LayerName) -> None:
        """Ask for another layer as long as a page shows it."""
        async with AsyncLayerReader(
            name, self._resync, scan_id=self._scan_id, keys=self._keys
        ) as reader:
            while True:
                await asyncio.sleep(LAYER_PAUSE_S[name])
                if time.monotonic() - self._looked_at_s.get(name, 0.0) > LOOKED_AT_S:
                    continue
                try:
                    layer = await reader.read()
                except PtychoStreamError as error:
                    log.debug("layer %s: %s", name, error)
                    continue
                image = self.image
                if layer is None or image is None:
                    continue
                if (layer.scan_id, layer.generation) == (
                    image.scan_id,
                    image.content.generation,
                ):
                    self._take_layer(layer)

    def _take_layer(self, layer: Layer) -> None:
        if layer.name == "misfit":
            if self._picture is not None and self._picture.tile_px == layer.tile_px:
                tiles = cast("dict[TileKey, MisfitTile]", layer.tiles)
                self._picture.show_misfit(tiles)
            return
        if self._predicted is None or self._predicted.tile_px != layer.tile_px:
            self._predicted = GrowingPicture(layer.tile_px)
        self._predicted.show(cast("dict[TileKey, Tile]", layer.tiles))


class KeptSource(Source):
    """An image that is kept with its scan.

    Args:
        daemon: to ask.
        scan_id: of the scan.
        snapshot: its name; None: the scan's final image.
    """

    def __init__(self, daemon: AsyncDaemon, scan_id: str, snapshot: str | None) -> None:
        self._daemon, self._scan_id, self._snapshot = daemon, scan_id, snapshot
        self._shown: Shown | None = None
        self._identity: tuple[Any, ...] = ()

    async def run(self) -> None:
        """See :class:`Source`."""
        while True:
            try:
                await self._look()
                self.problem = ""
                await asyncio.sleep(KEPT_CHECK_S)
            except ControlError as error:
                self.problem = str(error)
                await asyncio.sleep(KEPT_CHECK_S if error.code == "not_found" else RETRY_S)
            except PtychoStreamError as error:
                self.problem = str(error)
                await asyncio.sleep(RETRY_S)

    async def _look(self) -> None:
        """Read the image, if it is not the one that was read."""
        words = (await self._daemon.image(self._scan_id, self._snapshot)).words
        if self._identity == _identity(words):
            return
        image = await self._daemon.image(
            self._scan_id, self._snapshot, parts=["misfit", "probe", "positions"]
        )
        assert image.frame_numbers is not None and image.position_yx_m is not None
        assert image.probe is not None
        self._identity = _identity(image.words)
        self._shown = Shown(
            picture=KeptPicture(self._daemon, image),
            words={
                **{key: value for key, value in image.words.items() if key not in _SHAPES},
                "metadata": told_metadata(image.words["metadata"]),
                "part": "shown",
                "live": False,
                "predicted": False,
                "former": [],
            },
            frame_numbers=image.frame_numbers,
            position_yx_m=image.position_yx_m,
            probe=image.probe,
        )

    def shown(self, part: Part, generation: int | None, quantity: Quantity) -> Shown | None:
        """See :class:`Source`."""
        del quantity  # all of them are read with the object
        wrong = part != "shown" or generation is not None
        return None if wrong else self._shown


def told_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a page says of a scan's metadata: the first plain values, not too long."""
    plain = ((name, v) for name, v in metadata.items() if isinstance(v, str | int | float))
    return {str(name)[:60]: str(v)[:200] for name, v in itertools.islice(plain, MAX_METADATA)}


_SHAPES = ("corner_yx_px", "shape_yx", "modes")


def _identity(words: dict[str, Any]) -> tuple[Any, ...]:
    return (
        *(words["scan_id"], words["snapshot"], words["generation"], words["frames"]),
        *(words["sweeps"], words["state"], words["model"], tuple(words["corner_yx_px"])),
    )
