"""The options of ``ptycho-stream replay`` that concern its positioner.

What a PandA's datasets or a run's fields are called, and their scale, is taken from the daemon's
own settings, so that both sides agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptycho_stream.settings import load_settings
from ptycho_stream.simulate.outlet import SocketKind
from ptycho_stream.simulate.position_series import (
    BLUESKY,
    PANDA,
    PositionDialect,
    PositionOptions,
)
from ptycho_stream.wire.bluesky_encoder import Serializer

Dialect = Annotated[
    PositionDialect | None,
    typer.Option(help="What the positioner speaks. [native, or that of --positions-from]"),
]
From = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The daemon's TOML file: names, scale and samples of its panda or bluesky positions.",
    ),
]
Socket = Annotated[
    SocketKind | None,
    typer.Option(
        help="push for a daemon with positions.socket = 'pull', pub for 'sub'. "
        "[push for native, else pub]"
    ),
]
SamplesPerFrame = Annotated[
    int | None, typer.Option(min=1, help="panda: whose mean is a frame's position. [1]")
]
SamplesPerMessage = Annotated[int | None, typer.Option(min=1, help="panda: of a message. [41]")]
JitterM = Annotated[
    float | None, typer.Option(min=0, help="panda: of a frame's samples about their mean. [0]")
]
SerializerName = Annotated[Serializer | None, typer.Option(help="bluesky. [msgpack]")]
Pages = Annotated[bool, typer.Option("--pages", help="bluesky: event_page instead of event.")]


def position_options(
    dialect: PositionDialect | None,
    daemon: Path | None,
    samples_per_frame: int | None,
    samples_per_message: int | None,
    jitter_m: float | None,
    serializer: Serializer | None,
    pages: bool,
) -> PositionOptions:
    """How the positioner is to behave.

    Raises:
        SettingsError: the daemon's file is wrong.
    """
    panda, bluesky = PANDA, BLUESKY
    if daemon is not None:
        told = load_settings(daemon).positions
        panda, bluesky = told.panda or PANDA, told.bluesky or BLUESKY
        if dialect is None and told.source in ("native", "panda", "bluesky"):
            dialect = told.source
    dialect = dialect or "native"
    of_panda = {
        "--samples-per-frame": samples_per_frame,
        "--samples-per-message": samples_per_message,
        "--jitter-m": jitter_m,
    }
    of_bluesky = {"--serializer": serializer, "--pages": pages or None}
    for kind, given in (("panda", of_panda), ("bluesky", of_bluesky)):
        names = [name for name, value in given.items() if value is not None]
        if dialect != kind and names:
            raise typer.BadParameter(
                f"{', '.join(names)}: of {kind} only, and the positioner speaks {dialect}"
            )
    if samples_per_frame is not None:
        panda = panda.model_copy(update={"samples_per_frame": samples_per_frame})
    return PositionOptions(
        dialect,
        panda,
        bluesky,
        samples_per_message or PositionOptions.samples_per_message,
        jitter_m or 0.0,
        serializer or "msgpack",
        pages,
    )


def socket_kind(kind: SocketKind | None, dialect: PositionDialect) -> SocketKind:
    """The positioner's socket: what is usual for its dialect unless it is named."""
    return kind or ("push" if dialect == "native" else "pub")
