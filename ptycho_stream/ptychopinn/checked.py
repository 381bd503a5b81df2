"""Dataclasses whose values are checked whenever they are set, by the check beside the type.

A field is ``name: Annotated[type, check] = default``; the check takes whatever is given, and gives
the value to keep or raises ValueError with what to give instead. Used by the configurations of this
package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

from ptycho_stream.errors import PtychoPinnError


def whole(least: int) -> Callable[[Any], int]:
    """A whole number of at least so much."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise ValueError(f"give a whole number of at least {least}")
        return int(value)

    return check


def optional_whole(least: int) -> Callable[[Any], int | None]:
    """None, or a whole number of at least so much."""
    check = whole(least)

    def check_unless_none(value: Any) -> int | None:
        return None if value is None else check(value)

    return check_unless_none


def power_of_two(value: Any) -> int:
    """1, 2, 4, ..."""
    number = whole(1)(value)
    if number & (number - 1):
        raise ValueError("give a power of two")
    return number


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError("give a number")
    return float(value)


def share(value: Any) -> float:
    """From 0 to 1."""
    if not 0 <= (number := _real(value)) <= 1:
        raise ValueError("give a number from 0 to 1")
    return number


def not_negative(value: Any) -> float:
    """A number from 0 on."""
    if (number := _real(value)) < 0:
        raise ValueError("give a number of at least 0")
    return number


def positive(value: Any) -> float:
    """A number above 0."""
    if not (number := _real(value)) > 0:
        raise ValueError("give a number above 0")
    return number


def one_of(names: Collection[str]) -> Callable[[Any], Any]:
    """One of some names."""

    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"give one of {', '.join(names)}")
        return value

    return check


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError("give True or False")
    return value


def path(value: Any) -> Path:
    """A path, also as text."""
    if not isinstance(value, str | Path):
        raise ValueError("give a path")
    return Path(value)


def optional_path(value: Any) -> Path | None:
    """None, or the path of a file."""
    # Programs write Path() for "none": a folder cannot be meant where a file is asked for.
    return None if value is None or path(value) == Path() else path(value)


class Checked:
    """Checks every assignment by the check that the field's annotation names."""

    def __setattr__(self, name: str, value: object) -> None:
        checks = _checks(type(self))
        if name not in checks:
            raise PtychoPinnError(
                f"{type(self).__name__} has no setting {name}; it has {', '.join(checks)}"
            )
        try:
            kept = checks[name](value)
        except ValueError as error:
            raise PtychoPinnError(f"{type(self).__name__}.{name} is {value!r}: {error}") from error
        object.__setattr__(self, name, kept)


@cache
def _checks(kind: type) -> dict[str, Callable[[object], object]]:
    """By field: what gives the value to keep, or raises ValueError."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}
