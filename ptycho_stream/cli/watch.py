"""``ptycho-stream watch``: see the image grow in the terminal, or fetch it into a file.

On a terminal a live table and a coarse picture, in a pipe a line a second, with ``--json`` a JSON
object for every image.  With ``--fail-on`` it ends with exit status 3 at a bad verdict.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ptycho_stream.cli.image_words import layer_words, line, summary, trust_rows, warning
from ptycho_stream.cli.key_options import client_keys, keyed
from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ResultsEndpoint,
    ResyncEndpoint,
    result_endpoints,
)
from ptycho_stream.cli.verdict_judge import (
    STATUS_VERDICT,
    VerdictJudge,
    VerdictReached,
    wanted_verdicts,
)
from ptycho_stream.errors import EndpointError
from ptycho_stream.verdicts import VERDICTS

if TYPE_CHECKING:
    from ptycho_stream.client import ResultStream
    from ptycho_stream.results import Image

RATE_WINDOW_S = 5.0
LINE_INTERVAL_S = 1.0
# Nothing heard for so long: no daemon, or one that takes long to come back.
SILENCE_ONCE_S = 5.0
SILENCE_S = 30.0
FETCH_TIMEOUT_S = 30.0

_COLOURS = {"good": "bold green", "undecided": "yellow"}


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


class JsonLines:
    """A JSON object for every image."""

    def show(self, image: Image) -> None:
        """Print it."""
        typer.echo(json.dumps(summary(image), default=str))


class Lines:
    """A line a second, and one for each change of state or verdict; reasons with the latter."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._printed_s = float("-inf")
        self._state = ("", "", False, "")

    def show(self, image: Image) -> None:
        """Print it, if it is time."""
        rate = self._rate.add(image)
        state = (image.scan_id, image.state, image.final, image.verdict)
        if state != self._state or time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            told = self._state[0], self._state[3]
            self._printed_s, self._state = time.monotonic(), state
            typer.echo(line(image, rate))
            if (image.scan_id, image.verdict) != told:
                for reason in image.reasons:
                    typer.echo(f"  {reason}")
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
        table.add_row("layer", layer_words(image))
        table.add_row("model", image.content.model)
        if warning(image):
            table.add_row("[bold red]collapsed[/]", warning(image))
        if image.verdict:
            colour = _COLOURS.get(image.verdict, "bold red")
            table.add_row("verdict", Text(image.verdict, colour))
        for reason in image.reasons:
            table.add_row("", Text(reason))
        for name, value in trust_rows(image):
            table.add_row(name, value)
        for name, value in image.metadata.items():
            table.add_row(Text(name), Text(str(value)))
        return table


@keyed
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
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="VERDICT",
            help="End with status 3 as soon as an image has this verdict: "
            f"{', '.join(VERDICTS)}, or suspect for all but good and undecided; repeatable.",
        ),
    ] = None,
    after: Annotated[
        int, typer.Option(metavar="FRAMES", min=0, help="--fail-on: not with fewer in the image.")
    ] = 0,
    hold: Annotated[
        float,
        typer.Option(metavar="S", min=0, help="--fail-on: only if it stands for so many seconds."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Watch the image of the running scan grow.

    Exit status: 0; 1 if it could not be watched to the end that was asked for; 2 for wrong usage;
    3 for a verdict of --fail-on, with the reasons on stderr.

    Example: ptycho-stream watch --until-complete --next --fail-on suspect --out image.npz
    """
    from ptycho_stream.client import ResultStream

    if once and until_complete:
        raise typer.BadParameter("--once does not go together with --until-complete")
    if following and not until_complete:
        raise typer.BadParameter("--next needs --until-complete")
    if not fail_on and (after or hold):
        raise typer.BadParameter("--after and --hold need --fail-on")
    judge = VerdictJudge(wanted_verdicts(fail_on or []), after, hold)
    endpoints = result_endpoints(config, results, resync)
    silence_s = timeout if timeout is not None else SILENCE_ONCE_S if once else SILENCE_S
    keys = client_keys(config)
    with ResultStream(*endpoints, scan_id=scan, timeout_s=silence_s, keys=keys) as stream:
        try:
            if once:
                image = fetch(stream, timeout)
                view: View = JsonLines() if as_json else Lines()
                view.show(image)
                judge.look(image, last=True)
            elif until_complete:
                image = _until_complete(stream, following, timeout, as_json, judge)
            else:
                image = _for_ever(stream, as_json, judge)
            failed = None
        except VerdictReached as reached:
            image, failed = reached.image, reached
    if out is not None and image is not None:
        image.save(out)
    if failed is not None:
        typer.echo(f"failed: {failed}", err=True)
        raise typer.Exit(STATUS_VERDICT)


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
    stream: ResultStream,
    following: bool,
    timeout_s: float | None,
    as_json: bool,
    judge: VerdictJudge,
) -> Image:
    after = ""
    if following:
        newest = stream.latest(timeout_s)
        after = newest.scan_id if newest is not None and newest.final else ""
    with open_view(as_json) as view:

        def look(image: Image) -> None:
            view.show(image)
            judge.look(image, last=image.final)

        return stream.wait_complete(timeout_s=timeout_s, after=after, on_image=look)


def _for_ever(stream: ResultStream, as_json: bool, judge: VerdictJudge) -> Image | None:
    image: Image | None = None
    with open_view(as_json) as view, suppress(KeyboardInterrupt):
        for image in stream:
            view.show(image)
            judge.look(image, last=image.final)
    return image
