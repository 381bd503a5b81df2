"""``ptycho-stream reconstruct``: a recorded scan from its file to an image, without a daemon.

The live stage's own code does it (:mod:`ptycho_stream.reconstruct.offline`); this is its face.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from ptycho_stream.cli import measured_options as given
from ptycho_stream.cli.image_words import line, summary
from ptycho_stream.cli.options import AsJson
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.products import ENDINGS, format_of
from ptycho_stream.geometry import Orientation

if TYPE_CHECKING:
    from ptycho_stream.reconstruct.offline import Progress

Setting = str | int | float | bool | Path | tuple[float, float] | None


@given.explained
def reconstruct(
    file: given.ScanArgument,
    choice: MeasuredChoice,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help=f"To write, ending in {', '.join(ENDINGS)}; several times for several files. "
            "[NAME-object.npz and NAME-object.png, here]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A daemon's TOML file, by which it is done."),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="probe.path. [the configuration's, the file's]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="model.name")] = None,
    registry: Annotated[
        Path | None, typer.Option(metavar="DIR", help="model.registry, if not the shipped ones")
    ] = None,
    orientation: Annotated[Orientation | None, typer.Option(help="view.orientation")] = None,
    center: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="Y X", help="view.center_yx_px: zero frequency, pixels"),
    ] = None,
    dc: Annotated[str | None, typer.Option(help="view.dc: center, or corner of the frames")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="refine.seconds; 0: the network's image only")
    ] = None,
    sweeps: Annotated[float | None, typer.Option(min=0.1, help="refine.sweeps")] = None,
    correct_positions: Annotated[
        bool, typer.Option("--correct-positions", help="refine.positions = true")
    ] = False,
    device: Annotated[str | None, typer.Option(help="reconstruct.device")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="reconstruct.threads")] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Keep scan and image in this data directory."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reconstruct a recorded scan, with the probe in its file or another one.

    Prediction, refinement and trust are those of the daemon, with its defaults or the settings of
    --config; the options above go before both. The verdict is printed; the status is 0 whatever
    it is.

    Example: ptycho-stream reconstruct scan.npz --out object.h5 --out object.png

    Example: ptycho-stream reconstruct raw.cxi --config my.toml --seconds 60

    Example: ptycho-stream reconstruct master.h5 --probe probe.npz --y /entry/samy --x /entry/samx
    --position-unit um --out object.cxi
    """
    path = given.scan_path(file, config)
    outputs = out or [Path(f"{_stem(path)}-object{ending}") for ending in (".npz", ".png")]
    for output in outputs:
        if format_of(output) is None:
            raise typer.BadParameter(f"{output}: the name must end in {', '.join(ENDINGS)}")
    tables = _tables(
        {
            "probe.path": probe,
            "model.name": model,
            "model.registry": registry,
            "view.orientation": orientation,
            "view.center_yx_px": center,
            "view.dc": dc,
            "refine.enabled": False if seconds == 0 else None,
            "refine.seconds": seconds,
            "refine.sweeps": sweeps,
            "refine.positions": correct_positions or None,
            "reconstruct.device": device,
            "reconstruct.threads": threads,
        }
    )
    # Importing torch takes a second, which --help should not wait for.
    import torch

    from ptycho_stream.reconstruct.offline import reconstruct_file
    from ptycho_stream.settings import load_settings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = None if config is None else load_settings(config)
    torch.set_num_threads(threads or (1 if settings is None else settings.reconstruct.threads))
    with _Bar() as bar:
        image = reconstruct_file(
            path, settings, tables, choice=choice, outputs=outputs, data=keep, report=bar.show
        )
    if as_json:
        typer.echo(json.dumps({**summary(image), "files": [str(output) for output in outputs]}))
        return
    typer.echo(f"{line(image, 0.0)} -> {', '.join(map(str, outputs))}")
    for reason in image.reasons:
        typer.echo(f"  {reason}")


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _tables(values: dict[str, Setting]) -> dict[str, dict[str, Any]]:
    """Settings by table and key; those that nobody gave are left out."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if value is not None:
            table, _, key = name.partition(".")
            tables.setdefault(table, {})[key] = value
    return tables


class _Bar:
    """A progress bar for each step on a terminal; in a pipe nothing."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
        )
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """How far a step has come."""
        name = progress.step
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=progress.total, words="")
        self._bars.update(
            self._tasks[name],
            completed=round(progress.done),
            total=round(progress.total),
            words=progress.words,
        )
