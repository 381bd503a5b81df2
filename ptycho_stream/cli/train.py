"""``ptycho-stream train``: a training job in this terminal; no daemon need be running.

The same job that the daemon would run (``ctl finetune``, ``ctl train``), with its checkpoint in a
folder of your choice: interrupt it with Ctrl-C, and go on later.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ptycho_stream.cli import training_options as training
from ptycho_stream.cli.options import AsJson
from ptycho_stream.errors import TrainingError

if TYPE_CHECKING:
    from ptycho_stream.settings import Settings
    from ptycho_stream.training.job import JobProgress, JobSpec

SPEC_FILE = "job.json"


def train(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The daemon's TOML file: store, probe, models.")
    ],
    scans: training.Scans = None,
    name: training.Name = None,
    model: Annotated[
        str | None,
        typer.Option("--from", help="Fine-tune this model; `default` is the one in use."),
    ] = None,
    architecture: training.Architecture = None,
    network: training.NetworkSettings = None,
    frames: training.Frames = None,
    loss: training.Loss = None,
    minutes: training.Minutes = None,
    steps: training.Steps = None,
    learning_rate: training.Rate = None,
    batch_frames: training.BatchFrames = None,
    seed: training.Seed = None,
    promote: training.Promote = None,
    device: training.Device = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", metavar="FOLDER", help="For checkpoint and curves.  [out/train/NAME]"
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FOLDER", help="Go on with the job in its work folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on stored scans, or train a network from nothing.

    With --from a model is fine-tuned, else the network named by --architecture learns from nothing.

    Example: ptycho-stream train --config my.toml --from default --minutes 2
    """
    from ptycho_stream.settings import load_settings

    settings = load_settings(config)
    arguments = {
        "scan_ids": scans or [],
        "name": name,
        "model": model,
        "architecture": architecture,
        "network": None if network is None else training.network_settings(network),
        "frames": training.frame_range(frames),
        "loss": loss,
        "minutes": minutes,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_frames": batch_frames,
        "seed": seed,
        "promote": promote,
        "device": device,
    }
    if resume is not None:
        if work is not None or any(value not in (None, []) for value in arguments.values()):
            raise typer.BadParameter(
                "--resume goes on with the job as it was asked for: leave out all but --config"
            )
        work, spec = resume, _held(resume)
    else:
        if (model is None) == (architecture is None):
            raise typer.BadParameter("give either --from MODEL or --architecture NAME")
        if model is not None and network is not None:
            raise typer.BadParameter("--network goes with --architecture: a model has its own")
        spec = _asked_for(arguments, settings)
        work = work or Path("out/train") / spec.name
        _note(spec, work)
    job = _run(spec, settings, work)
    if as_json:
        typer.echo(json.dumps(job))
    elif job["state"] == "queued":
        typer.echo(f"paused at step {job['step']}: go on with --resume {work}")
    else:
        typer.echo(f"{spec.name}: {training.outcome(job)}")
        if job["promoted"]:
            typer.echo("a daemon that runs uses it from its next reload on")
    if job["state"] != "done":
        raise typer.Exit(1)


def _asked_for(arguments: dict[str, Any], settings: Settings) -> JobSpec:
    from ptycho_stream.training.job import JobSpec
    from ptycho_stream.training.job_request import completed

    kind = "finetune" if arguments["model"] is not None else "train"
    return JobSpec.from_mapping(completed(kind, arguments, settings))


def _note(spec: JobSpec, work: Path) -> None:
    """Keep the job in its work folder, to be gone on with."""
    from ptycho_stream.atomic_file import atomic_file

    if (work / SPEC_FILE).exists():
        raise TrainingError(
            f"{work} has a job already: go on with it (--resume {work}), or choose another folder "
            "(--work)"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"cannot make {work}: {error.strerror}; choose another --work"
        ) from error
    with atomic_file(work / SPEC_FILE) as file:
        file.write(spec.to_json().encode())


def _held(work: Path) -> JobSpec:
    from ptycho_stream.training.job import JobSpec

    try:
        return JobSpec.from_json((work / SPEC_FILE).read_bytes())
    except OSError as error:
        raise TrainingError(f"there is no job to go on with in {work}: {error.strerror}") from error


def _run(spec: JobSpec, settings: Settings, work: Path) -> dict[str, Any]:
    """Run the job with a progress bar; Ctrl-C or SIGTERM makes it save a checkpoint and end."""
    import msgspec

    from ptycho_stream.training.job import JobProgress
    from ptycho_stream.training.jobs import run_job  # imports Lightning

    asked: list[int] = []
    progress = JobProgress()

    def interrupted(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt  # a second time: at once, without a new checkpoint
        asked.append(number)

    def stop() -> Literal["", "pause", "cancel"]:
        return "pause" if asked else ""

    numbers = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, interrupted) for number in numbers}
    try:
        with training.JobBar(spec.name) as bar:

            def report(newest: JobProgress) -> None:
                nonlocal progress
                progress = newest
                bar.show(msgspec.to_builtins(newest))

            try:
                report(run_job(spec, settings, work, report, stop))
            except SystemExit:  # Lightning's own answer to SIGTERM, after the step that saved
                if not asked:
                    raise
                report(msgspec.structs.replace(progress, state="queued"))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return msgspec.to_builtins(progress)
