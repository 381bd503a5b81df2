"""Stands in for Lightning in the tests of the job queue: what a job does is in its model's name.

On the path of a daemon's processes (``PYTHONPATH``) it puts a ``run_job`` of its own where the
training process looks for it; nothing else of the daemon is changed.
"""

import os
import signal
import sys
import time
import types


def run_job(spec, settings, folder, report, stop):
    """Count steps, and live or die as the name of the model says."""
    from ptycho_stream.errors import TrainingError
    from ptycho_stream.training.job import JobProgress

    at = folder / "checkpoint"
    first = int(at.read_text()) if at.exists() else 0
    (folder / "begun").open("a").write(f"{first} {os.nice(0)} {os.environ['OMP_WAIT_POLICY']}\n")
    wish = spec.name.split("-")[0]
    if wish == "fails":
        raise TrainingError("the loss is not a number: lower learning_rate")
    if wish == "raises":
        raise RuntimeError("out of memory")
    steps = spec.steps or 10
    for step in range(first, steps):
        at.with_suffix(".new").write_text(str(step))
        at.with_suffix(".new").replace(at)
        report(JobProgress(state="running", step=step, fraction=step / steps, loss=1 / (step + 1)))
        if wish == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if wish == "hangs":
            time.sleep(3600)
        time.sleep(0.05)
        match stop():
            case "pause":
                return JobProgress(state="queued", step=step, message="paused")
            case "cancel":
                return JobProgress(state="cancelled", step=step, message="cancelled")
    message = f"made of {steps} steps"
    return JobProgress(state="done", step=steps, fraction=1.0, message=message, model=spec.name)


module = types.ModuleType("ptycho_stream.training.jobs")
module.run_job = run_job
sys.modules[module.__name__] = module
