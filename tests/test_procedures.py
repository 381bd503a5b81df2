"""Procedures of the documents, carried out as they are written: keys in five minutes, back-up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import free_port, wait_for
from scan_samples import make_scan

from ptycho_stream.scans.catalogue import Catalogue

DOCS = Path(__file__).parents[1] / "docs"


def section(document: str, heading: str) -> str:
    text = (DOCS / document).read_text()
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def commands(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def toml(text: str) -> str:
    return "\n".join(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)).replace("\n   ", "\n")


@pytest.fixture
def shell(tmp_path: Path):
    """Runs commands in a folder where the two programs are those of this project."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (
        ("ptycho-stream", "ptycho_stream.cli"),
        ("ptycho-streamd", "ptycho_streamd.supervisor"),
    ):
        code = f"import sys; from {module} import main; sys.exit(main())"
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(*lines: str) -> str:
        script = "set -e\n" + "\n".join(lines)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.interop
@pytest.mark.timeout(300)
def test_the_daemon_is_opened_to_the_network_in_five_minutes(shell, tmp_path):
    text = section("security.md", "Open the daemon to the beamline in five minutes")
    settings = f'[probe]\npath = "probe.npz"\n{toml(text)}'
    steps = commands(text)
    for port in ("9600", "9601", "9602"):
        free = str(free_port())
        settings = settings.replace(port, free)
        steps = [line.replace(port, free) for line in steps]
    settings = settings.replace("[viewer]\n", f"[viewer]\nport = {free_port()}\n")
    settings += f"\n[http]\nport = {free_port()}\n"
    np.savez(tmp_path / "probe.npz", probe=np.ones((1, 128, 128), np.complex64))
    (tmp_path / "my.toml").write_text(settings)
    at = next(n for n, line in enumerate(steps) if line.startswith("ptycho-streamd"))
    here = [line.replace("HOST", "127.0.0.1") for line in steps[at + 1 :]]
    (watch,) = [line for line in here if line.startswith("ptycho-stream watch")]
    hers = here[: here.index(watch)]
    then = here[here.index(watch) + 1 :]
    shell(*steps[:at])
    log = (tmp_path / "log").open("wb")
    # Of all that runs here this alone goes on: it is ended by its own number.
    daemon = subprocess.Popen(
        [tmp_path / "bin" / "ptycho-streamd", *steps[at].removesuffix(" &").split()[1:]],
        cwd=tmp_path,
        stderr=log,
    )
    try:
        wait_for(lambda: "ready: control at" in (tmp_path / "log").read_text(), 100)
        assert "state: ready" in shell(*hers)
        seen = shell(*hers[:2], f"{watch} --once --timeout 5 2>&1 || true")
        assert "the daemon has no image yet" in seen
        shell(*then)
        wait_for(lambda: "the allow-list has changed" in (tmp_path / "log").read_text())
        told = shell(*hers[:2], f"{hers[2]} 2>&1 || true")
        assert "does not let us in: our key" in told
    finally:
        daemon.terminate()
        daemon.wait(10)
        log.close()


def test_a_scan_is_backed_up_and_restored(shell, tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    first, second = tmp_path / "first", tmp_path / "second"
    scan_id = make_scan(first, frames=5)
    second.mkdir()
    lines = [
        line.replace("SCAN_ID", scan_id)
        for line in commands(section("operations.md", "Back up and restore"))
        if line.startswith("tar ") and "scan.tar.gz" in line
    ]
    pack, unpack = lines
    shell(pack.replace("/var/lib/ptycho-stream", str(first)))
    shutil.rmtree(first)
    shell(unpack.replace("/var/lib/ptycho-stream", str(second)))
    with Catalogue(second).open(scan_id) as scan:
        assert scan.committed == 5
        assert scan.frames(slice(0, 5)).shape[0] == 5
    assert [header.scan_id for header in Catalogue(second).scans()] == [scan_id]
