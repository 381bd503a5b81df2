"""Training jobs on stored scans, end to end: what they leave, how they stop, fail and resume."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import training_scans
from training_scans import (
    PARENT,
    make_experiment,
    make_settings,
    make_spec,
    save_parent,
    write_scan,
)

from ptycho_stream.errors import TrainingError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.misfit import Misfit
from ptycho_stream.scans import Catalogue
from ptycho_stream.training import jobs
from ptycho_stream.training.conductor import BestWeights
from ptycho_stream.training.job import JobProgress
from ptycho_stream.training.job_plan import read_plan
from ptycho_stream.training.jobs import run_job
from ptycho_stream.training.module import NetworkTraining
from ptycho_stream.training.scan_data import BatchPlan, SplitScan
from ptycho_stream.training.scan_frames import open_frames
from ptycho_stream.training.validation import Judgement, judge

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's own deprecations
    pytest.mark.timeout(180),
    pytest.mark.slow,
]


class Bench:
    """A store with a scan, a registry with a small model in use, and a way to run jobs."""

    def __init__(self, folder: Path, **training) -> None:
        experiment = make_experiment()
        self.folder = folder
        self.settings = make_settings(folder, experiment, **training)
        self.scan_id = write_scan(folder / "data", experiment)
        self.registry = ModelRegistry(folder / "models")
        self.reports: list[JobProgress] = []
        save_parent(self.settings)

    def run(self, job: str = "job-1", stop=lambda: "", **changes) -> JobProgress:
        spec = make_spec(self.scan_id, **self._given(job, changes))
        return run_job(spec, self.settings, self.folder / job, self.reports.append, stop)

    def _given(self, job: str, changes: dict) -> dict:
        parent = {} if changes.get("kind") == "train" else {"model": PARENT}
        return {"job_id": job} | parent | changes

    def weights(self, name: str):
        return self.registry.load(name)[0].state_dict()

    def start(self, job: str, **changes) -> subprocess.Popen:
        """The same in a process of its own."""
        spec = make_spec(self.scan_id, **self._given(job, changes))
        (self.folder / "settings.json").write_text(self.settings.model_dump_json())
        (self.folder / f"{job}.json").write_text(spec.to_json())
        files = [self.folder / name for name in ("settings.json", f"{job}.json", job)]
        return subprocess.Popen(
            [sys.executable, training_scans.__file__, *map(str, files)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def assert_equal_weights(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_fine_tuning_makes_a_better_model_and_takes_it_into_use(bench):
    done = bench.run(steps=40)
    assert done.state == "done" and done.promoted and done.model == "tuned"
    assert done.metrics["excess"] < done.metrics["excess_in_use"]
    assert bench.registry.active() == "tuned"
    manifest = bench.registry.load("tuned")[1]
    assert manifest.parent == PARENT and manifest.metrics == done.metrics
    assert manifest.training["job"] == "job-1" and manifest.training["steps"] == 40
    assert manifest.training["frames"] + manifest.training["frames_held_out"] == 60
    states = [report.state for report in bench.reports]
    assert states[0] == "running" and states[-2:] == ["validating", "done"]
    assert bench.reports[-1] == done
    fractions = [report.fraction for report in bench.reports]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_figures_go_to_a_csv_file_and_the_rate_really_changes(bench):
    bench.run(steps=40)
    rows = list(csv.DictReader((bench.folder / "job-1" / "metrics.csv").open()))
    rates = [float(row["lr-AdamW"]) for row in rows if row.get("lr-AdamW")]
    assert len(set(rates)) > 1 and rates[-1] < rates[0]
    assert any(row.get("val_loss") for row in rows)
    assert any(row.get("train_loss") for row in rows)


def judged_as(monkeypatch, *misfits: Misfit):
    given = tuple(replace(misfit, noise=1.0, noise_roots=10.0, pixels=1) for misfit in misfits)
    monkeypatch.setattr(jobs, "judge", lambda *_: Judgement(given, apart=True))


def test_a_model_that_is_not_better_is_kept_but_not_used(bench, monkeypatch):
    judged_as(monkeypatch, Misfit(3.0, 10.0, frames=9), Misfit(2.0, 10.0, frames=9))
    done = bench.run(steps=1, promote="if_better")
    assert done.state == "done" and not done.promoted and "not in use" in done.message
    assert done.metrics["excess"] > done.metrics["excess_in_use"]
    assert bench.registry.active() == PARENT
    assert "tuned" in [manifest.name for manifest in bench.registry.list()]


@pytest.mark.parametrize(("skipped", "promoted"), [(1, True), (4, False)])
def test_a_model_that_shows_less_is_not_better(bench, monkeypatch, skipped, promoted):
    ours = Misfit(1.5, 10.0, frames=9, skipped=skipped)
    judged_as(monkeypatch, ours, Misfit(2.0, 10.0, frames=9))
    done = bench.run(steps=1, promote="if_better")
    assert done.promoted is promoted
    assert ("unseen" in done.message) is not promoted


def test_a_logger_that_refuses_the_result_keeps_no_model_out_of_use(bench, monkeypatch):
    def refuse(*_):
        raise TrainingError("the store is full")

    monkeypatch.setattr(jobs, "log_result", refuse)
    done = bench.run(steps=1, promote="always")
    assert done.state == "done" and done.promoted and "the store is full" in done.message


def test_an_error_of_any_library_fails_the_job(bench, monkeypatch):
    class ForeignError(Exception):
        pass

    def break_off(*_, **__):
        raise ForeignError("connection lost")

    monkeypatch.setattr(jobs, "fit", break_off)
    done = bench.run(steps=1)
    assert done.state == "failed" and "connection lost" in done.message


def test_networks_are_judged_by_the_same_frames_which_did_not_help_to_stitch(bench):
    """One network is so unsure that its object has holes."""
    sure, unsure = (bench.registry.load(PARENT)[0] for _ in range(2))
    with torch.no_grad():
        unsure.confidence[-1].bias.fill_(-3.0)
    experiment = make_experiment()
    plan = BatchPlan(seed=1, frames=6, held_out=0.2)
    with Catalogue(bench.folder / "data").open(bench.scan_id) as reader:
        scan = SplitScan(open_frames(reader, experiment.probe, 5e5, (0, 60)), plan)
        asked = []
        both = judge([sure, unsure], [scan], torch.device("cpu"), 1, lambda: asked.append(1))
        alone = judge([sure], [scan], torch.device("cpu"), 1)
    one, other = both.misfits
    assert one.frames == other.frames > 0 and one.pixels == other.pixels
    assert other.skipped >= one.skipped
    assert alone.misfits[0].frames + alone.misfits[0].skipped == len(scan.judging)
    assert both.apart and len(asked) == 2


def test_promotion_can_be_forced_or_forbidden(bench):
    assert not bench.run(steps=20, promote="never").promoted
    assert bench.registry.active() == PARENT
    assert bench.run("job-2", name="forced", steps=1, promote="always").promoted
    assert bench.registry.active() == "forced"


def test_a_pinned_model_stays_and_the_job_says_so(bench):
    pinned = bench.settings.model.model_copy(update={"name": PARENT})
    bench.settings = bench.settings.model_copy(update={"model": pinned})
    done = bench.run(steps=2, promote="always")
    assert done.state == "done" and done.promoted is False
    assert "pins parent" in done.message


@pytest.mark.parametrize("loss", ["supervised", "mixed"])
def test_synthetic_frames_under_the_scans_probe_can_be_learnt_from(bench, loss):
    done = bench.run(steps=4, loss=loss)
    assert done.state == "done" and done.loss is not None
    assert bench.registry.load("tuned")[1].training["loss"] == loss


def test_a_network_can_be_trained_from_nothing(bench):
    shape = {"stages": 1, "steps": 1, "channels": [4, 4, 4], "memory": 2}
    done = bench.run(kind="train", network=shape, steps=4, promote="never")
    manifest = bench.registry.load("tuned")[1]
    assert done.state == "done"
    assert manifest.parent is None and manifest.settings == shape


@pytest.mark.parametrize("loss", ["unsupervised", "mixed"])
def test_networks_that_take_groups_are_trained_and_judged_too(bench, loss):
    done = bench.run(
        kind="train",
        architecture="cnn",
        network={"size_px": 32, "gridsize": 2, "n_filters_scale": 1},
        loss=loss,
        batch_frames=8,
        steps=3,
    )
    assert done.state == "done", done.message
    network, manifest = bench.registry.load("tuned")
    assert network.group_frames == 4 and manifest.architecture == "cnn"
    assert done.metrics["judged_frames"] > 0


def test_mixed_precision_trains(bench):
    done = bench.run(steps=3, precision="bf16-mixed")
    assert done.state == "done", done.message
    dtypes = {tensor.dtype for tensor in bench.weights("tuned").values()}
    assert dtypes == {torch.float32}


def test_the_same_job_gives_the_same_weights(bench):
    bench.run(steps=6, loss="mixed")
    bench.run("job-2", name="again", steps=6, loss="mixed")
    assert_equal_weights(bench.weights("tuned"), bench.weights("again"))


def test_minutes_are_a_budget_too(bench):
    started = time.monotonic()
    done = bench.run(minutes=0.03, steps=None)
    assert done.state == "done" and done.step > 1
    assert time.monotonic() - started < 60
    assert any(report.remaining_s for report in bench.reports)


def test_training_stops_early_when_validation_does_not_improve(bench, monkeypatch):
    monkeypatch.setattr("ptycho_stream.training.fitting._PATIENCE", 1)
    done = bench.run(steps=100, learning_rate=0.1, promote="never")
    assert done.state == "done" and done.step < 100
    assert done.fraction == 1


def test_the_best_weights_are_kept_not_the_last(bench):
    """A rate that ruins the network still ends with a candidate about as good as its parent."""
    done = bench.run(steps=60, learning_rate=0.03, promote="never")
    assert done.metrics["excess"] < 1.5 * done.metrics["excess_in_use"]


def test_a_loss_that_is_not_finite_fails_the_job_and_makes_no_model(bench):
    network, manifest = bench.registry.load(PARENT)
    with torch.no_grad():
        network.step_size[0, 0] = float("nan")
    bench.registry.save(network, replace(manifest, name="broken", sha256="", created=""))
    done = bench.run(steps=10, model="broken")
    assert done.state == "failed" and "nan" in done.message and "learning rate" in done.message
    assert "tuned" not in [m.name for m in bench.registry.list()]
    assert bench.registry.active() == PARENT


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": PARENT}, "never overwritten"),
        ({"scan_ids": ("01ARZ3NDEKTSV4RRFFQ69G5FAV",)}, "no scan"),
        ({"model": "nobody"}, "nobody"),
        ({"frames": (100, 200)}, "none of them from 100"),
        ({"frames": (0, 2), "held_out": 0.01}, "more frames"),
        ({"precision": "16-mixed"}, "needs a GPU"),
        ({"device": "cuda:7"}, "training.device"),
    ],
)
def test_a_job_that_cannot_be_done_says_what_to_change(bench, changes, text):
    done = bench.run(**changes)
    assert done.state == "failed" and text in done.message
    assert bench.registry.active() == PARENT


def test_a_cancelled_job_makes_no_model(bench):
    done = bench.run(steps=1000, stop=lambda: "cancel" if len(bench.reports) > 2 else "")
    assert done.state == "cancelled" and done.step < 1000
    assert "tuned" not in [m.name for m in bench.registry.list()]


@pytest.mark.parametrize(("why", "state"), [("cancel", "cancelled"), ("pause", "queued")])
def test_a_job_hears_in_its_validation_that_it_has_to_stop(bench, why, state):
    def stop():
        return why if bench.reports and bench.reports[-1].state == "validating" else ""

    ended = bench.run(steps=2, promote="always", stop=stop)
    assert ended.state == state and ended.model is None
    assert "tuned" not in [m.name for m in bench.registry.list()]
    assert bench.registry.active() == PARENT


def test_a_job_that_is_cancelled_when_its_model_is_saved_does_not_take_it_into_use(bench):
    def stop():
        return "cancel" if (bench.folder / "models" / "tuned").exists() else ""

    assert bench.run(steps=2, promote="always", stop=stop).state == "cancelled"
    assert bench.registry.active() == PARENT


def test_a_paused_job_goes_on_and_ends_as_if_it_had_not_been(bench):
    asked = iter(["", "", "", "pause"])
    paused = bench.run(steps=12, stop=lambda: next(asked))
    assert paused.state == "queued" and paused.step <= 4
    assert (bench.folder / "job-1" / "last.ckpt").exists()
    assert bench.run(steps=12).state == "done"
    bench.run("job-2", name="through", steps=12)
    assert_equal_weights(bench.weights("tuned"), bench.weights("through"))


def test_a_job_paused_at_its_best_validation_keeps_those_weights(bench, monkeypatch):
    """As if a high rate ruined the network after step 10; none is validated twice or left out."""
    seen: list[int] = []
    keep = BestWeights.on_validation_end

    def spy(self, trainer, module):
        keep(self, trainer, module)
        seen.append(trainer.global_step)

    def validate(self, *_):
        value = 1.0 + abs(self.trainer.global_step - 10)
        self.log("val_loss", torch.tensor(value), batch_size=1, on_epoch=True)

    monkeypatch.setattr(BestWeights, "on_validation_end", spy)
    monkeypatch.setattr(NetworkTraining, "validation_step", validate)
    given = {"steps": 20, "promote": "never"}
    assert bench.run("through", name="through", **given).metrics["val_loss"] == 1
    undisturbed = list(seen)
    seen.clear()
    asked = iter([*[""] * 9, "pause"])
    assert bench.run(stop=lambda: next(asked), **given).state == "queued"
    assert bench.run(**given).state == "done"
    assert seen == undisturbed
    assert_equal_weights(bench.weights("tuned"), bench.weights("through"))


def test_scans_are_kept_from_deletion_while_they_are_trained_on(bench):
    catalogue, kept = Catalogue(bench.folder / "data"), []

    def stop():
        if len(kept) < 2:  # the last time it is asked it needs them no more
            kept.append(catalogue.retain(0).deleted)
        return ""

    bench.run(steps=2, stop=stop)
    assert kept and not any(kept)
    assert catalogue.retain(0).deleted == (bench.scan_id,)


def test_a_growing_scan_does_not_change_a_resumed_job(bench):
    bench.run(steps=12, stop=lambda: "pause")
    plan = read_plan(bench.folder / "job-1")
    assert plan.scans[0].pairs == (0, 60) and plan.parent == PARENT
    damaged = bench.folder / "job-1" / "plan.json"
    damaged.write_text(damaged.read_text()[:20])
    done = bench.run(steps=12)
    assert done.state == "failed" and "request the job again" in done.message


def test_a_job_killed_at_any_moment_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    bench = Bench(tmp_path)
    assert bench.run("through", name="through", steps=80).state == "done"
    for _ in range(2):
        process = bench.start("killed", name="killed", steps=80)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()  # it trains
            time.sleep(random.uniform(0.0, 2.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = bench.run("killed", name="killed", steps=80)
    assert done.state == "done", done.message
    assert_equal_weights(bench.weights("through"), bench.weights("killed"))


def test_a_job_killed_after_its_model_was_saved_is_done_when_it_resumes(bench):
    first = bench.run(steps=4, promote="never")
    again = bench.run(steps=4, promote="always")
    assert again.state == "done" and again.metrics == first.metrics
    # The plan was settled by the first run; a request cannot change its mind.
    assert again.promoted is False


def test_two_processes_train_one_model_and_resume_as_one(bench):
    """Real processes over gloo; a job whose ranks end with different weights fails."""
    asked = iter(["", "pause"])
    given = {"steps": 6, "devices": 2}
    paused = bench.run(stop=lambda: next(asked, ""), **given)
    assert paused.state == "queued", paused.message
    done = bench.run(**given)
    assert done.state == "done", done.message
    assert bench.registry.load("tuned")[1].training["devices"] == 2
    bench.run("job-2", name="through", **given)
    bench.run("job-3", name="alone", steps=6)
    both, alone = bench.weights("tuned"), bench.weights("alone")
    assert_equal_weights(both, bench.weights("through"))
    assert any(not torch.equal(both[name], alone[name]) for name in both)


def test_a_plan_is_plain_json(bench):
    bench.run(steps=1)
    held = msgspec.json.decode((bench.folder / "job-1" / "plan.json").read_bytes())
    assert held["spec"]["steps"] == 1 and held["parent"] == PARENT
