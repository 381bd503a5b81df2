"""Losses on frames whose object is known: errors of patches, and of the confidence in them.

Used where networks learn from synthetic frames, and by the benchmarks that score them.
"""

import torch
from torch import Tensor

from ptycho_stream.networks.network import CONFIDENCE_ERROR, Prediction
from ptycho_stream.training.synthetic import FRAMES_OF_A_SAMPLE, TrainingBatch

_STAGE_DISCOUNT = 0.5
"""Each stage before the last counts this much of the next one: early stages learn at once."""

_STITCHED_SHARE = 2.0
"""Weight of the error of the stitched object beside that of single frames."""

_USUAL_CONTRAST = 0.35
"""Root mean square deviation from the mean of a usual object."""

_CONFIDENCE_SHARE = 0.1
"""Weight of the confidence's likelihood beside the error of the object."""

_LEAST_ERROR = 1e-3
"""Expected errors are not taken for smaller: a confidence of 1 would be infinitely sure."""


def frame_errors(
    estimate: Tensor, obj: Tensor, weight: Tensor, share_phase: int = 1
) -> tuple[Tensor, Tensor]:
    """Probe-weighted errors of each frame after removing an arbitrary phase.

    Args:
        estimate: complex (B, N, N).
        obj: complex (B, N, N), the truth.
        weight: real (B, N, N).
        share_phase: so many successive frames are of one sample and have one phase between them;
            1 gives each frame its own.

    Returns:
        (weighted mean absolute error (B,), weighted relative root mean square error (B,)).
    """
    squared = weight.square()
    inner = (squared * obj * estimate.conj()).sum((-2, -1)).reshape(-1, share_phase)
    inner = inner.sum(1, keepdim=True).expand(-1, share_phase).reshape(-1, 1, 1)
    phase = inner / inner.abs().clamp_min(1e-12)
    difference = estimate * phase.detach() - obj
    power = torch.view_as_real(difference).square().sum(-1)
    # The root's gradient is infinite at zero error; 1e-8 is 1e-4 of the object's amplitude.
    absolute = (weight * (power + 1e-8).sqrt()).sum((-2, -1)) / weight.sum((-2, -1))
    truth = (squared * torch.view_as_real(obj).square().sum(-1)).sum((-2, -1))
    return absolute, ((squared * power).sum((-2, -1)) / truth).sqrt()


def stitched_errors(
    estimate: Tensor, batch: TrainingBatch, share_phase: int, frames_of_a_sample: int
) -> Tensor:
    """Mean absolute error of what overlapping frames give together, one figure a sample.

    Noise of the patches averages out in it, blur does not: a network that learns from single
    frames alone prefers blur.

    Args:
        estimate: complex (B, N, N).
        batch: with the truth and the corners.
        share_phase: as in :func:`frame_errors`.
        frames_of_a_sample: so many successive frames overlap in one sample.

    Returns:
        (B / frames_of_a_sample,), weighted with the root of the summed probe intensity.
    """
    power, size = batch.weight.square(), estimate.shape[-1]
    inner = (power * batch.obj * estimate.conj()).sum((-2, -1)).reshape(-1, share_phase)
    inner = inner.sum(1, keepdim=True).expand(-1, share_phase).reshape(-1, 1, 1)
    phase = inner / inner.abs().clamp_min(1e-12)
    wrong = power * (estimate * phase.detach() - batch.obj)
    corners: list[list[int]] = batch.corner_yx_px.tolist()
    figures: list[Tensor] = []
    for first in range(0, len(estimate), frames_of_a_sample):
        total = estimate.new_zeros((2 * size, 2 * size))
        weight = power.new_zeros((2 * size, 2 * size))
        for frame in range(first, first + frames_of_a_sample):
            y, x = corners[frame]
            total[y : y + size, x : x + size] += wrong[frame]
            weight[y : y + size, x : x + size] += power[frame]
        error = torch.view_as_real(total / (weight + 1e-4)).square().sum(-1)
        root = weight.sqrt()
        figures.append((root * (error + 1e-8).sqrt()).sum() / root.sum())
    return torch.stack(figures)


def supervised_loss(
    stages: list[Prediction],
    batch: TrainingBatch,
    frames_of_a_sample: int = FRAMES_OF_A_SAMPLE,
) -> Tensor:
    """Errors of single frames after every stage, the last ones most; of the stitched object; and
    the confidence's loss.

    Half of each lets every patch have a phase of its own, as a single frame does; the other half
    asks patches of one sample to agree, as stitching wants them to. Objects of weak contrast count
    almost as much as strong ones.
    """
    importance = (_USUAL_CONTRAST / (_contrast(batch) + 0.05)) ** 0.75
    of_sample = importance.reshape(-1, frames_of_a_sample).mean(1)
    total = batch.weight.new_zeros(())
    for together in (1, frames_of_a_sample):
        stitched = stitched_errors(stages[-1].obj, batch, together, frames_of_a_sample)
        total = total + 0.5 * _STITCHED_SHARE * (of_sample * stitched).mean()
    share = 1.0
    for stage in reversed(stages):
        for together in (1, frames_of_a_sample):
            absolute, _ = frame_errors(stage.obj, batch.obj, batch.weight, together)
            total = total + 0.5 * share * (importance * absolute).mean()
        share *= _STAGE_DISCOUNT
    return total + _CONFIDENCE_SHARE * confidence_loss(stages[-1], batch.obj, batch.weight)


def _contrast(batch: TrainingBatch) -> Tensor:
    """Probe-weighted root mean square deviation (B,) of the objects from their means."""
    power = batch.weight.square()
    whole = power.sum((-2, -1))
    mean = (power * batch.obj).sum((-2, -1)) / whole
    deviation = torch.view_as_real(batch.obj - mean[:, None, None]).square().sum(-1)
    return ((power * deviation).sum((-2, -1)) / whole).sqrt()


def confidence_loss(prediction: Prediction, obj: Tensor, weight: Tensor) -> Tensor:
    """How badly the confidence tells the errors: a Laplace negative log-likelihood.

    With e the error that the confidence 1 / (1 + (e / 0.1)^2) stands for, this is the
    probe-weighted mean of |error| / e + ln e, least where e is the expected |error|. The error is
    detached, so that only the confidence learns from it.

    Args:
        prediction: object and confidence (B, N, N).
        obj: complex (B, N, N), the truth.
        weight: real (B, N, N).

    Returns:
        A scalar; zero for a network without a confidence that could learn.
    """
    if not prediction.confidence.requires_grad:
        return weight.new_zeros(())
    estimate = prediction.obj.detach()
    inner = (weight.square() * obj * estimate.conj()).sum((-2, -1), keepdim=True)
    error = (estimate * (inner / inner.abs().clamp_min(1e-12)) - obj).abs()
    expected = expected_error(prediction.confidence)
    return (weight * (error / expected + expected.log())).sum() / weight.sum()


def expected_error(confidence: Tensor) -> Tensor:
    """The error |estimate - object| of a pixel that a confidence in (0, 1] stands for."""
    odds = (1 / confidence.clamp_min(1e-6) - 1).clamp_min((_LEAST_ERROR / CONFIDENCE_ERROR) ** 2)
    return CONFIDENCE_ERROR * odds.sqrt()
