"""The training proper of a job: its frames, its network, Lightning's fit, the weights it ends with.

Runs in the job's own process and, with several devices, in its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import msgspec
import torch
import xxhash
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import TrainingError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry, build
from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.recipe import told_probe, usable_device
from ptycho_stream.scans import Catalogue
from ptycho_stream.settings import Settings
from ptycho_stream.training.checkpoints import steps_of
from ptycho_stream.training.conductor import BestWeights, Conductor, Stop, progress_of
from ptycho_stream.training.job import JobProgress
from ptycho_stream.training.job_plan import JobPlan, read_plan
from ptycho_stream.training.module import NetworkTraining
from ptycho_stream.training.objectives import ScanObjective
from ptycho_stream.training.peers import Rank, leave_group
from ptycho_stream.training.scan_data import BatchPlan, ScanData, SplitScan
from ptycho_stream.training.scan_frames import open_frames
from ptycho_stream.training.trainer import Machine, make_trainer

CHECKPOINT_FILE = "last.ckpt"
TRAINED_FILE = "trained.safetensors"
"""The weights at the end of training; a job that finds it has only to validate them."""

LEARNING_RATE = 1e-3
"""Peak rate where neither the job nor the settings name one (docs/training.md)."""

SAVE_INTERVAL_S = 10.0
"""Between checkpoints; what a killed job has to do again at most."""

MONITOR = "val_loss"
_VALIDATIONS = 20
"""So many validations fit into a budget of steps."""
_VALIDATE_EVERY = 50
"""Steps between validations in a budget of minutes."""
_PATIENCE = 15
"""Training stops early after so many validations without a better one."""
_WARM_UP_STEPS = 10
_LEASE_HOLDER = "training"


@dataclass(frozen=True)
class Trained:
    """What training ended with.

    Attributes:
        steps: done, in all runs of the job.
        seconds: spent.
        value: the validation loss of the weights that were kept.
    """

    steps: int
    seconds: float
    value: float


def initial_network(plan: JobPlan, settings: Settings) -> Network:
    """The parent's copy, or a new network with weights that the seed gives.

    Raises:
        ModelError: the parent does not load, or the settings make no network.
    """
    if plan.parent is not None:
        return ModelRegistry(settings.model.registry).load(plan.parent)[0]
    torch.manual_seed(plan.spec.seed)
    return build(Manifest(plan.spec.name, plan.architecture, plan.spec.network))


@contextmanager
def opened_scans(
    plan: JobPlan, settings: Settings, batches: BatchPlan
) -> Generator[list[SplitScan]]:
    """The plan's scans, kept from being deleted while the block runs.

    Raises:
        ProbeError: the probe cannot be read, or cannot be made for a scan.
        StoreError: a scan is gone, or cannot be read.
        TrainingError: a scan cannot be trained on, or has too few frames.
    """
    catalogue = Catalogue(settings.data.directory, verify_reads=settings.data.verify_reads)
    with ExitStack() as stack:
        scans: list[SplitScan] = []
        for planned in plan.scans:
            stack.enter_context(catalogue.lease(planned.scan_id, _LEASE_HOLDER))
            reader = stack.enter_context(catalogue.open(planned.scan_id))
            probe = told_probe(settings.probe, reader.header)
            frames = open_frames(reader, probe, planned.photons, planned.pairs)
            scans.append(SplitScan(frames, batches))
        yield scans


def batches_of(plan: JobPlan, network: Network, rank: Rank) -> BatchPlan:
    """How a job's batches are drawn."""
    spec = plan.spec
    assert spec.batch_frames is not None and spec.held_out is not None
    return BatchPlan(
        seed=spec.seed,
        frames=spec.batch_frames,
        group_frames=network.group_frames,
        held_out=spec.held_out,
        measured=spec.loss != "supervised",
        synthetic=spec.loss != "unsupervised",
        rank=rank.number,
        ranks=rank.ranks,
    )


def fit(
    plan: JobPlan,
    folder: Path,
    scans: Sequence[SplitScan],
    network: Network,
    rank: Rank,
    *,
    loggers: Sequence[Logger] = (),
    report: Callable[[JobProgress], None] = lambda _: None,
    stop: Callable[[], Stop] = lambda: "",
) -> Stop:
    """Train ``network`` from the checkpoint in ``folder``, if there is one, to the budget's end.

    Rank 0 leaves the best weights in ``folder``.

    Returns:
        Why it ended before the budget did; empty if it did not.

    Raises:
        TrainingError: the loss is not finite, or Lightning refuses the settings.
    """
    spec, budget = plan.spec, plan.budget
    batches = batches_of(plan, network, rank)
    checkpoint = folder / CHECKPOINT_FILE
    resumed = checkpoint.exists()
    network.train()  # the registry gives networks in evaluation mode
    module = NetworkTraining(
        network,
        ScanObjective(batches.frames_of_a_sample),
        budget,
        spec.learning_rate or LEARNING_RATE,
        _WARM_UP_STEPS,
    )
    data = ScanData(scans, batches, steps_of(checkpoint) if resumed else 0)
    steps = budget.steps
    validate_every = max(steps // _VALIDATIONS, 1) if steps else _VALIDATE_EVERY
    conductor = Conductor(checkpoint, report, stop, SAVE_INTERVAL_S, validate_every)
    best = BestWeights(MONITOR)
    try:
        trainer = make_trainer(
            folder,
            budget,
            _machine(plan, rank),
            loggers=loggers,
            callbacks=[best, EarlyStopping(MONITOR, patience=_PATIENCE), conductor],
            validate_every=validate_every,
        )
    except MisconfigurationException as error:
        raise TrainingError(
            f"training cannot be set up so: {error}; correct device, devices or "
            "precision under [training]"
        ) from error
    for logger in loggers:
        logger.log_hyperparams(msgspec.to_builtins(spec))
    trainer.fit(
        module, datamodule=data, ckpt_path=checkpoint if resumed else None, weights_only=True
    )
    if conductor.outcome:
        return conductor.outcome
    done = progress_of(module)
    _check_ranks_agree(trainer, network)
    # Weights of the last steps, with the lowest rate, are often the best: let them compete.
    trainer.validate(module, datamodule=data, verbose=False, weights_only=True)
    if rank.number == 0:
        _leave(folder / TRAINED_FILE, best, Trained(done.step, done.elapsed_s, best.value))
    return ""


def _machine(plan: JobPlan, rank: Rank) -> Machine:
    spec = plan.spec
    assert spec.device is not None and spec.precision is not None
    device = usable_device(spec.device, "training.device")
    if device.type == "cpu" and spec.precision == "16-mixed":
        raise TrainingError(
            "training.precision 16-mixed needs a GPU: use bf16-mixed or 32-true on a CPU"
        )
    first = device.index or 0
    if device.type == "cuda" and first + rank.ranks > torch.cuda.device_count():
        raise TrainingError(
            f"training.devices is {rank.ranks} from cuda:{first} on, and this machine has "
            f"{torch.cuda.device_count()} GPU(s): ask for fewer"
        )
    return Machine(device, rank.ranks, spec.precision, rank.environment())


def _check_ranks_agree(trainer: lightning.Trainer, network: Network) -> None:
    """Refuse weights that differ between processes: their gradients were not averaged."""
    if trainer.world_size == 1:
        return
    held = network.state_dict()
    digest = xxhash.xxh3_128()
    for tensor in held.values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    mine = digest.hexdigest()
    if mine != trainer.strategy.broadcast(mine):
        raise TrainingError(
            f"the weights of process {trainer.global_rank} differ from those of the first: train "
            "with one device, and report this"
        )


def _leave(path: Path, best: BestWeights, trained: Trained) -> None:
    assert best.weights is not None
    tensors = {name: tensor.contiguous() for name, tensor in best.weights.items()}
    metadata = {"trained": msgspec.json.encode(trained).decode()}
    with atomic_file(path) as file:
        file.write(save_tensors(tensors, metadata))


def take_trained(folder: Path, network: Network) -> Trained | None:
    """Load what :func:`fit` left in a job's folder into ``network``; None before it has."""
    path = folder / TRAINED_FILE
    if not path.exists():
        return None
    with safe_open(path, "pt") as held:
        metadata = held.metadata()
        names: list[str] = held.keys()
        network.load_state_dict({name: held.get_tensor(name) for name in names})
    network.cpu().eval()
    return msgspec.json.decode(metadata["trained"], type=Trained)


def fit_as_peer(folder: Path, settings: Settings, rank: Rank) -> None:
    """Do what a process that is not the job's own has to do."""
    torch.set_num_threads(settings.training.threads)
    plan = read_plan(folder)
    network = initial_network(plan, settings)
    with opened_scans(plan, settings, batches_of(plan, network, rank)) as scans:
        fit(plan, folder, scans, network, rank)
    leave_group()
