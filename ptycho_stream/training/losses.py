"""Losses on frames whose object is known: errors of patches, and of the confidence in them.

Used where networks learn from synthetic frames, and by the benchmarks that score them.
"""

import torch
from torch import Tensor

from ptycho_stream.networks.network import CONFIDENCE_ERROR, Prediction
from ptycho_stream.training.synthetic import FRAMES_OF_A_SAMPLE, TrainingBatch

_STAGE_DISCOUNT = 0.5
"""Each stage before the last counts this much of the next one: early stages learn at once."""

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


def supervised_loss(
    stages: list[Prediction],
    batch: TrainingBatch,
    frames_of_a_sample: int = FRAMES_OF_A_SAMPLE,
) -> Tensor:
    """The mean absolute error after every stage, the last ones most, and the confidence's loss.

    Half of it lets every patch have a phase of its own, as a single frame does; the other half
    asks patches of one sample to agree, as stitching wants them to.
    """
    total = batch.weight.new_zeros(())
    share = 1.0
    for stage in reversed(stages):
        for together in (1, frames_of_a_sample):
            absolute, _ = frame_errors(stage.obj, batch.obj, batch.weight, together)
            total = total + 0.5 * share * absolute.mean()
        share *= _STAGE_DISCOUNT
    return total + _CONFIDENCE_SHARE * confidence_loss(stages[-1], batch.obj, batch.weight)


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
