"""All benchmarks that fit into a quarter of an hour, in one file of figures; two files compared.

Each program compares side by side within its own run; what is compared here, between runs or
machines, are above all the ratios that it prints (``ratio``, ``*_over_*``).

    python benchmarks/suite.py --out out/bench/today.json
    python benchmarks/suite.py --compare docs/benchmarks/baseline.json out/bench/today.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

FOLDER = Path(__file__).parent
PROGRAMS = {
    "ingest": ("ingest.py", "--pairs", "3", "--peer"),
    "crop": ("crop.py",),
    "curve": ("curve.py", "--pairs", "3"),
    "stitch": ("stitch.py",),
    "networks": ("networks.py",),
    "live": ("live.py", "--pairs", "3", "--frames", "900", "--long", "0", "--json"),
    "wide": ("wide.py", "--pairs", "3", "--frames", "900"),
    "viewer": ("viewer.py", "--pairs", "3", "--json"),
    "subscribers": ("subscribers.py", "--pairs", "3"),
    "flat": ("flat.py", "--frames", "20000", "--pairs", "3"),
}
VERSIONS = ("ptycho-stream", "torch", "numpy", "pyzmq", "bitshuffle", "libertem-dectris")
LIMIT_S = 900
SAME = 1.1
"""Figures within this factor count as the same on a machine that is not alone."""


def machine() -> dict[str, Any]:
    """What the figures hang on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }


def run(only: list[str], out: Path) -> None:
    """Write the figures of each program, or the last line that it said where it failed.

    They are in the file as soon as a program has ended.
    """
    figures: dict[str, Any] = {"machine": machine()}
    for name in track(only, description="benchmarks", console=Console(stderr=True)):
        program, *options = PROGRAMS[name]
        done = subprocess.run(
            [sys.executable, str(FOLDER / program), *options],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode == 0:
            figures[name] = json.loads(done.stdout[done.stdout.index("{") :])  # after its table
        else:
            figures[name] = {"failed": done.stderr.strip().splitlines()[-1:]}
        out.write_text(json.dumps(figures, indent=1) + "\n")


def numbers(figures: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested figures, by its path."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(figures, list):
        for number, value in enumerate(figures):
            yield from numbers(value, f"{path}[{number}]")
    elif isinstance(figures, int | float) and not isinstance(figures, bool):
        yield path, float(figures)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Figures of both, and their ratio; those that differ by more than a tenth are marked."""
    table = Table("figure", "before", "after", "ratio", "")
    old, new = (
        {path: value for path, value in numbers(held) if not path.startswith("machine.")}
        for held in (before, after)
    )
    for path in [path for path in old if path in new]:
        ratio = new[path] / old[path] if old[path] else float("nan")
        mark = "" if 1 / SAME <= ratio <= SAME else "*"
        table.add_row(path, f"{old[path]:.4g}", f"{new[path]:.4g}", f"{ratio:.2f}", mark)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/figures.json"))
    parser.add_argument(
        "--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="NAME"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.compare:
        before, after = (json.loads(path.read_text()) for path in options.compare)
        Console().print(compare(before, after))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run(options.only, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
