"""One word for how a scan is going, with the reasons: good, or what is suspected.

Weighs the figures that trust, coverage, diagnosis and suspicion have found. Published with each
image; ``watch --fail-on`` stops a bad scan by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptycho_stream.reconstruct.coverage import Coverage
from ptycho_stream.reconstruct.diagnosis import Finding
from ptycho_stream.reconstruct.suspicion import Suspicion
from ptycho_stream.reconstruct.trust_record import TrustSummary
from ptycho_stream.verdicts import VerdictName


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is thought of a scan.

    Attributes:
        name: one of VERDICTS.
        reasons: in words, the weightiest first; never empty.
    """

    name: VerdictName
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a verdict is made from; None where it was not looked at yet.

    Attributes:
        summary: of the frames judged against the image.
        coverage: of the positions.
        finding: which way round detector and positions are.
        suspicion: what some frames come to after refining, and what would explain the rest.
    """

    summary: TrustSummary
    coverage: Coverage | None = None
    finding: Finding | None = None
    suspicion: Suspicion | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on a figure speaks; chosen on simulated scans (docs/trust.md).

    Attributes:
        frames: fewer judged frames decide nothing.
        bad_share: of the frames that may stand out.
        excess: R beyond noise of refined frames: more is not explained by the sample.
        explained: share of the excess that a change must take away to be suspected.
        brightness: 90th percentile of the object's modulus; a sample passes 1 at most.
        contrast: with less there is nothing that could tell right from wrong.
        overlap: mean number of probe discs over a covered spot.
        free_gap: of the excess of held-out frames over that of the others.
        free_frames: held-out frames that this takes.
    """

    frames: int = 16
    bad_share: float = 0.03
    excess: float = 0.025
    explained: float = 0.4
    brightness: float = 1.15
    contrast: float = 0.02
    overlap: float = 1.1
    free_gap: float = 0.05
    free_frames: int = 5


def verdict(figures: Figures, limits: Limits | None = None) -> Verdict:
    """Weigh the figures: single frames first, then what makes all of them misfit, then sampling."""
    limits = limits or Limits()
    for suspected in (_frames, _misfit, _brightness, _sampling):
        found = suspected(figures, limits)
        if found is not None:
            return found
    return _nothing_found(figures, limits)


def _frames(figures: Figures, limits: Limits) -> Verdict | None:
    summary = figures.summary
    judged = summary.working.frames + summary.free.frames
    if judged < limits.frames or summary.bad_share < limits.bad_share:
        return None
    worst = ", ".join(str(number) for number in summary.bad_frames[:5])
    reason = (
        f"{summary.bad_share:.1%} of {judged} frames stand out from the others; the worst are "
        f"{worst}: beam, shutter or detector failed there, or they are not where they are said "
        "to be"
    )
    return Verdict("frames bad", (reason,))


def _misfit(figures: Figures, limits: Limits) -> Verdict | None:
    """Orientation, positions or probe, if refined frames do not fit."""
    suspicion, finding = figures.suspicion, figures.finding
    if finding is not None and finding.best is not None and not finding.fits_as_set:
        told = finding.as_set
        beside = "" if told is None or told.excess is None else f"; as set: {told.excess:.3f}"
        return Verdict("orientation suspect", (finding.reason + beside,))
    if suspicion is None or not suspicion.excess > limits.excess:
        return None
    what = f"{suspicion.frames} frames misfit by {suspicion.excess:.3f} beyond noise after refining"
    by_positions = 1 - max(suspicion.with_positions, 0) / suspicion.excess
    by_probe = 1 - max(suspicion.with_probe, 0) / suspicion.excess
    if max(by_positions, by_probe) < limits.explained:
        why = (
            f"neither other positions ({by_positions:.0%} of it) nor another probe "
            f"({by_probe:.0%}) explain it: the probe is far off, or positions by more than could "
            "be corrected, or the distance or the centre of the pattern is wrong"
        )
        return Verdict("probe suspect", (what, why))
    if by_positions > by_probe:
        how = f"positions that move by {suspicion.moved_px:.1f} px"
        if suspicion.stretch != 1:
            how = f"positions stretched to {suspicion.stretch:.0%}"
        return Verdict("positions suspect", (what, f"{how} explain {by_positions:.0%} of it"))
    how = "a corrected probe explains"
    if suspicion.defocus_rad:
        how = f"a probe defocused by {suspicion.defocus_rad:+.1f} rad explains"
    return Verdict("probe suspect", (what, f"{how} {by_probe:.0%} of it"))


def _brightness(figures: Figures, limits: Limits) -> Verdict | None:
    suspicion = figures.suspicion
    if suspicion is None or not suspicion.brightness > limits.brightness:
        return None
    reason = (
        f"the sample would have to amplify: it passes {suspicion.brightness:.2f} of the beam's "
        "amplitude; the probe has too few photons (probe.photons)"
    )
    return Verdict("probe suspect", (reason,))


def _sampling(figures: Figures, limits: Limits) -> Verdict | None:
    covered, summary = figures.coverage, figures.summary
    reasons: list[str] = []
    if covered is not None and covered.step_m < float("inf") and covered.overlap < limits.overlap:
        reasons.append(
            f"a spot is lit by {covered.overlap:.1f} probes on average: the step of "
            f"{covered.step_m * 1e9:.0f} nm is too large for a probe of "
            f"{covered.diameter_m * 1e9:.0f} nm"
        )
    gap = summary.free.excess - summary.working.excess
    if summary.free.frames >= limits.free_frames and gap > limits.free_gap:
        reasons.append(
            f"{summary.free.frames} frames that were held out misfit by {gap:.3f} more than those "
            "that made the image: it fits their noise"
        )
    return Verdict("undersampled", tuple(reasons)) if reasons else None


def _nothing_found(figures: Figures, limits: Limits) -> Verdict:
    """Good, if there was enough to look at."""
    summary, suspicion = figures.summary, figures.suspicion
    judged = summary.working.frames + summary.free.frames
    if judged < limits.frames:
        return Verdict("undecided", (f"only {judged} frames could be judged yet",))
    if suspicion is None or not suspicion.excess <= limits.excess:
        why = "no frames have been refined yet" if suspicion is None else suspicion.problem
        return Verdict("undecided", (why or "no frame could be refined",))
    if suspicion.contrast < limits.contrast:
        reason = (
            f"the sample shows next to nothing here (contrast {suspicion.contrast:.3f}): nothing "
            "would look wrong"
        )
        return Verdict("undecided", (reason,))
    reasons = [f"{suspicion.frames} refined frames misfit by {suspicion.excess:.3f} beyond noise"]
    reasons.append(f"the image by {summary.working.excess:.3f} over {judged} frames")
    if figures.coverage is not None:
        reasons.append(f"a spot is lit by {figures.coverage.overlap:.1f} probes on average")
    return Verdict("good", tuple(reasons))
