"""Training from a folder in a process of its own, and in this one; what its figures say."""

import csv
import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ptychopinn_scans import SIZE, make_scan, write_files

from ptycho_stream.errors import FileFormatError, PtychoPinnError, TrainingError
from ptycho_stream.files.npz import save_arrays
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn import fit as fit_module
from ptycho_stream.ptychopinn import fit_process, training
from ptycho_stream.ptychopinn.bundle import load_bundle, save
from ptycho_stream.ptychopinn.config import InferenceConfig, ModelConfig, TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.fit import fit
from ptycho_stream.ptychopinn.raw_data import RawData, RawDataTorch
from ptycho_stream.ptychopinn.reconstruction import reconstruct
from ptycho_stream.ptychopinn.training import train
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.training.epoch_figures import EpochFigures
from ptycho_stream.training.group_fit import Groups
from ptycho_stream.training.group_objectives import GroupBatch, KnownPatches, Misfit

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's own deprecations
    pytest.mark.slow,
]

CPU = ExecutionConfig(device="cpu", threads=1)
FRAMES = 48


@pytest.fixture(scope="module")
def scan():
    return make_scan(FRAMES)


@pytest.fixture(scope="module")
def folder(scan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder, scan)
    return folder


@pytest.fixture(scope="module")
def raw(folder):
    return RawData.from_file(folder / "train_data.npz")


def make_config(raw, out, **changes) -> TrainingConfig:
    values = {
        "model": ModelConfig(N=0, n_filters_scale=1),
        "nphotons": raw.nphotons,
        "n_groups": FRAMES,
        "nepochs": 3,
        "batch_size": 8,
        "output_dir": out,
    }
    return TrainingConfig(**values | changes)


# In a process of its own

HOST = """
import json, sys
from ptycho_stream.ptychopinn import ExecutionConfig, ModelConfig, TrainingConfig, train
folder, out, nphotons, epochs = sys.argv[1:]
config = TrainingConfig(
    model=ModelConfig(N=0, n_filters_scale=1, gridsize=2),
    nphotons=float(nphotons), n_groups=24, nepochs=int(epochs), batch_size=8, output_dir=out,
)
result = train(folder, config, execution=ExecutionConfig(device="cpu", threads=1))
print(json.dumps({"archive": str(result.archive), "epochs": len(result.epochs),
    "lightning": "lightning" in sys.modules}))
"""


@pytest.fixture(scope="module")
def trained(folder, raw, tmp_path_factory):
    """What a host got that trained for two epochs, gridsize 2."""
    out = tmp_path_factory.mktemp("out") / "model"
    host = subprocess.run(
        [sys.executable, "-c", HOST, str(folder), str(out), str(raw.nphotons), "2"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert host.returncode == 0, host.stderr
    return json.loads(host.stdout.splitlines()[-1]) | {"out": out}


@pytest.mark.timeout(180)
def test_the_host_neither_trains_nor_loads_lightning(trained):
    """Trap: memory, a GPU's above all, held in the host after training."""
    assert trained["lightning"] is False
    assert trained["epochs"] == 2
    assert Path(trained["archive"]) == trained["out"] / "wts.h5.zip"


def test_the_model_keeps_what_it_was_trained_with(trained, folder, raw):
    bundle = load_bundle(trained["out"])
    config = bundle.config
    assert config.model == ModelConfig(N=SIZE, n_filters_scale=1, gridsize=2)
    assert config.train_data_file == folder / "train_data.npz"
    assert config.nepochs == 2 and config.nphotons == pytest.approx(raw.nphotons)
    assert set(bundle.metrics) == {"val_loss", "spread", "collapsed", "best_epoch"}
    assert 0.9 < bundle.beam_ratio < 1.5
    np.testing.assert_array_equal(bundle.probe.modes, raw.probeGuess)


def test_a_bundle_reconstructs_a_file(trained, folder, tmp_path):
    config = InferenceConfig(
        model=ModelConfig(N=0, n_filters_scale=1, gridsize=2),
        model_path=trained["out"],
        test_data_file=folder / "test_data.npz",
        output_dir=tmp_path / "image",
        debug=True,
    )
    found = reconstruct(config, execution=CPU)
    with np.load(tmp_path / "image" / "object.npz") as held:
        np.testing.assert_array_equal(held["object"], found.object_yx)
        np.testing.assert_array_equal(held["weight"], found.weight_yx)
        assert tuple(held["corner_yx_px"]) == found.corner_yx_px
    with np.load(tmp_path / "image" / "patches.npz") as held:
        assert held["patches"].shape == (FRAMES, 4, SIZE, SIZE)
        assert held["nn_indices"].shape == (FRAMES, 4)
        assert held["coords_nn"].shape == held["coords_relative"].shape == (FRAMES, 1, 2, 4)
    again = reconstruct(
        replace(config, debug=False, output_dir=tmp_path / "again"),
        execution=ExecutionConfig(device="cpu", threads=1, workers=3),
    )
    np.testing.assert_allclose(again.object_yx, found.object_yx, atol=1e-5)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["object.npz"]
    with pytest.raises(PtychoPinnError, match=r"gridsize 1 \(the bundle: 2\)"):
        reconstruct(replace(config, model=ModelConfig(N=0, n_filters_scale=1)), execution=CPU)
    with pytest.raises(PtychoPinnError, match="model_path and test_data_file"):
        reconstruct(InferenceConfig())


def test_what_goes_wrong_in_the_process_is_told_in_the_host(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "run_apart", lambda _, request: fit_process.run(request))
    config = TrainingConfig(model=ModelConfig(N=0), nphotons=5.0, output_dir=tmp_path)
    with pytest.raises(TrainingError, match=r"nphotons is 5 and the frames have .* set Training"):
        train(folder, config, execution=CPU)
    assert not (tmp_path / "wts.h5.zip").exists()


def test_a_process_that_is_killed_is_told_too(folder, tmp_path, monkeypatch):
    (tmp_path / "outcome.json").write_text('{"epochs": []}')  # of an earlier training
    monkeypatch.setattr(training, "_PROGRAM", "this_module_does_not_exist")
    with pytest.raises(TrainingError, match="broke off with status 1"):
        train(folder, TrainingConfig(output_dir=tmp_path), execution=CPU)


WAITS = """
import pathlib, sys, time
from ptycho_stream.training.apart import end_with_parent
end_with_parent()
pathlib.Path(sys.argv[1]).write_text("here")
time.sleep(600)
"""


def test_the_process_ends_with_its_host(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    note = tmp_path / "note"
    script = (
        f"from ptycho_stream.training.apart import run_apart; run_apart('waits', {str(note)!r})"
    )
    host = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 30
        while not note.exists():
            assert host.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (child,) = psutil.Process(host.pid).children()
        host.kill()
        gone, alive = psutil.wait_procs([child], timeout=20)
        assert gone and not alive
    finally:
        host.kill()
        host.wait()


def test_a_folder_without_its_files_is_refused(folder, tmp_path):
    (tmp_path / "train_data.npz").write_bytes((folder / "train_data.npz").read_bytes())
    with pytest.raises(FileFormatError, match=r"there is no .*test_data\.npz"):
        train(tmp_path, TrainingConfig(output_dir=tmp_path / "out"))
    other = TrainingConfig(train_data_file=tmp_path / "other.npz")
    with pytest.raises(PtychoPinnError, match=r"train_data_file is .*give one of them"):
        train(folder, other)
    with pytest.raises(PtychoPinnError, match="probe_trainable"):
        train(folder, TrainingConfig(probe_trainable=True, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="cannot make the folder"):
        train(folder, TrainingConfig(output_dir=tmp_path / "file" / "out"))


# The user's page


def test_the_examples_of_the_user_s_page_run(tmp_path, monkeypatch, raw, folder, scan):
    """With smaller frames and one epoch; training in this process, to save its start."""
    page = (Path(__file__).parents[1] / "docs" / "ptychopinn.md").read_text()
    imports = re.findall(r"^    (from ptycho_stream.*)$", page, re.MULTILINE)
    blocks = ["\n".join(imports), *re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    assert len(blocks) == 5
    code = "\n".join(blocks)
    for told, small in (
        ("N=64, gridsize=2", "N=32, gridsize=2, n_filters_scale=1"),
        ("nphotons=4.6e5, nepochs=50", f"nphotons={raw.nphotons}, nepochs=1, n_groups=16"),
        ("cuda:0", "cpu"),
        ("generate_grouped_data(64", "generate_grouped_data(32"),
        ("nsamples=500", "nsamples=20"),
    ):
        assert told in code, told
        code = code.replace(told, small)
    monkeypatch.setattr(training, "run_apart", lambda _, request: fit_process.run(request))
    monkeypatch.chdir(tmp_path)
    Path("folder").symlink_to(folder)
    store_scan(Path("data"), scan)
    save_arrays(Path("probe.npz"), {"probe": scan.probe})
    held = {}
    exec(compile(code, "docs/ptychopinn.md", "exec"), held)
    assert held["image"].shape and Path("out/image/object.npz").exists()
    assert len(held["epochs"]) == 1


# In this process


@pytest.fixture(scope="module")
def fitted(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "out"
    torch.manual_seed(7)
    config = make_config(raw, out, nepochs=12, n_groups=16, batch_size=4)
    bundle, epochs = fit(raw, raw, config, CPU)
    return bundle, epochs, out


def test_the_loss_falls_and_the_best_epoch_is_kept(fitted):
    bundle, epochs, _ = fitted
    losses = [each.validation for each in epochs]
    assert [each.epoch for each in epochs] == list(range(1, 13))
    assert min(losses) < 0.95 * losses[0]
    assert bundle.metrics["val_loss"] == min(losses)
    assert bundle.metrics["best_epoch"] == 1 + losses.index(min(losses))
    assert all(np.isfinite([each.training, each.spread, each.flux]).all() for each in epochs)


def test_the_learning_rate_rises_and_falls(fitted):
    """Trap: schedulers created and never stepped."""
    with (fitted[2] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = next(key for key in rows[0] if key.startswith("lr"))
    rates = [float(row[name]) for row in rows if row[name]]
    assert len(rates) >= 2 and rates[-1] < 0.5 * max(rates)


def test_the_same_seed_trains_the_same_weights(raw, tmp_path):
    config = make_config(raw, tmp_path / "out", nepochs=1, n_groups=16, subsample_seed=3)

    def weights():
        bundle = fit(raw, raw, config, CPU)[0]
        return torch.cat([each.reshape(-1) for each in bundle.network.state_dict().values()])

    first = weights()
    assert torch.equal(first, weights())
    config = replace(config, subsample_seed=4)
    assert not torch.equal(first, weights())


def test_frames_of_the_store_train_too(scan, raw, tmp_path):
    scan_id = store_scan(tmp_path / "data", scan)
    with Catalogue(tmp_path / "data").open(scan_id) as reader:
        stored = RawDataTorch.from_scan(reader, Probe(scan.probe), cache_bytes=1 << 24)
        config = make_config(
            raw,
            tmp_path / "out",
            nepochs=1,
            n_subsample=32,
            n_groups=16,
            mae_weight=1.0,
            nll_weight=0.0,
            model=ModelConfig(N=0, n_filters_scale=1, object_big=False),
            intensity_scale_trainable=False,
        )
        bundle, epochs = fit(stored, stored, config, CPU)
    assert len(epochs) == 1 and epochs[0].flux == 1
    assert bundle.config.n_subsample == 32


def test_known_patches_teach(raw, tmp_path):
    model = ModelConfig(N=0, n_filters_scale=1, model_type="supervised")
    config = make_config(raw, tmp_path / "out", model=model, nepochs=8, n_groups=16, batch_size=4)
    _, epochs = fit(raw, raw, config, CPU)
    assert epochs[-1].validation < 0.985 * epochs[0].validation


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ModelConfig(N=64)}, "N is 64, the frames have 32"),
        ({"nphotons": 1e9}, r"set TrainingConfig\.nphotons="),
        ({"n_groups": 512}, "512 groups were asked for and there are 48 frames"),
        ({"n_subsample": 100}, "n_subsample is 100"),
        ({"model": ModelConfig(N=0, gridsize=2), "neighbor_count": 3}, "K is 3"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(raw, tmp_path, changes, said):
    with pytest.raises(PtychoPinnError, match=said):
        fit(raw, raw, make_config(raw, tmp_path, **changes), CPU)


def test_supervised_training_without_known_patches_is_refused(raw, tmp_path):
    without = RawData.from_coords_without_pc(
        raw.xcoords, raw.ycoords, raw.amplitude(np.arange(FRAMES)), raw.probeGuess, raw.scan_index
    )
    model = ModelConfig(N=0, model_type="supervised")
    with pytest.raises(PtychoPinnError, match="needs known patches"):
        fit(without, raw, make_config(raw, tmp_path, model=model), CPU)


# Objectives


class Answer(Network):
    """Gives the patches that it was made with, in the order of the frames."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        self.patches = patches

    def settings_json(self):
        return {}

    def stages(self, amplitude, probe, valid):
        return [Prediction(self.patches, torch.ones_like(amplitude))]


def batch_of(raw, frames, scale=1.0):
    """Frames as a batch, the probe as bright as it is times ``scale``, and their true patches."""
    rows = np.arange(frames)
    config = make_config(raw, Path("unused"), sequential_sampling=True)
    sums = np.square(raw.amplitude(np.arange(len(raw))), dtype=np.float64).sum((1, 2))
    root = float(np.sqrt(config.nphotons / sums.mean()))
    beam = Probe(raw.probeGuess * np.float32(root * scale))
    groups = fit_module._groups(raw, sums, config, beam, frames)
    corner = groups.frames.corner_yx_px[:frames]
    truth = np.stack([raw.objectGuess[y : y + SIZE, x : x + SIZE] for y, x in corner])
    return Groups(groups.frames, groups.indices).batch(rows), torch.as_tensor(truth)


def misfit(**changes) -> Misfit:
    values = {"nll_weight": 1.0, "mae_weight": 0.0, "stitched": True, "fit_flux": True} | changes
    return Misfit(**values)


@pytest.mark.parametrize(
    "changes", [{}, {"mae_weight": 1.0, "nll_weight": 0.0}, {"stitched": False}]
)
def test_true_patches_have_the_least_misfit(raw, changes):
    batch, truth = batch_of(raw, 6)
    objective = misfit(**changes)
    right = float(objective.loss(Answer(truth), batch).detach())
    for wrong in (truth.transpose(-1, -2), truth.flip(-1), truth.roll(2, -1), truth.roll(1, 0)):
        assert float(objective.loss(Answer(wrong), batch).detach()) > 1.5 * right


def test_the_flux_is_learnt_where_the_probe_is_too_bright(raw):
    batch, truth = batch_of(raw, 6, scale=1.2)
    objective = misfit()
    optimiser = torch.optim.Adam(objective.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        objective.loss(Answer(truth), batch).backward()
        optimiser.step()
    assert objective.flux == pytest.approx(1 / 1.2**2, rel=0.02)
    fixed = misfit(fit_flux=False)
    assert not [each for each in fixed.parameters() if each.requires_grad]
    assert fixed.flux == 1


def test_stitching_lets_a_wrong_patch_be_seen_by_its_neighbours(raw):
    """What object_big does."""
    batch, truth = batch_of(raw, 6)
    wrong = truth.clone()
    wrong[0] = wrong[0].flip(-1)

    def others(objective):
        """By how much the misfit of the frames with true patches rises."""
        right, spoiled = (
            objective.figures(Answer(each), batch)["val_loss"][1:].detach()
            for each in (truth, wrong)
        )
        return float((spoiled / right).max())

    assert others(misfit(stitched=False)) == 1
    assert others(misfit()) > 1.2


def test_a_constant_is_told_by_its_spread(raw, caplog, tmp_path):
    """Trap: a collapse to a constant without the loss showing it."""
    batch, truth = batch_of(raw, 6)
    constant = torch.full_like(truth, 0.9)
    figures = misfit().figures(Answer(constant), batch)
    assert float(figures["val_collapsed"].mean()) == 1 and float(figures["val_spread"].max()) < 1e-3
    figures = misfit().figures(Answer(truth), batch)
    assert float(figures["val_collapsed"].mean()) == 0 and float(figures["val_spread"].min()) > 0.05
    with caplog.at_level(logging.WARNING):
        fit_module._warn(EpochFigures(1, 0.1, 0.1, 0.0, 1.0, 1.0))
    assert "collapsed to a constant" in caplog.text


def test_the_phase_that_a_frame_does_not_tell_is_no_error(raw):
    batch, truth = batch_of(raw, 6)
    known = batch._replace(truth=truth)
    turned = truth * torch.exp(1j * torch.arange(6)[:, None, None])
    assert float(KnownPatches().loss(Answer(turned), known)) < 1e-3
    assert float(KnownPatches().loss(Answer(torch.ones_like(truth)), known)) > 0.05


def test_bad_pixels_are_no_error(raw):
    batch, truth = batch_of(raw, 6)
    y, x = divmod(int(batch.measured.amplitude.sum(0).argmax()), SIZE)
    dark = batch.measured.amplitude.clone()
    dark[:, y, x] = 0
    valid = batch.measured.valid.clone()
    valid[0, y, x] = False
    for changes in ({}, {"mae_weight": 1.0, "nll_weight": 0.0}):
        loss, believed, masked = (
            float(misfit(**changes).loss(Answer(truth), GroupBatch(seen, None)).detach())
            for seen in (
                batch.measured,
                batch.measured._replace(amplitude=dark),
                batch.measured._replace(amplitude=dark, valid=valid),
            )
        )
        assert believed > 1.15 * loss
        assert masked == pytest.approx(loss, rel=0.05)


@pytest.mark.interop
def test_mlflow_gets_settings_and_figures(raw, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: the extra [mlflow]")
    uri = (tmp_path / "tracking").as_uri()
    execution = replace(CPU, loggers=("csv", "mlflow"), mlflow_uri=uri)
    config = make_config(raw, tmp_path / "out", nepochs=1, n_groups=8)
    bundle, _ = fit(raw, raw, config, execution)
    client = mlflow.MlflowClient(uri)
    (found,) = [e for e in client.search_experiments() if e.name == "ptycho-stream"]
    (run,) = client.search_runs([found.experiment_id])
    assert run.data.params["gridsize"] == "1" and run.data.params["n_groups"] == "8"
    assert run.data.metrics["val_loss"] == pytest.approx(bundle.metrics["val_loss"])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("gridsize", "groups"), [(1, 200), (2, 100)])
def test_frames_alone_teach_the_object(tmp_path, gridsize, groups):
    """From a simulated scan, through files, training, bundle and reassembly, to the sample."""
    size = 64
    scan = scan_file_of(simulate_experiment(seed=1, frames=200, size_px=size))
    photons = write_files(tmp_path, scan)
    raw = RawData.from_file(tmp_path / "train_data.npz")
    model = ModelConfig(N=size, gridsize=gridsize, n_filters_scale=1)
    config = make_config(
        raw,
        tmp_path / "out",
        model=model,
        nphotons=photons,
        n_groups=groups,
        nepochs=15,
        batch_size=16 // gridsize**2,
        neighbor_count=8,
    )
    bundle, epochs = fit(raw, raw, config, ExecutionConfig(device="cpu"))
    assert bundle.metrics["collapsed"] < 0.1 and epochs[-1].spread > 0.1
    test_data = tmp_path / "test_data.npz"
    inference = InferenceConfig(
        model=model,
        model_path=save(bundle, tmp_path / "out"),
        test_data_file=test_data,
        output_dir=tmp_path / "image",
    )
    found = reconstruct(inference)
    (y, x), (height, width) = found.corner_yx_px, found.object_yx.shape
    inside = np.s_[size // 2 : height - size // 2, size // 2 : width - size // 2]
    truth = raw.objectGuess[y : y + height, x : x + width][inside]
    ours = found.object_yx[:height, :width][inside]
    assert np.corrcoef(in_phase(ours), in_phase(truth))[0, 1] > 0.5


def in_phase(values):
    """Phases about their mean direction."""
    return np.angle(values * np.exp(-1j * np.angle(values.sum()))).ravel()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_processes_train_together(folder, raw, tmp_path):
    """Each takes half of the steps; one of them writes."""
    config = make_config(raw, tmp_path / "out", nepochs=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("of an earlier training")
    execution = ExecutionConfig(device="cpu", devices=2, threads=1)
    result = train(folder, config, execution=execution)
    assert [each.epoch for each in result.epochs] == [1, 2]
    assert load_bundle(result.archive).metrics["val_loss"] < 1
    assert "val_loss" in (tmp_path / "out" / "metrics.csv").read_text()
    with pytest.raises(TrainingError, match="16-mixed needs a GPU"):
        train(folder, config, execution=ExecutionConfig(device="cpu", precision="16-mixed"))
