"""Key files, the allow-list and `ptycho-stream keys`: what is made, read and refused."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
import zmq.auth

from ptycho_stream.allow_list import RIGHTS, allow, read_allow_list, revoke, write_allow_list
from ptycho_stream.cli import main
from ptycho_stream.cli.key_options import client_keys
from ptycho_stream.errors import KeyFileError
from ptycho_stream.keys import (
    is_public_key,
    load_client_keys,
    load_private_key,
    load_public_key,
    new_key,
    public_key_beside,
)

KEYS = ["rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"]


def test_a_new_key_is_for_its_owner_only_and_the_other_half_for_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private, public = new_key(tmp_path, "alice")
    finally:
        os.umask(before)
    assert (private.stat().st_mode & 0o777, public.stat().st_mode & 0o777) == (0o600, 0o644)
    key = load_private_key(private)
    assert load_public_key(str(public)) == load_public_key(str(private)) == key.public
    assert public_key_beside(private) == key.public
    assert key.secret not in repr(key) and key.secret not in public.read_text()
    with pytest.raises(KeyFileError, match="exists and is not overwritten"):
        new_key(tmp_path, "alice")
    assert load_private_key(private) == key


def test_the_files_are_those_of_other_zeromq_programs(tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "alice")
    key = load_private_key(private)
    theirs = (key.public.encode(), key.secret.encode())
    assert zmq.auth.load_certificate(private) == theirs
    assert zmq.auth.load_certificate(public) == (theirs[0], None)
    made, secret = map(Path, zmq.auth.create_certificates(tmp_path, "bob"))
    secret.chmod(0o600)
    assert load_private_key(secret).public == load_public_key(str(made))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610])
def test_a_private_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    private, _ = new_key(tmp_path, "alice")
    private.chmod(mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*chmod 600 {private}"):
        load_private_key(private)


def test_damaged_key_files_are_told_apart(tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "alice")
    other, _ = new_key(tmp_path, "bob")
    text = private.read_text()
    private.write_text(text.replace(load_public_key(str(private)), load_public_key(str(other))))
    with pytest.raises(KeyFileError, match="do not belong together"):
        load_private_key(private)
    public.chmod(0o600)
    with pytest.raises(KeyFileError, match="holds no private key"):
        load_private_key(public)
    public.write_text("nothing")
    with pytest.raises(KeyFileError, match="holds no public key"):
        load_public_key(str(public))
    public.write_bytes(b"\xff" * 100_000)
    with pytest.raises(KeyFileError, match="larger than"):
        load_public_key(str(public))
    with pytest.raises(KeyFileError, match="neither a public key"):
        load_public_key("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL")
    with pytest.raises(KeyFileError, match="No such file"):
        load_private_key(tmp_path / "nobody")
    with pytest.raises(KeyFileError, match="is no name"):
        new_key(tmp_path, "../alice")


def test_public_keys_are_forty_characters_that_stand_for_32_bytes() -> None:
    assert all(is_public_key(key) for key in KEYS)
    assert not is_public_key("#" * 40)  # more than 32 bits in five characters
    assert not is_public_key(KEYS[0] + "a") and not is_public_key("é" * 40)


def test_rights_are_given_changed_and_taken_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    allow(path, "alice", KEYS[0], ["subscribe"])
    path.write_text(path.read_text() + "\n# the detector's computer\n")
    path.chmod(0o640)
    allow(path, "detector", KEYS[1], ["publish"])
    allow(path, "alice", KEYS[0], ["control", "subscribe"])
    entries = read_allow_list(path)
    assert [(entry.name, entry.words) for entry in entries.values()] == [
        ("alice", "subscribe,control"),
        ("detector", "publish"),
    ]
    assert "\n# the detector's computer\n" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(KeyFileError, match="has another key of the name alice"):
        allow(path, "alice", KEYS[1], ["control"])
    assert [entry.name for entry in revoke(path, "alice")] == ["alice"]
    assert read_allow_list(path)[KEYS[0]].revoked
    with pytest.raises(KeyFileError, match="no key of the name bob: it has alice, detector"):
        revoke(path, "bob")
    write_allow_list(read_allow_list(path), tmp_path / "copy")
    assert read_allow_list(tmp_path / "copy") == read_allow_list(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("alice subscribe", "2 words where"),
        (f"alice subscribe {KEYS[0][:-1]}", "the public key of alice is none"),
        (f"alice everything {KEYS[0]}", "no right 'everything'"),
        (f"../x subscribe {KEYS[0]}", "is no name"),
        (f"alice control {KEYS[1]}", "the key of bob once more"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "allowed"
    path.write_text(f"bob publish {KEYS[1]}\n{line}\n")
    with pytest.raises(KeyFileError, match="allowed, line 2: ") as caught:
        read_allow_list(path)
    assert said in str(caught.value)


def test_a_list_that_anybody_may_write_or_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    with pytest.raises(KeyFileError, match="No such file"):
        read_allow_list(path)
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(KeyFileError, match=r"anybody may write.*chmod o-w"):
        read_allow_list(path)
    path.chmod(0o644)
    path.write_bytes(b"\xff\n")
    with pytest.raises(KeyFileError, match="not UTF-8"):
        read_allow_list(path)


def test_the_command_makes_lists_and_takes_away(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "new", "alice", "--json"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    assert main(["keys", "show", "alice.key_secret"]) == 0
    assert capsys.readouterr().out == f"{key}\n"
    right = ["--right", "subscribe", "--right", "control"]
    assert main(["keys", "allow", "alice", key, *right, "--list", "allowed"]) == 0
    assert main(["keys", "list", "--list", "allowed"]) == 0
    assert f"alice  -        yes        yes      {key}" in capsys.readouterr().out
    assert main(["keys", "revoke", "alice", "--list", "allowed"]) == 0
    assert main(["keys", "list", "--list", "allowed", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"name": "alice", "rights": [], "revoked": True, "public_key": key}
    assert main(["keys", "allow", "bob", "alice.key", "--right", "all", "--list", "allowed"]) == 1
    assert ", ".join(RIGHTS) in capsys.readouterr().err
    assert main(["keys", "list"]) == 2
    assert main(["keys", "token", "token"]) == 0
    assert Path("token").stat().st_mode & 0o777 == 0o600
    assert len(Path("token").read_text().strip()) >= 40


def config(folder: Path) -> Path:
    path = folder / "daemon.toml"
    path.write_text(
        '[probe]\npath = "probe.npz"\n[security]\nkey_path = "daemon.key_secret"\n'
        'allowed_keys_path = "allowed"\n[viewer]\nenabled = false\n'
    )
    return path


def test_the_allow_list_of_a_configuration_is_found(tmp_path: Path, capsys) -> None:
    path = config(tmp_path)
    new_key(tmp_path, "bob")
    public = str(tmp_path / "bob.key")
    assert main(["keys", "allow", "bob", public, "--right", "publish", "-c", str(path)]) == 0
    assert main(["keys", "list", "-c", str(path)]) == 0
    assert "bob" in capsys.readouterr().out
    path.write_text('[probe]\npath = "probe.npz"\n')
    assert main(["keys", "list", "-c", str(path)]) == 1
    assert "names no allow-list" in capsys.readouterr().err


def test_clients_take_the_daemons_own_key_from_its_configuration(tmp_path: Path) -> None:
    path = config(tmp_path)
    private, _ = new_key(tmp_path, "daemon")
    own = load_private_key(private)
    keys = client_keys(path)
    assert keys is not None and (keys.own, keys.server_public) == (own, own.public)
    private.unlink()
    with pytest.raises(KeyFileError, match="the daemon's own key is shown unless --key"):
        client_keys(path)
    assert client_keys(None) is None


def test_keys_are_loaded_for_programs(tmp_path: Path) -> None:
    private, _ = new_key(tmp_path, "alice")
    _, public = new_key(tmp_path, "daemon")
    keys = load_client_keys(private, str(public))
    assert keys.own == load_private_key(private)
    assert keys.server_public == load_public_key(str(public))


def test_edits_of_the_allow_list_at_the_same_time_undo_nothing(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    keys = [load_public_key(str(new_key(tmp_path, f"k{n}")[1])) for n in range(24)]
    allow(path, "k0", keys[0], ["control"])
    with ThreadPoolExecutor(8) as pool:
        gone = pool.submit(revoke, path, "k0")
        rest = [
            pool.submit(allow, path, f"k{n}", key, ["control"]) for n, key in enumerate(keys[1:], 1)
        ]
        for one in (gone, *rest):
            one.result(20)
    entries = read_allow_list(path)
    assert set(entries) == set(keys)
    assert [entry.name for entry in entries.values() if entry.revoked] == ["k0"]
