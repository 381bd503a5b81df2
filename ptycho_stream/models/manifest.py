"""What a model says about itself: the manifest beside its weights, read and checked.

Used by the registry, by ``ptycho-stream models`` and, through the results, by anyone who asks with
which network an image was made.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, cast

from ptycho_stream.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Refuse what could not name a model's folder.

    Raises:
        ModelError: it is empty, too long or holds other characters, or is ``default``.
    """
    if name == "default":
        raise ModelError("'default' stands for the model in use: choose another name")
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name!r} is no model name: use up to 64 letters, digits, '.', '_' and '-'"
        )


@dataclass(frozen=True)
class Manifest:
    """One model of the registry.

    Attributes:
        name: the directory's name.
        architecture: which network the weights belong to, a key of ``ARCHITECTURES``.
        settings: the network's settings as JSON.
        training: identity of the data, command, time and machine that made the weights.
        seed: of the training run.
        metrics: figures measured on held-out frames.
        created: UTC time, ISO 8601.
        sha256: of weights.safetensors, hexadecimal.
        parent: name of the model that this one was fine-tuned from.
    """

    name: str
    architecture: str
    settings: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    created: str = ""
    sha256: str = ""
    parent: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    def to_json(self) -> str:
        """Text of manifest.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.json.

        Raises:
            ModelError: it is missing, not JSON, lacks a field or has one of a wrong type.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise ModelError(
                f"no manifest at {path}; the model is incomplete, remove it"
            ) from error
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}; restore it") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ModelError: it is not JSON, lacks a field or has one of a wrong type; ``where`` names
                the file.
        """
        try:
            held: object = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where} cannot be read as JSON: {error}; restore it") from error
        if not isinstance(held, dict):
            raise ModelError(f"{where} holds no JSON object; restore it")
        values = cast("dict[str, Any]", held)
        known = {f.name for f in fields(cls)}
        missing = sorted({"name", "architecture", "settings", "sha256"} - values.keys())
        unknown = sorted(values.keys() - known)
        if missing or unknown:
            raise ModelError(f"{where}: missing fields {missing}, unknown fields {unknown}")
        for name, kind in (("name", str), ("architecture", str), ("sha256", str)):
            if not isinstance(values[name], kind):
                raise ModelError(f"{where}: {name} is not text")
        for name in ("settings", "training", "metrics"):
            if not isinstance(values.get(name, {}), dict):
                raise ModelError(f"{where}: {name} is not a JSON object")
        return cls(**values)
