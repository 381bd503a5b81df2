"""The doctor and ``config check`` know all sources of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from daemon_harness import free_port
from typer.testing import CliRunner

from ptycho_stream.cli.config import app as config_app
from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.cli.positions_checkup import check_known_positions
from ptycho_stream.errors import SettingsError
from ptycho_stream.settings import Settings, load_settings

PANDA = '[positions.panda]\ny = "/Y"\nx = "/X"\nscale_yx_m = [1e-9, 1e-9]\n'
BLUESKY = '[positions.bluesky]\ny = "samy"\nx = "samx"\n'
SNAKE = '[positions.generated]\nkind = "snake"\nshape_yx = [20, 30]\nstep_yx_m = [1e-7, 2e-7]\n'


def loaded(folder: Path, text: str) -> Settings:
    path = folder / "daemon.toml"
    path.write_text('[probe]\npath = "probe.npz"\n' + text)
    return load_settings(path)


def positions(source: str, table: str = "", **keys: Any) -> str:
    held = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    return f'[positions]\nsource = "{source}"\n{held}{table}'


@pytest.mark.parametrize(("source", "table"), [("panda", PANDA), ("bluesky", BLUESKY)])
def test_streams_of_every_dialect_are_knocked_at(source, table, tmp_path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as sender:
        endpoint = f"tcp://127.0.0.1:{sender.bind_to_random_port('tcp://127.0.0.1')}"
        settings = loaded(tmp_path, positions(source, table, endpoint=endpoint))
        assert settings.positions.socket == "sub"  # as these senders publish
        found = {f.subject: f for f in check_endpoints(settings, timeout_s=2.0)}
    assert (found["positions"].state, found["positions"].target) == ("OK", endpoint)
    silent = positions(source, table, endpoint=f"tcp://127.0.0.1:{free_port()}")
    found = {f.subject: f for f in check_endpoints(loaded(tmp_path, silent), timeout_s=0.5)}
    assert found["positions"].state == "refused"
    assert check_known_positions(settings) == []


def test_a_generated_path_is_described_and_none_that_leaves_the_stage_is_taken(tmp_path) -> None:
    settings = loaded(tmp_path, positions("generated", SNAKE))
    assert {f.subject for f in check_endpoints(settings, 0.2)}.isdisjoint({"positions"})
    (found,) = check_known_positions(settings)
    assert found.ok and found.detail == "600 positions within 1.9 x 5.8 um"
    far = SNAKE + "origin_yx_m = [0.02, 0.0]\n"
    (found,) = check_known_positions(loaded(tmp_path, positions("generated", far)))
    assert not found.ok and "reconstruct.max_extent_m (now 0.01)" in found.detail
    jumps = SNAKE.replace("snake", "raster").replace("2e-7", "5e-5")
    (found,) = check_known_positions(loaded(tmp_path, positions("generated", jumps)))
    assert not found.ok and "19 of its 600 positions" in found.detail
    assert "reconstruct.max_step_m (now 0.001)" in found.detail
    checked = CliRunner().invoke(config_app, ["check", str(tmp_path / "daemon.toml")])
    assert isinstance(checked.exception, SettingsError)
    assert "positions.generated: 19 of its 600" in str(checked.exception)
    spiral = '[positions.generated]\nkind = "spiral"\nstep_yx_m = [1e-7, 1e-7]\n'
    (found,) = check_known_positions(loaded(tmp_path, positions("generated", spiral)))
    assert found.ok and "no end" in found.detail
    (found,) = check_known_positions(
        loaded(tmp_path, positions("generated", spiral + "radius_m = 1e-6\n"))
    )
    assert found.ok and found.detail.startswith("315 positions")  # pi r^2 / step^2


def test_a_file_of_positions_is_read(tmp_path) -> None:
    settings = loaded(tmp_path, positions("file", path="path.npz"))
    (found,) = check_known_positions(settings)
    assert (found.subject, found.state, found.ok) == ("positions.path", "missing", False)
    np.savez(tmp_path / "path.npz", positions_yx_m=np.zeros((5, 3)))
    assert check_known_positions(settings)[0].state == "unusable"
    np.savez(tmp_path / "path.npz", positions_yx_m=np.full((5, 2), 1.0))
    assert check_known_positions(settings)[0].state == "doubtful"
    np.savez(tmp_path / "path.npz", positions_yx_m=np.arange(10.0).reshape(5, 2) * 1e-6)
    (found,) = check_known_positions(settings)
    assert found.ok and found.detail == "5 positions within 8 x 8 um"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (positions("panda", PANDA), "source = 'panda' needs an endpoint"),
        (positions("panda", endpoint="ipc:///a"), "needs a table [positions.panda]"),
        (
            positions("native", PANDA, endpoint="ipc:///a"),
            "has a table [positions.panda] and source = 'native'",
        ),
        (positions("generated"), "needs a table [positions.generated]"),
        (positions("panda", PANDA.replace("1e-9, 1e-9", "0, 1"), endpoint="ipc:///a"), "a 0"),
        (
            positions("panda", PANDA.replace('"/X"', '"/Y"'), endpoint="ipc:///a"),
            "names one dataset twice",
        ),
        (positions("panda", PANDA + 'i0_from = "sum"\n', endpoint="ipc:///a"), "name i0 too"),
        (positions("panda", PANDA + 'gate_open = "below"\n', endpoint="ipc:///a"), "gate too"),
        (
            positions("bluesky", BLUESKY + "first_frame = 1\n", endpoint="ipc:///a"),
            "name that too",
        ),
        (positions("bluesky", BLUESKY + 'prefix = "a b"\n', endpoint="ipc:///a"), "prefix"),
        (positions("bluesky", BLUESKY + 'i0 = "samx"\n', endpoint="ipc:///a"), "twice"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(text, said, tmp_path) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)
    assert "positions" in str(caught.value)
