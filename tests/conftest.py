"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptycho_stream.reconstruct import devices

# As `make test` has it: with more, workers share a batch, and networks that tests make up to
# record or to answer whole batches see parts of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's tests."""
    parser.addoption(
        "--update-pictures",
        action="store_true",
        help="write the screenshots of the documents anew (tests/interop/test_browser.py)",
    )


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where the measured scans are; tests that need them are skipped where nobody says."""
    value = os.environ.get("PTYCHO_STREAM_DATA")
    if not value:
        pytest.skip("PTYCHO_STREAM_DATA is not set: it names the folder of the measured scans")
    return Path(value)


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where patches are made and added: as on a CPU, and as on a GPU, but computed by the CPU."""
    monkeypatch.setattr(devices, "computes_on_host", lambda _: request.param == "host")
    return request.param
