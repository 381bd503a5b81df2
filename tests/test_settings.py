"""The configuration file: what could not work is refused when it is read, by its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptycho_stream.errors import SettingsError
from ptycho_stream.settings import (
    GaussianSettings,
    PinholeSettings,
    Settings,
    ZonePlateSettings,
    load_settings,
    reachable,
)
from ptycho_streamd.supervisor import main

PROBE = '[probe]\npath = "probe.npz"\n'
OPTICS = '[probe.optics]\nkind = "zone-plate"\ndiameter_m = 160e-6\nouter_zone_width_m = 60e-9\n'


def loaded(folder: Path, text: str) -> Settings:
    path = folder / "daemon.toml"
    path.write_text(text if "[probe" in text else PROBE + text)
    return load_settings(path)


def test_the_shortest_file_names_a_probe(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "")
    assert settings.probe.path == tmp_path / "probe.npz"
    assert settings.data.directory == tmp_path / "data"
    assert settings.export.directory == tmp_path / "exports"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[reconstruct]\ndevice = "gpu"', "reconstruct.device"),
        ('[reconstruct]\ndevice = "cuda:x"', "reconstruct.device"),
        ("[reconstruct]\nbatch_frames = 1000000000", "reconstruct.batch_frames"),
        ("[reconstruct]\ntile_px = 100000", "reconstruct.tile_px"),
        ("[reconstruct]\nmax_step_m = inf", "reconstruct.max_step_m"),
        ("[data]\nframes_per_file = 1000000000000", "data.frames_per_file"),
        ("[data]\nresume_s = nan", "data.resume_s"),
        ("[detector]\ncrop_yx_px = [0, -4]", "detector.crop_yx_px"),
        ("[detector]\nmax_shape_yx_px = [0, 0]", "detector.max_shape_yx_px"),
        ('[detector]\nendpoint = "tcp://*:99"', "detector"),
        ('[detector]\nendpoint = "tcp://127.0.0.1:0"', "detector.endpoint"),
        ('[detector]\nendpoint = "tcp://0.0.0.0:99"\nattach = "bind"', "detector"),
        ('[positions]\nendpoint = "tcp://*:99"', "positions"),
        ("[geometry]\ndetector_pixel_yx_m = [0.0, -1.0]", "geometry.detector_pixel_yx_m"),
        ("[view]\ncenter_yx_px = [nan, 1.0]", "view.center_yx_px"),
        ("[results]\npublish_interval_ms = inf", "results.publish_interval_ms"),
        ("[supervisor]\nstop_timeout_s = 60.0", "supervisor.stop_timeout_s"),
        ('[http]\nhost = "0.0.0.0"', "http: host = '0.0.0.0' would be open"),
        ("[metadata]\na = nan", "metadata.a"),
        ("[metadata]\na = 100000000000000000000", "metadata.a"),
        ("[metadata]\na = [1]", "metadata.a"),
        ("[reconstruct]\nno_such_key = 1", "reconstruct.no_such_key"),
        ('[detector]\nmore_endpoints = ["tcp://127.0.0.1:9999"]', "detector"),
        ('[detector]\ndialect = "psi"\n[detector.odin]\ndataset = "a"', "detector"),
        ('[detector]\nendpoint = "pva://A"', "detector"),
        ('[detector]\ndialect = "pva"', "detector"),
        ('[detector]\ndialect = "pva"\nendpoint = "pva://A"\nsocket = "sub"', "detector"),
        ('[detector]\ndialect = "pva"\nendpoint = "pva://"', "detector.endpoint"),
        ("[detector.pva]\nposition_scale_yx_m = [1.0, 0.0]", "detector.pva"),
        ("[detector.slsdet]\nwait_bytes = 10", "detector.slsdet.wait_bytes"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    assert f"  {key}" in str(caught.value)


KEYS_ALONE = '[security]\nkey_path = "daemon.key_secret"\nallowed_keys_path = "allowed"\n'
KEYS = f'[viewer]\ntoken_path = "token"\n{KEYS_ALONE}'


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("results", "endpoint"),
        ("results", "resync_endpoint"),
        ("control", "endpoint"),
        ("detector", "endpoint"),
        ("positions", "endpoint"),
    ],
)
@pytest.mark.parametrize("host", ["*", "0.0.0.0", "192.168.1.7", "eth0", "beamline.example.org"])
def test_what_others_reach_is_bound_with_keys_only(
    tmp_path: Path, table: str, key: str, host: str
) -> None:
    text = f'[{table}]\n{key} = "tcp://{host}:9999"\n'
    if table in ("detector", "positions"):
        text += 'attach = "bind"\n'
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    said = str(caught.value)
    assert f"  {table}.{key} = 'tcp://{host}:9999' would be open to the network" in said
    assert "set security.key_path and security.allowed_keys_path" in said
    assert loaded(tmp_path, KEYS + text).security.key_path == tmp_path / "daemon.key_secret"


FLUO = '[[more_detectors]]\nname = "fluo"\nendpoint = "tcp://127.0.0.1:9998"\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (FLUO.replace("127.0.0.1", "0.0.0.0"), "more_detectors.fluo.endpoint"),
        (f'{FLUO}more_endpoints = ["tcp://0.0.0.0:9997"]', "more_detectors.fluo.more_endpoints.0"),
        ('[detector]\nmore_endpoints = ["tcp://0.0.0.0:9997"]', "detector.more_endpoints.0"),
    ],
)
def test_so_are_further_endpoints_and_stored_detectors(tmp_path: Path, text: str, key: str) -> None:
    text += '\nattach = "bind"\n'
    with pytest.raises(SettingsError, match=rf"  {re.escape(key)} = 'tcp://0\.0\.0\.0:"):
        loaded(tmp_path, text)
    assert loaded(tmp_path, KEYS + text).security.key_path == tmp_path / "daemon.key_secret"


def test_a_stored_detector_may_be_one_that_asks_for_a_key(tmp_path: Path) -> None:
    named = f'{KEYS}server_keys = {{ "tcp://127.0.0.1:9998" = "{"a" * 40}" }}\n'
    assert loaded(tmp_path, named + FLUO).of_detector("fluo").security.server_keys
    with pytest.raises(SettingsError, match="to which neither detector"):
        loaded(tmp_path, f'{named}{FLUO}attach = "bind"\n')


def test_the_daemon_does_not_start_on_the_network_without_keys(tmp_path: Path, capsys) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(PROBE + '[control]\nendpoint = "tcp://0.0.0.0:9602"\n')
    assert main(["--config", str(path)]) == 78
    assert "control.endpoint = 'tcp://0.0.0.0:9602' would be open" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[security]\nkey_path = "k"', "has key_path and no allowed_keys_path"),
        ('[security]\nallowed_keys_path = "a"', "has allowed_keys_path and no key_path"),
        ('[security]\nserver_keys = { "tcp://h:1" = "short" }', "is no public key"),
        (f'[security]\nserver_keys = {{ "tcp://h:1" = "{"a" * 40}" }}', "and no key_path"),
        (f'{KEYS}server_keys = {{ "tcp://h:1" = "{"a" * 40}" }}', "to which neither detector nor"),
        (f'{KEYS}readable_folders = "masks"', "security.readable_folders"),
        (KEYS_ALONE, "security.key_path is set and viewer.token_path is not"),
    ],
)
def test_security_that_is_half_there_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)


def test_folders_count_from_the_file_and_wildcards_are_reached_on_loopback(tmp_path: Path) -> None:
    settings = loaded(tmp_path, KEYS + 'readable_folders = ["masks", "/srv"]\n')
    assert settings.security.readable_folders == (tmp_path / "masks", Path("/srv"))
    assert reachable("tcp://*:9600") == reachable("tcp://0.0.0.0:9600") == "tcp://127.0.0.1:9600"
    assert reachable("tcp://10.0.0.1:9600") == "tcp://10.0.0.1:9600"


def test_a_probe_is_made_from_optics_instead(tmp_path: Path) -> None:
    optics = loaded(tmp_path, OPTICS + "defocus_m = -4e-4").probe.optics
    assert isinstance(optics, ZonePlateSettings)
    assert (optics.outer_zone_width_m, optics.defocus_m, optics.central_stop_m) == (60e-9, -4e-4, 0)
    pinhole = '[probe.optics]\nkind = "pinhole"\ndiameter_m = 5e-6\ndistance_m = 0\n'
    assert isinstance(loaded(tmp_path, pinhole).probe.optics, PinholeSettings)
    beam = '[probe]\ncarry = false\noptics = {kind = "gaussian", fwhm_m = 1e-6}'
    assert isinstance(loaded(tmp_path, beam).probe.optics, GaussianSettings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[probe]\nmodes = 2", "probe: has neither `path` (a file) nor a table [probe.optics]"),
        (PROBE + OPTICS, "probe: has both `path` and [probe.optics]: keep one of them"),
        ('[probe.optics]\nkind = "mirror"', "probe.optics.kind: is one of 'zone-plate', 'pinhole'"),
        ("[probe.optics]\nfwhm_m = 1e-6", "probe.optics.kind: missing"),
        ('[probe.optics]\nkind = "gaussian"', "probe.optics.fwhm_m: missing"),
        (OPTICS + "fwhm_m = 1e-6", "probe.optics.fwhm_m: unknown key"),
        (OPTICS + "central_stop_m = 160e-6", "probe.optics: central_stop_m must be smaller"),
        (OPTICS + "defocus_m = inf", "probe.optics.defocus_m: "),
    ],
)
def test_a_probe_has_one_origin_that_makes_sense(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    assert f"  {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (
            '[results]\nendpoint = "tcp://127.0.0.1:99"\nresync_endpoint = "tcp://127.0.0.1:99"',
            ("results.endpoint", "results.resync_endpoint"),
        ),
        (
            '[control]\nendpoint = "tcp://localhost:9600"',
            ("results.endpoint", "control.endpoint"),
        ),
        ("[http]\nport = 9602", ("control.endpoint", "http.port")),
        (
            '[control]\nendpoint = "ipc:///a"\n[results]\nendpoint = "ipc:///a"',
            ("results.endpoint", "control.endpoint"),
        ),
        (
            '[detector]\nendpoint = "tcp://127.0.0.1:9600"\nattach = "bind"',
            ("results.endpoint", "detector.endpoint"),
        ),
        (
            '[detector]\nattach = "bind"\nmore_endpoints = ["tcp://127.0.0.1:9600"]',
            ("results.endpoint", "detector.more_endpoints.0"),
        ),
    ],
)
def test_two_sockets_cannot_bind_one_endpoint(
    tmp_path: Path, text: str, keys: tuple[str, str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, text)
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    "text",
    [
        '[reconstruct]\ndevice = "cuda:1"',
        '[reconstruct]\ndevice = "cpu"',
        '[detector]\nendpoint = "tcp://[::1]:99"\nattach = "bind"',
        '[http]\nhost = "::1"',
        "[http]\nport = 0",
        '[metadata]\na = 1\nb = "x"\nc = 1.5\nd = true',
    ],
)
def test_what_works_is_taken(tmp_path: Path, text: str) -> None:
    loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("model", "said"),
    [("", "set model.registry"), ('registry = "models"\nname = "mine"', "model.name")],
)
def test_models_that_could_not_be_kept_or_used_are_not_made_unasked(
    tmp_path: Path, model: str, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        loaded(tmp_path, f"[training]\nautomatic_above = 0.1\n[model]\n{model}")
