"""Options and the progress bar that ``ctl finetune``, ``ctl train`` and ``train`` share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

Scans = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SCAN]...", help="Scans to train on; without any the newest one."),
]
Name = Annotated[
    str | None, typer.Option("--name", help="Of the new model.  [made up from the time]")
]
Frames = Annotated[
    str | None,
    typer.Option(
        "--frames",
        metavar="A:B",
        help="Only the A-th to before the B-th with a position.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option("--loss", help="unsupervised, supervised (synthetic samples) or mixed."),
]
Minutes = Annotated[float | None, typer.Option(min=0.001, help="How long to train.")]
Steps = Annotated[int | None, typer.Option(min=1, help="How long to train, instead of minutes.")]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", min=1e-9, max=1, help="Of the optimiser's peak.")
]
BatchFrames = Annotated[int | None, typer.Option("--batch-frames", help="Frames in a step.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything that is drawn.")]
Promote = Annotated[
    str | None,
    typer.Option("--promote", help="Take the model into use: if_better, always or never."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Architecture = Annotated[
    str | None, typer.Option("--architecture", help="Of a network trained from nothing.")
]
NetworkSettings = Annotated[
    str | None,
    typer.Option("--network", metavar="JSON", help="Settings of a network trained from nothing."),
]


def frame_range(text: str | None) -> tuple[int, int] | None:
    """``A:B`` as two numbers.

    Raises:
        typer.BadParameter: it is not.
    """
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise typer.BadParameter(f"--frames {text}: write A:B with A < B, for example 0:258")
    return int(first), int(end)


def network_settings(text: str | None) -> dict[str, Any]:
    """A JSON object as a dict.

    Raises:
        typer.BadParameter: it is none.
    """
    if text is None:
        return {}
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--network is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter('--network is no JSON object: write {"key": value}')
    return dict(values)  # pyright: ignore[reportUnknownVariableType]


def outcome(job: Mapping[str, Any]) -> str:
    """How a job ended, as a line for people."""
    metrics: Mapping[str, float] = job["metrics"]
    figures = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    use = {True: "in use now", False: "not in use", None: ""}[job["promoted"]]
    return "; ".join(filter(None, [str(job["state"]), str(job["message"]), use, figures]))


class JobBar:
    """A progress bar of a job on a terminal; in a pipe a line for each state."""

    def __init__(self, name: str) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._console = console
        self._name = name
        self._state = ""
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task(name, total=1.0, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, job: Mapping[str, Any]) -> None:
        """How the job is now: the fields of a JobProgress."""
        loss, left_s = job["loss"], job["remaining_s"]
        figures = f"step {job['step']}"
        figures += "" if loss is None else f", loss {loss:.4g}"
        figures += "" if left_s is None else f", {left_s:.0f} s left"
        text = f"{self._name}: {job['state']}"
        self._bar.update(self._task, completed=job["fraction"], description=text, figures=figures)
        if not self._console.is_terminal and job["state"] != self._state:
            self._console.print(f"{text} ({figures})", highlight=False, soft_wrap=True)
        self._state = str(job["state"])
