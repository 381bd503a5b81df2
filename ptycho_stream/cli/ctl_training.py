"""``ctl finetune | train | jobs | job | cancel | use | rollback``: training on demand.

The commands of :mod:`ptycho_stream.cli.ctl` that concern models; the daemon does the work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ptycho_stream.cli import training_options as training
from ptycho_stream.cli.key_options import client_keys
from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ControlEndpoint,
    Timeout,
    call_daemon,
    control_endpoint,
    print_result,
    print_table,
    utc,
)

if TYPE_CHECKING:
    from ptycho_stream.client import Daemon

app = typer.Typer(rich_markup_mode=None)

JobId = Annotated[str | None, typer.Argument(metavar="[JOB]", help="As `ctl jobs` lists it.")]
Wait = Annotated[bool, typer.Option("--wait", help="Until the job is over; status 1 if it fails.")]
POLL_S = 0.5


@app.command()
def finetune(
    scans: training.Scans = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    name: training.Name = None,
    model: Annotated[
        str | None, typer.Option("--from", help="Model to begin with.  [the one in use]")
    ] = None,
    frames: training.Frames = None,
    loss: training.Loss = None,
    minutes: training.Minutes = None,
    steps: training.Steps = None,
    learning_rate: training.Rate = None,
    batch_frames: training.BatchFrames = None,
    seed: training.Seed = None,
    promote: training.Promote = None,
    device: training.Device = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Make the network better on scans that the daemon has, running ones too.

    What is not given comes from [training] in the daemon's settings.

    Example: ptycho-stream ctl finetune --minutes 2 --wait
    """
    arguments = {
        "scan_ids": scans or [],
        "name": name,
        "model": model,
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
    _submit("finetune", arguments, config, endpoint, timeout, wait, as_json)


@app.command()
def train(
    scans: training.Scans = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    name: training.Name = None,
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
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Train a network from nothing on scans that the daemon has.

    Example: ptycho-stream ctl train --architecture cnn --minutes 30 --promote never
    """
    arguments = {
        "scan_ids": scans or [],
        "name": name,
        "architecture": architecture,
        "network": training.network_settings(network),
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
    _submit("train", arguments, config, endpoint, timeout, wait, as_json)


def _submit(
    command: str,
    arguments: Mapping[str, Any],
    config: Path | None,
    endpoint: str | None,
    timeout_s: float | None,
    wait: bool,
    as_json: bool,
) -> None:
    from ptycho_stream.client import Daemon

    job = call_daemon(command, arguments, config, endpoint, timeout_s)
    if wait:
        with Daemon(control_endpoint(config, endpoint), keys=client_keys(config)) as daemon:
            job = _until_over(job, daemon)
    if as_json:
        typer.echo(json.dumps(job))
    elif wait:
        typer.echo(f"{job['name']}: {training.outcome(job)}")
    else:
        typer.echo(f"job {job['job_id']} will make {job['name']}: see `ptycho-stream ctl jobs`")
    if wait and job["state"] != "done":
        raise typer.Exit(1)


def _until_over(job: dict[str, Any], daemon: Daemon) -> dict[str, Any]:
    from ptycho_stream.training.job import ENDED_STATES

    with training.JobBar(job["name"]) as bar:
        while job["state"] not in ENDED_STATES:
            bar.show(job)
            time.sleep(POLL_S)
            job = daemon.job(job["job_id"])
        bar.show(job)
    return job


@app.command()
def jobs(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List the training jobs.

    Example: ptycho-stream ctl jobs
    """
    found = call_daemon("jobs", {"limit": limit}, config, endpoint, timeout)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "kind", "model", "began (UTC)", "state", "done", "message"):
        table.add_column(column, overflow="fold")
    for job in found:
        table.add_row(
            str(job["job_id"]),
            str(job["kind"]) + (" (automatic)" if job["automatic"] else ""),
            str(job["name"]),
            utc(job["created_ns"]),
            str(job["state"]),
            f"{job['fraction']:.0%}",
            str(job["message"]),
        )
    print_table(table)


@app.command()
def job(
    job_id: JobId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Say all that is known of a training job; without an id of the newest.

    Example: ptycho-stream ctl job
    """
    print_result(call_daemon("job", {"job_id": job_id}, config, endpoint, timeout), as_json)


@app.command()
def cancel(
    job_id: JobId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """End a training job without a model; without an id the one that runs.

    Example: ptycho-stream ctl cancel
    """
    print_result(call_daemon("cancel", {"job_id": job_id}, config, endpoint, timeout), as_json)


@app.command()
def use(
    name: Annotated[str, typer.Argument(help="Of the model, as `models list` prints it.")],
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Take a model into use; the image of a running scan goes on with it.

    Example: ptycho-stream ctl use unrolled-v2
    """
    print_result(call_daemon("use_model", {"name": name}, config, endpoint, timeout), as_json)


@app.command()
def rollback(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the model that was in use before.

    Example: ptycho-stream ctl rollback
    """
    print_result(call_daemon("rollback_model", {}, config, endpoint, timeout), as_json)
