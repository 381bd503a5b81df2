"""A job whose other processes die says so."""

import subprocess
import sys

import pytest

from ptycho_stream.errors import TrainingError
from ptycho_stream.settings import Settings
from ptycho_stream.training import peers as module

SETTINGS = Settings.model_validate({"probe": {"path": "probe.npz"}})


def _as_peers(monkeypatch, program):
    def start(*_):
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)

    monkeypatch.setattr(module, "_start", start)


def test_a_peer_that_dies_is_named_where_torch_only_misses_it(tmp_path, monkeypatch):
    _as_peers(monkeypatch, "raise SystemExit(3)")
    monkeypatch.setattr(module, "_NOTICE_S", 5.0)
    with (
        pytest.raises(TrainingError, match="ended with 3"),
        module.peers(tmp_path, SETTINGS, 2),
    ):
        raise RuntimeError("wait timeout")


def test_an_error_of_its_own_stays_and_the_peers_end(tmp_path, monkeypatch):
    _as_peers(monkeypatch, "import sys; sys.stdin.read()")
    with pytest.raises(RuntimeError, match="memory"), module.peers(tmp_path, SETTINGS, 2):
        raise RuntimeError("out of memory")
