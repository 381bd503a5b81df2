"""CurveZMQ keys in files: who a daemon or a client is.

Made by ``ptycho-stream keys new``, read by the daemon, the terminal commands and programs of one's
own.  The files are ZeroMQ certificates (ZPL), as pyzmq and CZMQ have them: ``NAME.key`` holds the
public key and may go to anybody, ``NAME.key_secret`` both and stays where it was made.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from ptycho_stream.errors import KeyFileError

PUBLIC_SUFFIX, PRIVATE_SUFFIX = ".key", ".key_secret"
MAX_FILE_BYTES = 65_536
MIN_TOKEN_CHARACTERS = 16
Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LINE = r'^[ \t]*{}[ \t]*=[ \t]*["\']?([^\s"\']+)["\']?[ \t]*$'


@dataclass(frozen=True)
class PrivateKey:
    """A pair of keys, each 40 characters of Z85 (https://rfc.zeromq.org/spec/32)."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class ClientKeys:
    """What a client shows, and whom it expects.

    Attributes:
        own: the client's; the daemon's allow-list has its public half.
        server_public: of the daemon; nobody else can answer in its place.
    """

    own: PrivateKey
    server_public: str

    def show(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket show the key, before it connects."""
        socket.curve_publickey = self.own.public.encode()
        socket.curve_secretkey = self.own.secret.encode()
        socket.curve_serverkey = self.server_public.encode()


def load_client_keys(key: Path, server_key: str) -> ClientKeys:
    """A client's keys.

    Args:
        key: its private key file.
        server_key: the daemon's public key, or a file that has it.

    Raises:
        KeyFileError: one of them cannot be used.
    """
    return ClientKeys(load_private_key(key), load_public_key(server_key))


def is_public_key(text: str) -> bool:
    """Whether ``text`` is a key and not, say, the name of a file."""
    if not Z85_KEY.fullmatch(text):
        return False
    try:
        z85.decode(text.encode())
    except struct.error:  # five characters that stand for more than 32 bits
        return False
    return True


def new_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair of keys; the private file, which only its owner may read, and the public one.

    Raises:
        KeyFileError: ``name`` is none, one of the files exists, or they cannot be written.
    """
    check_key_name(name)
    private, public = folder / f"{name}{PRIVATE_SUFFIX}", folder / f"{name}{PUBLIC_SUFFIX}"
    pair = _pair()
    head = f'metadata\n    name = "{name}"\ncurve\n    public-key = "{pair.public}"\n'
    secret = f'    secret-key = "{pair.secret}"\n'
    write_private(private, f"# Private key of {name}: keep it to yourself.\n{head}{secret}")
    try:
        _write_new(public, f"# Public key of {name}.\n{head}", 0o644)
    except KeyFileError:
        private.unlink()
        raise
    return private, public


def check_key_name(name: str) -> None:
    """Refuse what would make a bad file name or a puzzling line of an allow-list.

    Raises:
        KeyFileError: ``name`` is no name.
    """
    if not KEY_NAME.fullmatch(name):
        raise KeyFileError(
            f"{name!r} is no name of a key: take 1 to 64 letters, digits, '.', '_', '@' and '-', "
            "a letter or digit first"
        )


def load_private_key(path: Path) -> PrivateKey:
    """Read a private key file.

    Raises:
        KeyFileError: it is missing, damaged, or others than its owner may read it.
    """
    text = read_private(path)
    public, secret = _found(text, "public-key"), _found(text, "secret-key")
    if public is None or secret is None:
        raise KeyFileError(
            f"{path} holds no private key: name the NAME{PRIVATE_SUFFIX} that "
            "`ptycho-stream keys new NAME` made"
        )
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeyFileError(f"{path} is damaged: its two keys do not belong together")
    return PrivateKey(public, secret)


def read_private(path: Path) -> str:
    """The text of a file that its owner alone may read: a private key, or a token.

    Raises:
        KeyFileError: it cannot be read, or others may read it too.
    """
    text, mode = _read(path)
    if mode & 0o077:
        raise KeyFileError(
            f"{path} can be read by others than its owner (mode {mode:04o}): run chmod 600 {path}; "
            "if somebody may have read it, make another and do away with this one"
        )
    return text


def read_token(path: Path) -> str:
    """The word that an HTTP address of the daemon asks for.

    Raises:
        KeyFileError: it cannot be read, others may read it too, or it is easily guessed.
    """
    token = read_private(path).strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable():
        raise KeyFileError(
            f"{path} holds no token of {MIN_TOKEN_CHARACTERS} characters or more: "
            "`ptycho-stream keys token FILE` makes one"
        )
    return token


def write_private(path: Path, text: str) -> None:
    """Make a file that its owner alone may read.

    Raises:
        KeyFileError: it exists, or cannot be written.
    """
    _write_new(path, text, 0o600)


def load_public_key(key: str) -> str:
    """A public key that is given as such, or as the name of a file that has it.

    Raises:
        KeyFileError: it is neither.
    """
    if is_public_key(key):
        return key
    path = Path(key)
    if not path.exists():
        raise KeyFileError(
            f"{key!r} is neither a public key (40 characters; mind the shell's quotes) nor a file "
            f"that holds one: `ptycho-stream keys show FILE` prints it"
        )
    public = _found(_read(path)[0], "public-key")
    if public is None:
        raise KeyFileError(f"{path} holds no public key: `ptycho-stream keys new` makes such files")
    return public


def public_key_beside(private: Path) -> str:
    """The public half of a private key that one may not be allowed to read.

    Raises:
        KeyFileError: the public file is not there, or damaged.
    """
    return load_public_key(str(private.with_suffix(PUBLIC_SUFFIX)))


def _pair() -> PrivateKey:
    """A pair whose public half can be an argument of a command: it does not begin with '-'."""
    while True:
        public, secret = zmq.curve_keypair()
        if not public.startswith(b"-"):
            return PrivateKey(public.decode(), secret.decode())


def _read(path: Path) -> tuple[str, int]:
    """A file's text, and its mode as it was when the text was read."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is no key file: it is larger than {MAX_FILE_BYTES} bytes")
    return data.decode("utf-8", errors="replace"), mode


def _found(text: str, word: str) -> str | None:
    match = re.search(_LINE.format(word), text, re.MULTILINE)
    return match[1] if match and is_public_key(match[1]) else None


def _write_new(path: Path, text: str, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask says
            file.write(text)
    except FileExistsError:
        raise KeyFileError(
            f"{path} exists and is not overwritten: whoever relies on it would be locked out; "
            "choose another name, or move it away"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
