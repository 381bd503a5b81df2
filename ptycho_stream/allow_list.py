"""The allow-list: which public keys may connect to a daemon, and what they may do.

A text file that people read and ``ptycho-stream keys allow | revoke`` edit: a line for each key,
with its name and rights, as in OpenSSH's authorized_keys.  The daemon reads it again by itself when
it has changed.  Lines and comments that an edit does not concern stay as they are.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError, KeyFileError
from ptycho_stream.keys import check_key_name, is_public_key

Right = Literal["publish", "subscribe", "control"]
RIGHTS: tuple[Right, ...] = get_args(Right)
"""To send frames and positions; to receive images; to ask and command."""
REVOKED = "revoked"
MAX_FILE_BYTES = 4 << 20
HEAD = """\
# Who may connect to the daemon: name, rights, public key.  `ptycho-stream keys allow | revoke`
# edit this file, and so may you; the daemon reads it again by itself.
# Rights: publish (frames and positions), subscribe (images), control, separated by commas;
# or "revoked", which keeps a key out and says so in the log.
"""


@dataclass(frozen=True)
class Allowed:
    """A line: one key."""

    name: str
    public_key: str
    rights: frozenset[Right]

    @property
    def revoked(self) -> bool:
        """Whether the key is known and kept out."""
        return not self.rights

    @property
    def words(self) -> str:
        """The rights as the file has them."""
        return ",".join(right for right in RIGHTS if right in self.rights) or REVOKED

    def line(self) -> str:
        """As the file has it."""
        return f"{self.name:<20} {self.words:<26} {self.public_key}"


AllowList = Mapping[str, Allowed]
"""By public key, in the file's order."""


def checked_rights(words: Iterable[str]) -> frozenset[Right]:
    """These words as rights.

    Raises:
        KeyFileError: there is no such right.
    """
    wanted = frozenset(words)
    if unknown := sorted(wanted.difference(RIGHTS)):
        raise KeyFileError(f"there is no right {unknown[0]!r}: there are {', '.join(RIGHTS)}")
    return cast("frozenset[Right]", wanted)


def read_allow_list(path: Path) -> AllowList:
    """Read the file.

    Raises:
        KeyFileError: it is missing, can be written by anybody, or a line is wrong; the text names
            the line.
    """
    return _parsed(_read(path), path)


def allow(path: Path, name: str, public_key: str, rights: Iterable[Right]) -> Allowed:
    """Let a key in, or give it other rights; the file is made if it is missing.

    Raises:
        KeyFileError: the name is taken by another key, or the file cannot be read or written.
    """
    check_key_name(name)
    entry = Allowed(name, public_key, frozenset(rights))
    with _alone(path):
        text = _read(path) if path.exists() else HEAD
        for other in _parsed(text, path).values():
            if other.name == name and other.public_key != public_key and not other.revoked:
                raise KeyFileError(
                    f"{path} has another key of the name {name}: revoke that first "
                    f"(`ptycho-stream keys revoke {name}`), or choose another name"
                )
        _write(path, _replaced(text, {public_key: entry}))
    return entry


def revoke(path: Path, name: str) -> list[Allowed]:
    """Keep the key, or keys, of this name out; they stay in the file as revoked.

    Raises:
        KeyFileError: there is none, or the file cannot be read or written.
    """
    with _alone(path):
        text = _read(path)
        entries = _parsed(text, path)
        named = [entry for entry in entries.values() if name in (entry.name, entry.public_key)]
        if not named:
            names = ", ".join(sorted({entry.name for entry in entries.values()})) or "none"
            raise KeyFileError(f"{path} has no key of the name {name}: it has {names}")
        out = [Allowed(entry.name, entry.public_key, frozenset()) for entry in named]
        _write(path, _replaced(text, {entry.public_key: entry for entry in out}))
    return out


def write_allow_list(entries: AllowList, path: Path) -> None:
    """Write a file with just these keys.

    Raises:
        KeyFileError: it cannot be written.
    """
    _write(path, HEAD + "".join(f"{entry.line()}\n" for entry in entries.values()))


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Keep other edits waiting, which would undo this one; locks the folder, as the file itself is
    replaced.
    """
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"cannot write the allow-list {path}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(
            f"cannot read the allow-list {path}: {error.strerror}; `ptycho-stream keys allow` "
            "makes one"
        ) from error
    if mode & 0o002:
        raise KeyFileError(
            f"anybody may write the allow-list {path} (mode {mode:04o}), and so let themselves in: "
            f"run chmod o-w {path} and look through it"
        )
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(f"the allow-list {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise KeyFileError(f"the allow-list {path} is not UTF-8 text: {error}") from error


def _parsed(text: str, path: Path) -> dict[str, Allowed]:
    entries: dict[str, Allowed] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = _entry(line)
            if entry is not None and entry.public_key in entries:
                raise KeyFileError(f"the key of {entries[entry.public_key].name} once more")
        except KeyFileError as error:
            raise KeyFileError(f"{path}, line {number}: {error}") from None
        if entry is not None:
            entries[entry.public_key] = entry
    return entries


def _entry(line: str) -> Allowed | None:
    """What a line says; None of an empty line or a comment."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    if len(words) != 3:
        raise KeyFileError(f"{len(words)} words where name, rights and public key are expected")
    name, said, public_key = words
    check_key_name(name)
    if not is_public_key(public_key):
        raise KeyFileError(f"the public key of {name} is none: it has 40 characters of Z85")
    return Allowed(name, public_key, checked_rights([] if said == REVOKED else said.split(",")))


def _replaced(text: str, entries: Mapping[str, Allowed]) -> str:
    """The file's text with these lines in place of those of the same keys, or added."""
    left = dict(entries)
    lines: list[str] = []
    for line in text.splitlines():
        present = _entry(line)
        changed = left.pop(present.public_key, None) if present else None
        lines.append(changed.line() if changed else line)
    return "\n".join([*lines, *(entry.line() for entry in left.values())]) + "\n"


def _write(path: Path, text: str) -> None:
    """Replace the file, keeping its owner and mode; a link stays one."""
    target = path.resolve()
    try:
        with atomic_file(target) as file:
            known = target.stat() if target.exists() else None
            os.fchmod(file.fileno(), stat.S_IMODE(known.st_mode) if known else 0o644)
            if known is not None:
                os.fchown(file.fileno(), known.st_uid, known.st_gid)
            file.write(text.encode())
    except FileFormatError as error:
        raise KeyFileError(f"cannot write the allow-list {path}: {error}") from error
