"""``ptycho-stream watch``: see the image grow in the terminal, or fetch it into a file.

On a terminal a live table and a coarse picture, in a pipe a line a second, with ``--json`` a JSON
object for every image.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ResultsEndpoint,
    ResyncEndpoint,
    result_endpoints,
)
from ptycho_stream.errors import EndpointError

if TYPE_CHECKING:
    from ptycho_stream.client import ResultStream
    from ptycho_stream.results import Image

RATE_WINDOW_S = 5.0
LINE_INTERVAL_S = 1.0
# Nothing heard for so long: no daemon, or one that takes long to come back.
SILENCE_ONCE_S = 5.0
SILENCE_S = 30.0
FETCH_TIMEOUT_S = 30.0


class View(Protocol):
    """Where images are shown."""

    def show(self, image: Image) -> None:
        """Show the newest image."""
        ...


class Rate:
    """Frames a second that came into the image, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._scan_id = ""

    def add(self, image: Image) -> float:
        """Note an image; returns the rate, 0 before there are two of a scan."""
        now_s = time.monotonic()
        if image.scan_id != self._scan_id:
            self._seen.clear()
            self._scan_id = image.scan_id
        self._seen.append((now_s, image.frame_numbers.size))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > RATE_WINDOW_S:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def summary(image: Image) -> dict[str, Any]:
    """What a program may want to know of an image besides its pixels."""
    content = image.content
    return {
        "scan_id": image.scan_id,
        "state": image.state,
        "final": image.final,
        "generation": content.generation,
        "layer": content.layer,
        "model": content.model,
        "frames": image.frame_numbers.size,
        "counts": dict(image.counts),
        "shape_yx": list(image.object_yx.shape),
        "origin_yx_m": list(image.origin_yx_m),
        "pixel_yx_m": list(image.pixel_yx_m),
        "latency_ms": round(image.latency_s * 1e3, 3),
        "trust": dict(content.trust),
        "spread": image.spread,
        "collapsed": image.collapsed,
        "metadata": dict(image.metadata),
    }


def warning(image: Image) -> str:
    """What to beware of in this image; empty if nothing."""
    if not image.collapsed:
        return ""
    return (
        f"warning: the output of {image.content.model} has collapsed, its patches do not vary as "
        "the frames say they must: use another model, or train this one for the probe"
    )


def line(image: Image, frames_per_s: float) -> str:
    """One image in words."""
    height, width = image.object_yx.shape
    expected = image.counts.get("expected")
    of_all = f" of {expected}" if expected else ""
    return (
        f"{image.scan_id} {image.state}: {image.frame_numbers.size}{of_all} frames, "
        f"{frames_per_s:.0f} frames/s, {height} x {width} px, generation "
        f"{image.content.generation}, {image.latency_s * 1e3:.1f} ms"
    )


class JsonLines:
    """A JSON object for every image."""

    def show(self, image: Image) -> None:
        """Print it."""
        typer.echo(json.dumps(summary(image), default=str))


class Lines:
    """A line a second, and one for each change of state."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._printed_s = float("-inf")
        self._state = ("", "", False)

    def show(self, image: Image) -> None:
        """Print it, if it is time."""
        rate = self._rate.add(image)
        state = (image.scan_id, image.state, image.final)
        if state != self._state or time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            self._printed_s, self._state = time.monotonic(), state
            typer.echo(line(image, rate))
            if warning(image):
                typer.echo(warning(image))


class Screen:
    """A table and the coarse picture, redrawn in place."""

    def __init__(self, live: Live) -> None:
        self._rate = Rate()
        self._live = live

    def show(self, image: Image) -> None:
        """Redraw."""
        from ptycho_stream.cli.picture import picture_of

        table = self._table(image)
        # Title and frame of the table, and the line of the cursor.
        picture = picture_of(image, spare_rows=table.row_count + 5)
        self._live.update(Group(table, picture), refresh=True)

    def _table(self, image: Image) -> Table:
        table = Table(title=f"scan {image.scan_id}", show_header=False, title_justify="left")
        counts = dict(image.counts)
        ending = " (final)" if image.final else "" if image.settled else " (catching up)"
        height, width = image.object_yx.shape
        table.add_row("state", image.state + ending)
        expected = counts.pop("expected", None)
        of_all = f" of {expected}" if expected else ""
        table.add_row("frames", f"{image.frame_numbers.size}{of_all}")
        table.add_row("counts", ", ".join(f"{name} {n}" for name, n in counts.items() if n))
        table.add_row("rate", f"{self._rate.add(image):.0f} frames/s")
        table.add_row("update", f"{image.latency_s * 1e3:.1f} ms on its way")
        table.add_row("image", f"{height} x {width} px, generation {image.content.generation}")
        table.add_row("model", f"{image.content.model}, {image.content.layer}")
        if warning(image):
            table.add_row("[bold red]collapsed[/]", warning(image))
        for name, value in image.content.trust.items():
            table.add_row(name, f"{value:.4g}")
        for name, value in image.metadata.items():
            table.add_row(name, str(value))
        return table


def watch(
    config: Config = None,
    results: ResultsEndpoint = None,
    resync: ResyncEndpoint = None,
    scan: Annotated[
        str | None, typer.Option(metavar="ID", help="This scan; without it the newest one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Write the image into this file.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Fetch the newest image and end.")] = False,
    until_complete: Annotated[
        bool, typer.Option("--until-complete", help="End with the scan, with its final image.")
    ] = False,
    following: Annotated[
        bool, typer.Option("--next", help="With --until-complete: pass over a scan that is over.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0,
            help="Give up after so many seconds of silence, or, with --until-complete or --once, "
            "of waiting.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch the image of the running scan grow.

    Example: ptycho-stream watch --until-complete --out image.npz --timeout 600
    """
    from ptycho_stream.client import ResultStream

    if once and until_complete:
        raise typer.BadParameter("--once does not go together with --until-complete")
    if following and not until_complete:
        raise typer.BadParameter("--next needs --until-complete")
    endpoints = result_endpoints(config, results, resync)
    silence_s = timeout if timeout is not None else SILENCE_ONCE_S if once else SILENCE_S
    with ResultStream(*endpoints, scan_id=scan, timeout_s=silence_s) as stream:
        if once:
            image = fetch(stream, timeout)
            view: View = JsonLines() if as_json else Lines()
            view.show(image)
        elif until_complete:
            image = _until_complete(stream, following, timeout, as_json)
        else:
            image = _for_ever(stream, as_json)
    if out is not None and image is not None:
        image.save(out)


def fetch(stream: ResultStream, timeout_s: float | None) -> Image:
    """The newest image of a stream.

    Raises:
        EndpointError: there is none, or no daemon.
    """
    image = stream.latest(FETCH_TIMEOUT_S if timeout_s is None else timeout_s)
    if image is None:
        raise EndpointError(
            "the daemon has no image yet: it needs frames with positions; "
            "`ptycho-stream ctl status` says what has come"
        )
    return image


@contextmanager
def open_view(as_json: bool) -> Generator[View]:
    """The view that fits where the output goes; closes the live display at the end."""
    console = Console()
    if as_json:
        yield JsonLines()
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            yield Screen(live)
    else:
        yield Lines()


def _until_complete(
    stream: ResultStream, following: bool, timeout_s: float | None, as_json: bool
) -> Image:
    after = ""
    if following:
        newest = stream.latest(timeout_s)
        after = newest.scan_id if newest is not None and newest.final else ""
    with open_view(as_json) as view:
        return stream.wait_complete(timeout_s=timeout_s, after=after, on_image=view.show)


def _for_ever(stream: ResultStream, as_json: bool) -> Image | None:
    image: Image | None = None
    with open_view(as_json) as view, suppress(KeyboardInterrupt):
        for image in stream:
            view.show(image)
    return image
