"""Pre-training of the unrolled network on synthetic frames, from nothing or from a checkpoint.

This made the weights that the package ships (see docs/models.md). Used by the command
``ptycho-stream models pretrain`` and by tests.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings
from ptycho_stream.reconstruct.recipe import usable_device
from ptycho_stream.training.budget import Budget
from ptycho_stream.training.checkpoints import steps_of
from ptycho_stream.training.module import NetworkTraining
from ptycho_stream.training.objectives import SyntheticObjective
from ptycho_stream.training.synthetic import SyntheticData, SyntheticSettings, synthetic_batch
from ptycho_stream.training.trainer import Machine, make_trainer


@dataclass(frozen=True)
class PretrainResult:
    """What a run made.

    Attributes:
        network: the trained network, on the CPU, in evaluation mode.
        metrics: validation figures at the end: mean absolute and relative root mean square error
            of frames, and the latter with one phase for the frames of a sample.
        training: what made the weights (data, steps, time, machine), for the manifest.
        seed: of the run.
        checkpoint: the file to resume from.
    """

    network: UnrolledNetwork
    metrics: dict[str, float]
    training: dict[str, Any]
    seed: int
    checkpoint: Path

    def save(self, registry: ModelRegistry, name: str) -> Manifest:
        """Add the model to a registry's folder.

        Raises:
            ModelError: the registry has no folder, or a model of this name.
        """
        manifest = Manifest(
            name=name,
            architecture="unrolled",
            settings=self.network.settings.to_json(),
            training=self.training,
            seed=self.seed,
            metrics=self.metrics,
        )
        return registry.save(self.network, manifest)


def pretrain(
    out_dir: Path,
    budget: Budget,
    *,
    seed: int = 1,
    threads: int | None = None,
    learning_rate: float = 2e-3,
    settings: UnrolledSettings | None = None,
    data: SyntheticSettings | None = None,
    resume: Path | None = None,
    workers: int = 1,
    validate_every: int = 200,
    progress: bool = True,
) -> PretrainResult:
    """Train an unrolled network on synthetic frames.

    Args:
        out_dir: gets ``last.ckpt`` and ``metrics.csv``.
        budget: when to stop; the learning rate reaches zero there.
        seed: of the weights and of every frame.
        threads: torch threads; None leaves torch's default.
        learning_rate: peak of AdamW's rate.
        settings: shape of the network.
        data: what the training frames are like.
        resume: a ``last.ckpt`` of a run with the same arguments.
        workers: processes that make frames.
        validate_every: steps between validations and checkpoints.
        progress: show a progress bar.

    Raises:
        ModelError: ``resume`` is missing.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    first = steps_of(resume) if resume is not None else 0
    lightning.seed_everything(seed, workers=True)
    network = UnrolledNetwork(settings or UnrolledSettings())
    module = NetworkTraining(network, SyntheticObjective(), budget, learning_rate)
    data = data or SyntheticSettings()
    feed = SyntheticData(seed, first=first, workers=workers, settings=data)
    saver = ModelCheckpoint(
        out_dir, save_last=True, every_n_train_steps=validate_every, enable_version_counter=False
    )
    trainer = make_trainer(
        out_dir,
        budget,
        Machine(usable_device("auto", "the device"), precision="bf16-mixed"),
        loggers=[CSVLogger(out_dir, name="", version="", flush_logs_every_n_steps=50)],
        callbacks=[saver],
        validate_every=validate_every,
        progress=progress,
    )
    trainer.fit(module, datamodule=feed, ckpt_path=resume, weights_only=True)
    last, seconds = out_dir / "last.ckpt", module.seconds
    trainer.save_checkpoint(last)
    (figures,) = trainer.validate(module, datamodule=feed, verbose=False, weights_only=True)
    return PretrainResult(
        network=network.cpu().eval(),
        metrics={name: float(value) for name, value in figures.items()},
        training={
            "data": synthetic_batch.__module__,
            "data_settings": asdict(data),
            "learning_rate": learning_rate,
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "device": str(trainer.strategy.root_device),
            "torch": torch.__version__,
        },
        seed=seed,
        checkpoint=last,
    )
