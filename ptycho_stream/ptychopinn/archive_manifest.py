"""What a bundle says about itself: ``manifest.dill`` and its twin ``manifest.json``.

The former is a pickle, because PtychoPINN's programs look for one, and pickles can run code. Ours
holds a dict of text only, and is read, as anybody's is, by a reader that admits containers and text
and nothing else. Used by ``bundle``.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ptycho_stream.errors import ModelError

PICKLE_FILE = "manifest.dill"
JSON_FILE = "manifest.json"
MAX_BYTES = 1 << 16
"""Of either file; ours have about a hundred."""

BACKEND = "pytorch"
VERSION = "1.0"
MODELS = ("autoencoder", "diffraction_to_obj")

# What containers and text are written with; nothing here can name, call or build anything else.
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"}
_ADMITTED = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", *_MEMO),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING"),
}


@dataclass(frozen=True, slots=True)
class ArchiveManifest:
    """A bundle's manifest.

    Attributes:
        backend: of the program that wrote it.
        version: of the layout.
        models: names of its folders.
    """

    backend: str = BACKEND
    version: str = VERSION
    models: tuple[str, ...] = MODELS

    def files(self) -> dict[str, bytes]:
        """Both files by name."""
        held = {"models": list(self.models), "version": self.version, "backend": self.backend}
        return {
            PICKLE_FILE: pickle.dumps(held, protocol=2),
            JSON_FILE: (json.dumps(held, indent=2) + "\n").encode(),
        }


def read_manifest(files: Mapping[str, bytes], where: str) -> ArchiveManifest:
    """The manifest of a bundle of this backend, from whichever of its two files there are.

    Args:
        files: contents by name, at most ``MAX_BYTES`` each.
        where: they come from, for errors.

    Raises:
        ModelError: there is none, it is damaged or asks for code, the two differ, or it is of
            another backend or an unknown version.
    """
    told: list[dict[str, Any]] = []
    if JSON_FILE in files:
        told.append(_from_json(files[JSON_FILE], f"{where}: {JSON_FILE}"))
    if PICKLE_FILE in files:
        told.append(unpickled(files[PICKLE_FILE], f"{where}: {PICKLE_FILE}"))
    if not told:
        raise ModelError(f"{where} has no {PICKLE_FILE}: it is no bundle of PtychoPINN's kind")
    if any(other != told[0] for other in told):
        raise ModelError(f"{where}: {PICKLE_FILE} and {JSON_FILE} differ, one was altered")
    return _checked(told[0], where)


def _checked(told: dict[str, Any], where: str) -> ArchiveManifest:
    models, version = told.get("models"), told.get("version")
    backend = told.get("backend")
    if backend != BACKEND:
        written = f"by the backend {backend!r}" if backend else "without a backend's name"
        raise ModelError(
            f"{where} was written {written}, and this is the backend {BACKEND!r}, which reads its "
            f"own only: load it with {backend or 'the program that wrote it'}, or train anew here"
        )
    if version != VERSION:
        raise ModelError(
            f"{where} has layout {version!r}, known is {VERSION!r}: it was written by another "
            "program, or a newer version of this one; of PtychoPINN's own models take the state "
            "dict (ptycho-stream models import)"
        )
    if sorted(models or ()) != sorted(MODELS):
        raise ModelError(f"{where} lists the models {models}, not {list(MODELS)}")
    return ArchiveManifest()


def _from_json(content: bytes, where: str) -> dict[str, Any]:
    try:
        return _text_only(json.loads(content.decode("utf-8")), where)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON: {error}") from error


class _Restricted(pickle.Unpickler):
    """Finds nothing: whatever a pickle names is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def unpickled(content: bytes, where: str) -> dict[str, Any]:
    """A pickled dict of text and lists of text; nothing that it names is looked up or run.

    Raises:
        ModelError: it is too large, damaged, or holds anything else.
    """
    if len(content) > MAX_BYTES:
        raise ModelError(f"{where} has {len(content)} bytes, at most {MAX_BYTES} are accepted")
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in _ADMITTED:
                what = f"{opcode.name} {argument or ''}".strip()
                raise ModelError(
                    f"{where} is refused: it asks for {what}, and nothing but text and containers "
                    "is read from a pickle, because others can run code"
                )
            # An index far beyond what the file can hold would only take memory.
            if opcode.name in _MEMO and int(cast("Any", argument)) > MAX_BYTES:
                raise ModelError(f"{where} is damaged: it remembers place {argument}")
        return _text_only(_Restricted(io.BytesIO(content)).load(), where)
    except (
        *(pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError),
        *(AttributeError, OverflowError),
    ) as error:
        raise ModelError(f"{where} is damaged, or no pickle: {error}") from error


def _text_only(held: Any, where: str) -> dict[str, Any]:
    """``held``, if it is a dict of text and lists of text; tuples become lists."""
    if not isinstance(held, dict):
        raise ModelError(f"{where} holds a {type(held).__name__}, not a dict")
    found: dict[str, Any] = {}
    for key, value in cast("dict[Any, Any]", held).items():
        members = list(cast("Any", value)) if isinstance(value, list | tuple) else [value]
        if not isinstance(key, str) or not all(isinstance(member, str) for member in members):
            raise ModelError(f"{where}: {key!r} is no text or list of texts")
        found[key] = members if isinstance(value, list | tuple) else value
    return found
