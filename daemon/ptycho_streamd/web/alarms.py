"""What a person should know of at once, in words: what is wrong, why, and what to do about it.

Made from the daemon's status and the newest image; shown at the top of every page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ptycho_stream.results import Image
from ptycho_stream.verdicts import HARMLESS

BACKLOG_S = 5.0
LATENCY_MS = 5000.0
RESTART_S = 60.0
"""A stage that was started again so lately is told of."""

_LOST = {
    "missing": ("frames are missing", "the stream left their numbers out"),
    "disk_full": ("frames found no room on the disk", "make room; the scan ends here"),
    "wrong_shape": ("frames were left out", "they have another shape than the scan's"),
    "duplicate": ("frames came twice", "the first of each was kept"),
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """One of them.

    Attributes:
        level: ``bad``: something is lost or worthless; ``warn``: look at it; ``note``: it may be as
            it should.
        title: what, in a few words.
        reason: why, and what to do.
    """

    level: Literal["bad", "warn", "note"]
    title: str
    reason: str


class RestartWatch:
    """Remembers when stages were started again."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._seen_at_s: dict[str, float] = {}

    def lately(self, stages: Mapping[str, Mapping[str, Any]], now_s: float) -> frozenset[str]:
        """Stages that were started again within the last minute."""
        for name, stage in stages.items():
            restarts = stage["restarts"]
            if restarts > self._known.setdefault(name, restarts):
                self._seen_at_s[name] = now_s
            self._known[name] = restarts
        return frozenset(n for n, at_s in self._seen_at_s.items() if now_s - at_s < RESTART_S)


def alarms(
    status: Mapping[str, Any],
    image: Image | None,
    jobs: list[Mapping[str, Any]],
    restarted: frozenset[str],
) -> list[Alarm]:
    """All that there are, those that are bad first.

    Args:
        status: of the daemon, as the command of that name tells it.
        image: the newest.
        jobs: of training, newest first.
        restarted: stages that were started again lately.
    """
    found = [
        *_of_stages(status, restarted),
        *_of_ingest(_stage(status, "ingest")),
        *_of_stored_detectors(status),
        *_of_reconstruction(_stage(status, "reconstruct")),
        *_of_image(image),
        *_of_jobs(jobs),
    ]
    return sorted(found, key=lambda alarm: ("bad", "warn", "note").index(alarm.level))


def _stage(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a stage says of itself; empty while it does not run."""
    return status["stages"].get(name, {}).get("status", {})


def _of_stages(status: Mapping[str, Any], restarted: frozenset[str]) -> Iterator[Alarm]:
    for name, stage in status["stages"].items():
        if not stage["alive"]:
            why = stage["error"] or "it has ended or hangs; the daemon starts it again"
            yield Alarm("bad", f"{name} does not run", why)
        elif name in restarted:
            yield Alarm(
                "warn",
                f"{name} was started again",
                f"it has ended {stage['restarts']} times since the daemon's start, whose log says "
                "why; stored frames are safe, and the image goes on",
            )


def _of_ingest(ingest: Mapping[str, Any]) -> Iterator[Alarm]:
    if refusing := ingest.get("refusing"):
        yield Alarm("bad", "New scans are refused", f"{refusing}: make room")
    for scan in ingest.get("scans", ()):
        yield from _of_losses(scan)
        # Frames wait for their positions until the scan is over.
        if scan.get("unpositioned", 0) and scan["state"] == "draining":
            title = f"{scan['unpositioned']} frames have no position"
            yield Alarm("bad", title, "so they are in no image")
    alone = [one for one in ingest.get("endpoints", ()) if not one.get("peers", 1)]
    if alone:
        yield Alarm(
            "note",
            f"Nobody is connected at {' and '.join(sorted({one['name'] for one in alone}))}",
            f"{', '.join(one['endpoint'] for one in alone)}: start the sender, or see "
            "`ptycho-stream doctor`",
        )


def _of_losses(scan: Mapping[str, Any]) -> Iterator[Alarm]:
    for name, (title, reason) in _LOST.items():
        if scan.get(name, 0):
            yield Alarm("warn" if name == "duplicate" else "bad", f"{scan[name]} {title}", reason)


def _of_stored_detectors(status: Mapping[str, Any]) -> Iterator[Alarm]:
    """Losses of detectors whose frames are stored and not reconstructed."""
    for name in status["stages"]:
        if name.startswith("ingest-"):
            for scan in _stage(status, name).get("scans", ()):
                for alarm in _of_losses(scan):
                    title = f"{name.removeprefix('ingest-')}: {alarm.title}"
                    yield replace(alarm, title=title)


def _of_reconstruction(stage: Mapping[str, Any]) -> Iterator[Alarm]:
    if problem := stage.get("problem"):
        yield Alarm("bad", "A scan cannot be reconstructed", problem)
    backlog, rate = stage.get("backlog_frames", 0), stage.get("frames_per_s", 0.0)
    if backlog > max(BACKLOG_S * rate, 64):
        yield Alarm(
            "warn",
            f"The network is {backlog} frames behind",
            "frames come faster than it takes them; none is lost, and refinement shows them. Fewer "
            "pixels, more threads or a faster device would keep up",
        )
        return
    latency_ms = stage.get("latency_p99_ms", 0.0)
    if latency_ms > LATENCY_MS and stage.get("open_scans", 0):
        yield Alarm(
            "warn",
            f"Frames are in the image {latency_ms / 1e3:.0f} s after they came",
            "something else takes the device's time, or batches are too large",
        )


def _of_image(image: Image | None) -> Iterator[Alarm]:
    if image is None:
        return
    if image.collapsed:
        yield Alarm(
            "bad",
            "The network's output has collapsed",
            f"the patches of {image.content.model} do not vary as the frames say they must: use "
            "another model, or train this one for the probe",
        )
    if image.verdict and image.verdict not in HARMLESS:
        yield Alarm("bad", image.verdict.capitalize(), "; ".join(image.reasons))


def _of_jobs(jobs: list[Mapping[str, Any]]) -> Iterator[Alarm]:
    newest = next(iter(jobs), None)
    if newest is not None and newest["state"] == "failed":
        yield Alarm("warn", f"The training of {newest['name']} has failed", newest["message"])
