"""Runs a training job: frames of the store in, a judged and perhaps promoted model out.

Called in a process of its own by the daemon's trainer and by ``ptycho-stream train``. What it needs
to go on after being killed lies in the job's folder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from lightning.pytorch.loggers import Logger

from ptycho_stream.errors import ModelError, PtychoStreamError, TrainingError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.misfit import Misfit
from ptycho_stream.reconstruct.recipe import usable_device
from ptycho_stream.settings import Settings
from ptycho_stream.training.conductor import Stop
from ptycho_stream.training.fitting import (
    LEARNING_RATE,
    Trained,
    batches_of,
    fit,
    initial_network,
    opened_scans,
    take_trained,
)
from ptycho_stream.training.job import JobProgress, JobSpec
from ptycho_stream.training.job_plan import JobPlan, settle
from ptycho_stream.training.loggers import log_result, make_loggers
from ptycho_stream.training.peers import Rank, peers
from ptycho_stream.training.scan_data import SplitScan
from ptycho_stream.training.validation import judge

IN_USE = "_in_use"
"""Ends the names of figures of the model in use, among those of the candidate."""

_MOST_UNSEEN = 0.1
"""Share of the judging frames that a candidate may not show though the model in use does."""

Report = Callable[[JobProgress], None]
AskStop = Callable[[], Stop]

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """The job was asked to stop, when it was told so."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why)
        self.why: Stop = why


def run_job(
    spec: JobSpec, settings: Settings, folder: Path, report: Report, stop: AskStop
) -> JobProgress:
    """Do a job, or go on with it where ``folder`` says that it was.

    Sets torch's number of threads while it runs.

    Args:
        spec: the request.
        settings: of the daemon whose scans, probe and models are used.
        folder: the job's own, made if it is missing; gets the plan, checkpoints and figures.
        report: told of progress, at most twice a second.
        stop: asked after each step, while the model is validated and before it is saved and
            promoted; ``pause`` saves and returns, ``cancel`` returns without a model.

    Returns:
        How it ended: done, failed (``message`` says why), cancelled, or queued when it was paused.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.training.threads)
    latest = _Latest(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ended = _run(spec, settings, folder, latest, stop)
    except _Stopped as stopped:
        if stopped.why == "pause":
            ended = latest.ended("queued", "paused; it goes on from where it is")
        else:
            ended = latest.ended("cancelled", "cancelled; no model was taken into use")
    except PtychoStreamError as error:
        _log.error("job %s failed: %s", spec.job_id, error)
        ended = latest.ended("failed", str(error))
    except Exception as error:
        # Whatever it is, of torch, Lightning, MLflow or the system: a job ends with a word.
        _log.exception("job %s failed", spec.job_id)
        ended = latest.ended(
            "failed",
            f"training broke off: {error}; fewer batch_frames need less memory, and the log has "
            "the details",
        )
    finally:
        torch.set_num_threads(threads)
    report(ended)
    return ended


class _Latest:
    """Passes reports on and keeps the newest."""

    def __init__(self, report: Report) -> None:
        self.progress = JobProgress()
        self._report = report

    def __call__(self, progress: JobProgress) -> None:
        self.progress = progress
        self._report(progress)

    def ended(self, state: Any, message: str, **changes: Any) -> JobProgress:
        """The newest progress, as it is in the end."""
        return msgspec.structs.replace(
            self.progress, state=state, message=message, remaining_s=None, **changes
        )


def _run(
    spec: JobSpec, settings: Settings, folder: Path, latest: _Latest, stop: AskStop
) -> JobProgress:
    registry = ModelRegistry(settings.model.registry)
    plan = settle(spec, settings, folder, registry)
    saved = _saved_before(plan, registry)
    loggers: Sequence[Logger] = ()
    if saved is None:
        loggers = make_loggers(
            plan.spec.loggers or (),
            folder,
            run=plan.spec.name,
            mlflow_uri=settings.training.mlflow_uri,
        )
        network = initial_network(plan, settings)
        with opened_scans(plan, settings, batches_of(plan, network, Rank())) as scans:
            stopped = _train(plan, settings, folder, scans, network, loggers, latest, stop)
            if stopped:
                raise _Stopped(stopped)
            saved = _validate_and_save(plan, settings, folder, scans, network, latest, stop)
    _heed(stop)
    promoted, message = _promote(plan, settings, registry, saved.metrics)
    try:
        assert registry.root is not None
        log_result(loggers, saved.metrics, registry.root / saved.name)
    except (TrainingError, OSError) as error:
        _log.warning("job %s: %s", spec.job_id, error)
        message += f"; {error}"
    return latest.ended(
        "done", message, fraction=1.0, metrics=saved.metrics, model=saved.name, promoted=promoted
    )


def _heed(stop: AskStop) -> None:
    if why := stop():
        raise _Stopped(why)


def _saved_before(plan: JobPlan, registry: ModelRegistry) -> Manifest | None:
    """The manifest of this job's model, if a killed run of it came as far as that."""
    for manifest in registry.list():
        mine = manifest.training.get("job") == plan.spec.job_id
        if manifest.name == plan.spec.name and mine:
            return manifest
    registry.check_new(plan.spec.name)
    return None


def _train(
    plan: JobPlan,
    settings: Settings,
    folder: Path,
    scans: Sequence[SplitScan],
    network: Network,
    loggers: Sequence[Logger],
    latest: _Latest,
    stop: AskStop,
) -> Stop:
    if take_trained(folder, network) is not None:
        return ""
    latest(JobProgress(state="running", message=f"training on {_frames(scans)} frames"))
    with peers(folder, settings, plan.spec.devices or 1) as rank:
        return fit(plan, folder, scans, network, rank, loggers=loggers, report=latest, stop=stop)


def _frames(scans: Sequence[SplitScan]) -> int:
    return sum(len(scan.train) for scan in scans)


def _validate_and_save(
    plan: JobPlan,
    settings: Settings,
    folder: Path,
    scans: Sequence[SplitScan],
    network: Network,
    latest: _Latest,
    stop: AskStop,
) -> Manifest:
    """Judge the trained weights and the model in use, and put the former into the registry."""
    trained = take_trained(folder, network)
    if trained is None:
        raise TrainingError(f"training left no weights in {folder}: start the job again")
    message = "comparing with the model in use on held-out frames"
    latest(
        JobProgress(
            state="validating",
            step=trained.steps,
            fraction=1.0,
            loss=latest.progress.loss,
            elapsed_s=trained.seconds,
            message=message,
        )
    )
    registry = ModelRegistry(settings.model.registry)
    device = usable_device(plan.spec.device or settings.training.device, "training.device")
    seed = plan.spec.seed
    networks, compared = [network], None
    try:
        in_use, used = registry.load(settings.model.name)
        networks, compared = [network, in_use], used.name
    except ModelError as error:
        _log.error("the candidate is compared with nothing: %s", error)
    judgement = judge(networks, scans, device, seed, lambda: _heed(stop))
    metrics = {"val_loss": trained.value}
    for misfit, suffix in zip(judgement.misfits, ("", IN_USE), strict=False):
        metrics |= _figures(misfit, suffix)
    _heed(stop)
    return registry.save(
        network.cpu(),
        Manifest(
            name=plan.spec.name,
            architecture=plan.architecture,
            settings=network.settings_json(),
            training=_account(plan, scans, trained, compared, device)
            | {"judged_apart": judgement.apart},
            seed=seed,
            metrics=metrics,
            parent=plan.parent,
        ),
    )


def _figures(misfit: Misfit, suffix: str) -> dict[str, float]:
    figures = {
        "excess": misfit.excess,
        "r_factor": misfit.r_factor,
        "deviance": misfit.deviance,
        "judged_frames": float(misfit.frames),
        "unseen_frames": float(misfit.skipped),
    }
    return {name + suffix: value for name, value in figures.items() if math.isfinite(value)}


def _account(
    plan: JobPlan,
    scans: Sequence[SplitScan],
    trained: Trained,
    compared: str | None,
    device: torch.device,
) -> dict[str, Any]:
    """What made the weights, for the manifest."""
    spec = plan.spec
    return {
        "job": spec.job_id,
        "kind": spec.kind,
        "loss": spec.loss,
        "scans": [msgspec.to_builtins(scan) for scan in plan.scans],
        "frames": _frames(scans),
        "frames_held_out": sum(len(scan.held_out) for scan in scans),
        "held_out": spec.held_out,
        "batch_frames": spec.batch_frames,
        "learning_rate": spec.learning_rate or LEARNING_RATE,
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
        "devices": spec.devices,
        "precision": spec.precision,
        "device": str(device),
        "torch": torch.__version__,
        "compared_with": compared,
    }


def _sees_less(metrics: dict[str, float]) -> bool:
    """Whether the candidate's object lacks places that the other has; at the edge some may go."""
    missing = metrics["unseen_frames"] - metrics["unseen_frames" + IN_USE]
    return missing > _MOST_UNSEEN * (metrics["judged_frames"] + missing)


def _promote(
    plan: JobPlan, settings: Settings, registry: ModelRegistry, metrics: dict[str, float]
) -> tuple[bool, str]:
    """Take the new model into use if it is to be; whether it is, and a line about it."""
    name, wanted = plan.spec.name, plan.spec.promote
    ours, theirs = metrics.get("excess"), metrics.get("excess" + IN_USE)
    if ours is None or theirs is None:
        verdict, better = f"{name} could not be compared on held-out frames", False
    else:
        better = ours < theirs and not _sees_less(metrics)
        verdict = f"excess R of held-out frames {ours:.4f}, of the model in use {theirs:.4f}"
        if _sees_less(metrics):
            verdict += f", but {name} leaves more of the object unseen"
    if wanted == "never" or (wanted == "if_better" and not better):
        return False, f"{verdict}; {name} is in the registry and not in use"
    if settings.model.name != "default":
        return False, (
            f"{verdict}; {name} is not in use because model.name pins {settings.model.name}: "
            "set it to 'default' to let models be promoted"
        )
    registry.use(name)
    return True, f"{verdict}; {name} is in use"
