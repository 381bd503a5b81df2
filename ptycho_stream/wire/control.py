"""The control protocol as bytes: one msgpack request, one msgpack reply.

Sans-IO; ``docs/protocol.md`` ("Control") lists the commands.  The daemon's control server decodes
requests and checks their arguments here, clients encode them and read the replies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np

from ptycho_stream.errors import ControlError, LimitExceeded, MalformedMessage, WireError
from ptycho_stream.geometry import Orientation
from ptycho_stream.messages import BytesLike
from ptycho_stream.wire.limits import WireLimits, checked_name

VERSION = 1
MAX_REQUEST_BYTES = 1 << 20
MAX_REPLY_BYTES = 64 << 20
MAX_SCANS = 10_000
MAX_JOBS = 1000
MAX_JOB_SCANS = 100
MAX_JOB_MINUTES = 7 * 24 * 60.0
MAX_EXPECTED_FRAMES = 1 << 40
MAX_HISTORY = 100_000
MAX_CENTER_PX = 1 << 20
MAX_CANVAS_PX = 1 << 40
MAX_PIECE_SIDE = 1 << 18
MAX_WORDS = 16
ABSOLUTE_PATH = r"^/[^\x00-\x1f\x7f]{0,4095}\Z"
MODEL_NAME = r"^[^\x00-\x1f\x7f]{1,256}\Z"
SNAPSHOT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
"""Of a snapshot: it becomes the name of a file."""

# What msgspec raises on bytes from outside: text that is not UTF-8 comes as a ValueError.
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)

RequestId = int | Annotated[str, msgspec.Meta(max_length=256)]
_Id = Annotated[str, msgspec.Meta(max_length=64)]
_Word = Annotated[str, msgspec.Meta(max_length=256)]


class NoArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``status``, ``models``, ``rollback_model``, ``reload`` and ``endpoints``."""


class ScansArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``scans``: the newest ``limit`` ones."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_SCANS)] = 100


class ScanArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``scan``, ``snapshots``, ``stop`` and ``abort``: None means the newest."""

    scan_id: _Id | None = None


class StartArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``start``: arms a scan before its detector sends a header."""

    metadata: dict[str, Any] = {}
    expected_frames: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPECTED_FRAMES)] | None = None
    series: str | None = None

    def bounded(self) -> StartArguments:
        """These, fit to be stored: metadata are JSON values, the name can be printed.

        Raises:
            WireError: the metadata are too deep or too many, the name is none.
        """
        metadata = WireLimits().bounded_metadata(self.metadata)
        series = None if self.series is None else checked_name(self.series)
        return StartArguments(metadata, self.expected_frames, series)


class ExportArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``export``, into the daemon's export folder: None means the newest scan."""

    scan_id: _Id | None = None
    formats: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=MAX_WORDS)] = ("npz",)


class SnapshotArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``snapshot``: None means the newest scan."""

    name: Annotated[str, msgspec.Meta(pattern=SNAPSHOT_NAME)]
    scan_id: _Id | None = None
    force: bool = False


class HistoryArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``history``: None means the newest scan."""

    scan_id: _Id | None = None
    limit: Annotated[int, msgspec.Meta(ge=2, le=MAX_HISTORY)] = 10_000


class FrameArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``frame``: None means the newest scan, and its newest frame."""

    scan_id: str | None = None
    frame: Annotated[int, msgspec.Meta(ge=0, lt=MAX_EXPECTED_FRAMES)] | None = None
    look: Literal["view", "stored"] = "view"


_CanvasPx = Annotated[int, msgspec.Meta(ge=-MAX_CANVAS_PX, le=MAX_CANVAS_PX)]
_PieceSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECE_SIDE)]


class ImageArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``image``: None means the newest scan, its final image, and the whole of it."""

    scan_id: str | None = None
    snapshot: Annotated[str, msgspec.Meta(pattern=SNAPSHOT_NAME)] | None = None
    parts: Annotated[
        tuple[Literal["object", "misfit", "probe", "positions"], ...], msgspec.Meta(max_length=4)
    ] = ()
    corner_yx_px: tuple[_CanvasPx, _CanvasPx] | None = None
    shape_yx: tuple[_PieceSize, _PieceSize] | None = None
    bin_px: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] | None = None


_CenterPx = Annotated[float, msgspec.Meta(ge=0, le=MAX_CENTER_PX)]
_ViewFile = Annotated[str, msgspec.Meta(pattern=f"(?:{ABSOLUTE_PATH})|^none\\Z")] | None
_Background = (
    Annotated[str, msgspec.Meta(pattern=f"(?:{ABSOLUTE_PATH})|^(none|dark-frames)\\Z")] | None
)


class ReprocessArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``reprocess``: None means the newest scan, and what it is looked at or made with now."""

    scan_id: _Id | None = None
    orientation: Orientation | None = None
    center_yx_px: tuple[_CenterPx, _CenterPx] | None = None
    dc: Literal["center", "corner"] | None = None
    bad_pixels: _ViewFile = None
    flat_field: _ViewFile = None
    background: _Background = None
    bad_frames: _ViewFile = None
    probe: Annotated[str, msgspec.Meta(pattern=ABSOLUTE_PATH)] | None = None
    model: Annotated[str, msgspec.Meta(pattern=MODEL_NAME)] | None = None


class TrainingArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``finetune`` and ``train``: no scan means the newest one, None what the settings say.

    What values there may be is checked with the job that they come to.
    """

    scan_ids: Annotated[tuple[_Id, ...], msgspec.Meta(max_length=MAX_JOB_SCANS)] = ()
    name: _Word | None = None
    frames: tuple[int, int] | None = None
    loss: _Word | None = None
    minutes: Annotated[float, msgspec.Meta(gt=0, le=MAX_JOB_MINUTES)] | None = None
    steps: int | None = None
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    batch_frames: int | None = None
    held_out: float | None = None
    seed: int | None = None
    promote: _Word | None = None
    device: _Word | None = None
    devices: int | None = None
    precision: _Word | None = None
    loggers: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=MAX_WORDS)] | None = None


class FinetuneArguments(TrainingArguments, frozen=True):
    """Of ``finetune``: None means the model in use."""

    model: _Word | None = None


class TrainArguments(TrainingArguments, frozen=True):
    """Of ``train``: the network that is trained from nothing, and its settings."""

    architecture: _Word | None = None
    network: dict[str, Any] = {}

    def bounded(self) -> TrainArguments:
        """These, with a network's settings that are JSON values of bounded depth and number.

        Raises:
            WireError: they are not.
        """
        return msgspec.structs.replace(self, network=WireLimits().bounded_metadata(self.network))


class JobsArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``jobs``: the newest ``limit`` ones."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_JOBS)] = 20


class JobArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``job`` (None: the newest) and ``cancel`` (None: the one that runs)."""

    job_id: _Id | None = None


class ModelArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of ``use_model``."""

    name: _Word


COMMANDS: Mapping[str, type[msgspec.Struct]] = {
    "status": NoArguments,
    "scans": ScansArguments,
    "scan": ScanArguments,
    "models": NoArguments,
    "use_model": ModelArguments,
    "rollback_model": NoArguments,
    "finetune": FinetuneArguments,
    "train": TrainArguments,
    "jobs": JobsArguments,
    "job": JobArguments,
    "cancel": JobArguments,
    "start": StartArguments,
    "stop": ScanArguments,
    "abort": ScanArguments,
    "export": ExportArguments,
    "snapshot": SnapshotArguments,
    "snapshots": ScanArguments,
    "history": HistoryArguments,
    "frame": FrameArguments,
    "image": ImageArguments,
    "reprocess": ReprocessArguments,
    "reload": NoArguments,
    "endpoints": NoArguments,
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request; ``id`` is the client's, and comes back with the reply."""

    id: RequestId
    command: _Word
    arguments: dict[str, Any] = {}
    v: int = VERSION


class Fault(msgspec.Struct, frozen=True):
    """Why a request failed: a code for programs and a sentence for people."""

    code: str
    message: str


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer; ``id`` is None if the request was too damaged to have one."""

    v: int
    id: RequestId | None
    ok: bool
    result: Any = None
    error: Fault | None = None


class _OnlyId(msgspec.Struct, frozen=True):
    id: RequestId | None = None


def _plain(value: object) -> object:
    """What a daemon may put into a result beside JSON values."""
    if isinstance(value, np.generic):
        return cast("np.generic[Any]", value).item()
    if isinstance(value, PurePath):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} is no control value")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_request_decoder = msgspec.msgpack.Decoder(Request)
_id_decoder = msgspec.msgpack.Decoder(_OnlyId)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


def encode_request(request_id: RequestId, command: str, arguments: Mapping[str, Any]) -> bytes:
    """Bytes of a request; ``arguments`` are JSON values."""
    return _encoder.encode(Request(id=request_id, command=command, arguments=dict(arguments)))


def decode_request(data: BytesLike) -> Request:
    """Read a request and fill in the defaults of its arguments.

    Raises:
        LimitExceeded: it is too long.
        MalformedMessage: it is not a request of this version.
        ControlError: ``unknown_command`` or ``bad_arguments``.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise LimitExceeded(f"a request of {len(data)} bytes; at most {MAX_REQUEST_BYTES}")
    try:
        request = _request_decoder.decode(data)
    except UNREADABLE as error:
        raise MalformedMessage(f"not a control request: {error}") from error
    if request.v != VERSION:
        raise MalformedMessage(
            f"control protocol version {request.v}; this daemon speaks {VERSION}"
        )
    kind = COMMANDS.get(request.command)
    if kind is None:
        known = ", ".join(COMMANDS)
        raise ControlError("unknown_command", f"no command {request.command!r}; there are: {known}")
    try:
        arguments = msgspec.convert(request.arguments, kind)
        if isinstance(arguments, StartArguments | TrainArguments):
            arguments = arguments.bounded()
    except (msgspec.ValidationError, WireError) as error:
        raise ControlError("bad_arguments", f"{request.command}: {error}") from error
    return msgspec.structs.replace(request, arguments=msgspec.to_builtins(arguments))


def salvage_id(data: BytesLike) -> RequestId | None:
    """The ``id`` of a request that is otherwise unreadable, so that its sender learns of it."""
    try:
        return _id_decoder.decode(data).id
    except UNREADABLE:
        return None


def encode_result(request_id: RequestId, result: Any) -> bytes:
    """Bytes of a reply that succeeded; ``result`` is made of JSON values."""
    return _encoder.encode(Reply(v=VERSION, id=request_id, ok=True, result=result))


def encode_error(request_id: RequestId | None, code: str, message: str) -> bytes:
    """Bytes of a reply that failed."""
    return _encoder.encode(
        Reply(v=VERSION, id=request_id, ok=False, error=Fault(code, message)),
    )


def decode_reply(data: BytesLike) -> Reply:
    """Read a reply.

    Raises:
        MalformedMessage: it is not a reply of this version.
    """
    try:
        reply = _reply_decoder.decode(data)
    except UNREADABLE as error:
        raise MalformedMessage(f"not a control reply: {error}") from error
    if reply.v != VERSION:
        raise MalformedMessage(
            f"control protocol version {reply.v}; this program speaks {VERSION}: use the same "
            "ptycho-stream on both ends"
        )
    return reply


def result_of(reply: Reply) -> Any:
    """The result in a reply.

    Raises:
        ControlError: the daemon refused or failed the request.
    """
    if reply.ok:
        return reply.result
    fault = reply.error or Fault("failed", "the daemon gave no reason")
    raise ControlError(fault.code, fault.message)
