"""Where a job's figures go: CSV always, TensorBoard and MLflow where they are installed."""

import sys

import pytest
from training_scans import PARENT, make_experiment, make_settings, make_spec, save_parent
from training_scans import write_scan as write

from ptycho_stream.errors import TrainingError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.training.jobs import run_job
from ptycho_stream.training.loggers import make_loggers

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties


def test_a_resumed_jobs_earlier_figures_are_kept(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,0.5\n")
    make_loggers(["csv"], tmp_path, run="a", mlflow_uri=None)
    assert (tmp_path / "metrics-1.csv").read_text().endswith("1,0.5\n")


def test_no_loggers_are_fine(tmp_path):
    assert make_loggers([], tmp_path, run="a", mlflow_uri=None) == []


@pytest.mark.parametrize(("name", "module"), [("mlflow", "mlflow"), ("tensorboard", "tensorboard")])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    tmp_path, monkeypatch, name, module
):
    for held in [m for m in sys.modules if m.split(".")[0] in (module, "tensorboardX")]:
        monkeypatch.delitem(sys.modules, held)
    for blocked in (module, "tensorboardX"):
        monkeypatch.setitem(sys.modules, blocked, None)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    for known in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{known}", False)
    with pytest.raises(TrainingError, match=rf"ptycho-stream\[{name}\]"):
        make_loggers([name], tmp_path, run="a", mlflow_uri=None)


@pytest.mark.interop
@pytest.mark.timeout(180)
def test_mlflow_gets_params_metrics_and_the_model_and_gives_them_back(tmp_path):
    """Round trip through a local store."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: the extra [mlflow]")
    experiment = make_experiment(frames=40)
    store = tmp_path / "tracking"
    settings = make_settings(
        tmp_path, experiment, loggers=("csv", "mlflow"), mlflow_uri=store.as_uri()
    )
    scan_id = write(tmp_path / "data", experiment)
    save_parent(settings)
    done = run_job(
        make_spec(scan_id, steps=20), settings, tmp_path / "job", lambda _: None, lambda: ""
    )
    assert done.state == "done", done.message
    client = mlflow.MlflowClient(store.as_uri())
    (experiment_id,) = [
        e.experiment_id for e in client.search_experiments() if e.name == "ptycho-stream"
    ]
    (run,) = client.search_runs([experiment_id])
    assert run.data.params["name"] == "tuned" and run.data.params["steps"] == "20"
    assert run.data.metrics["excess"] == pytest.approx(done.metrics["excess"])
    assert client.get_metric_history(run.info.run_id, "val_loss")
    copy = tmp_path / "copy" / "tuned"
    copy.parent.mkdir()
    client.download_artifacts(run.info.run_id, "model", str(copy.parent))
    (copy.parent / "model").rename(copy)
    network, manifest = ModelRegistry(copy.parent).load("tuned")
    assert manifest.parent == PARENT
    ours = ModelRegistry(settings.model.registry).load("tuned")[0].state_dict()
    assert all((tensor == ours[name]).all() for name, tensor in network.state_dict().items())


@pytest.mark.interop
@pytest.mark.timeout(180)
def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    experiment = make_experiment(frames=40)
    settings = make_settings(tmp_path, experiment, loggers=("tensorboard",))
    scan_id = write(tmp_path / "data", experiment)
    save_parent(settings)
    done = run_job(
        make_spec(scan_id, steps=3), settings, tmp_path / "job", lambda _: None, lambda: ""
    )
    assert done.state == "done", done.message
    assert list((tmp_path / "job" / "tensorboard").rglob("events.*"))
