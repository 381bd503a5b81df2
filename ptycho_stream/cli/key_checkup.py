"""The checks of ``ptycho-stream doctor`` that concern keys: files, permissions, who may come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ptycho_stream.allow_list import RIGHTS, read_allow_list
from ptycho_stream.cli.checkup import Finding
from ptycho_stream.errors import KeyFileError
from ptycho_stream.keys import PUBLIC_SUFFIX, load_private_key, load_public_key, read_token
from ptycho_stream.settings import Settings


def check_keys(settings: Settings) -> list[Finding]:
    """One finding for every file that has to do with who may connect."""
    security = settings.security
    looks: tuple[tuple[str, Path | None, Callable[[Path], str]], ...] = (
        ("security.key_path", security.key_path, _private_key),
        ("security.allowed_keys_path", security.allowed_keys_path, _allow_list),
        ("http.token_path", settings.http.token_path, _token),
        ("viewer.token_path", settings.viewer.token_path, _token),
    )
    return [_found(key, path, look) for key, path, look in looks if path is not None]


def _found(key: str, path: Path, look: Callable[[Path], str]) -> Finding:
    try:
        return Finding(key, "OK", str(path), look(path))
    except KeyFileError as error:
        state = "unusable" if path.exists() else "missing"
        return Finding(key, state, str(path), str(error), ok=False)


def _private_key(path: Path) -> str:
    key = load_private_key(path)
    public = path.with_suffix(PUBLIC_SUFFIX)
    if public.exists() and load_public_key(str(public)) != key.public:
        raise KeyFileError(
            f"{path} and the public key beside it do not belong together: clients that were given "
            "that one are refused; make the public file from `ptycho-stream keys show`"
        )
    return f"for its owner only; the public key is {key.public}"


def _allow_list(path: Path) -> str:
    entries = read_allow_list(path).values()
    of_right = Counter(right for entry in entries for right in entry.rights)
    told = ", ".join(f"{of_right[right]} may {right}" for right in RIGHTS)
    revoked = sum(entry.revoked for entry in entries)
    return f"{told}; {revoked} revoked"


def _token(path: Path) -> str:
    read_token(path)
    return "for its owner only"
