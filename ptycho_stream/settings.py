"""The TOML configuration file as pydantic models: every key, its default, unit and meaning.

Read by the daemon, by ``ptycho-stream config check`` and by all commands that take ``--config``.
Unknown keys are errors.  Relative paths count from the configuration file's folder.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ptycho_stream.errors import SettingsError
from ptycho_stream.geometry import Orientation
from ptycho_stream.keys import is_public_key

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")
PVA_SCHEME = "pva://"


def _endpoint(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme == "ipc" and len(value) > len("ipc://"):
        return value
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or not port:
        raise ValueError("is not a ZeroMQ endpoint: write tcp://HOST:PORT or ipc:///PATH")
    return value


def _frame_endpoint(value: str) -> str:
    if not value.startswith(PVA_SCHEME):
        return _endpoint(value)
    if not value.removeprefix(PVA_SCHEME).isprintable() or value == PVA_SCHEME:
        raise ValueError("names no channel: write pva://CHANNEL, such as pva://13SIM1:Pva1:Image")
    return value


def is_local(endpoint: str) -> bool:
    """Whether only programs on this machine reach an endpoint that is bound."""
    parts = urlsplit(endpoint)
    return parts.scheme == "ipc" or parts.hostname in LOOPBACK_HOSTS


def reachable(endpoint: str) -> str:
    """The endpoint under which a program on this machine reaches one that is bound."""
    parts = urlsplit(endpoint)
    if parts.scheme == "tcp" and parts.hostname in ("*", "0.0.0.0"):
        return f"tcp://127.0.0.1:{parts.port}"
    return endpoint


def _check_attached(attach: str, endpoint: str) -> None:
    if attach == "connect" and urlsplit(endpoint).hostname == "*":
        raise ValueError("tcp://*:PORT can only be bound: name the sender's host to connect to")


def _public_key(value: str) -> str:
    if not is_public_key(value):
        raise ValueError("is no public key: 40 characters, as `ptycho-stream keys show` prints it")
    return value


def device_name(value: str) -> str:
    """The name of a device, as it is.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError("is no device: write auto, cpu, cuda or cuda:N")
    return value


def _storable(value: str | int | float | bool) -> str | int | float | bool:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("is an integer of more than 64 bits: write it as text")
    return value


Endpoint = Annotated[str, AfterValidator(_endpoint)]
FrameEndpoint = Annotated[str, AfterValidator(_frame_endpoint)]
PublicKey = Annotated[str, AfterValidator(_public_key)]
MetadataValue = Annotated[str | int | float | bool, AfterValidator(_storable)]
SizePx = Annotated[int, Field(gt=0)]
LengthM = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of the file: frozen, and strict about its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class DataSettings(Section):
    """Where scans are stored, and how much of the disk they may take."""

    directory: Path = Path("data")
    retention_bytes: int = Field(
        default=200_000_000_000, ge=0, description="oldest sealed scans go first"
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        description="sealed scans that ended longer ago go too; unset: never for their age",
    )
    min_free_bytes: int = Field(
        default=2_000_000_000, ge=0, description="below this no new scan is accepted"
    )
    verify_reads: bool = Field(
        default=False,
        description="compare each frame with its checksum whenever it is read, not only when it "
        "goes into an image",
    )
    sync_interval_ms: int = Field(
        default=100, ge=1, description="how often frames are synced to disk"
    )
    frames_per_file: int = Field(default=1024, ge=1, le=65_536)
    resume_s: float = Field(
        default=30.0, gt=0, description="a scan found open after a crash waits so for its stream"
    )


FirstNumber = Annotated[int, Field(ge=0)] | Literal["any"]


class DectrisV2Settings(Section):
    """A DECTRIS detector that streams in version 2."""

    channel: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="that is recorded of several, such as threshold_2; unset: the first",
    )


class PsiSettings(Section):
    """A sender of PSI's ``array-1.0`` messages, which has neither start nor end of a series."""

    first_number: FirstNumber = Field(
        default=0, description="of a series' first frame; 'any': the first that comes is frame 0"
    )


class OdinSettings(Section):
    """A live view plugin of odin-data."""

    first_number: FirstNumber = Field(
        default=0, description="of a series' first frame; 'any': the first that comes is frame 0"
    )
    shape_order: Literal["xy", "yx"] = Field(
        default="xy", description="of the header's `shape`: as specified, or rows first"
    )
    dataset: str | None = Field(
        default=None, description="only frames of this dataset are taken; unset: all"
    )


class SlsdetSettings(Section):
    """The receivers of slsDetectorPackage, one a module, and how modules make a frame."""

    modules_yx: tuple[SizePx, SizePx] | None = Field(
        default=None, description="rows and columns of modules; unset: the header's `detshape`"
    )
    gap_yx_px: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        default=(0, 0),
        description="pixels between modules, stored as the largest value, which is a bad pixel",
    )
    incomplete: Literal["skip", "use", "drop"] = Field(
        default="skip",
        description="a frame that lacks a module: stored and left out of the image, stored and "
        "used as it is, or not stored; counted in any case",
    )
    wait_ms: float = Field(
        default=1000.0, gt=0, description="for the modules of a frame, from its first one on"
    )
    wait_bytes: int = Field(
        default=256_000_000, ge=1_000_000, description="that frames may take while they wait"
    )


class PvaSettings(Section):
    """An areaDetector channel over PV Access (extra `[pva]`)."""

    servers: tuple[str, ...] = Field(
        default=(),
        description="that are asked for the channel over TCP, HOST or HOST:PORT; unset: what the "
        "environment's EPICS_PVA_* say, else all on the local networks",
    )
    first_number: FirstNumber = Field(
        default=1, description="of a series' first frame; 'any': the first that comes is frame 0"
    )
    acquire_channel: str | None = Field(
        default=None,
        description="a channel that is not 0 while the detector acquires: begins and ends a series",
    )
    quiet_s: float = Field(
        default=1.0, gt=0, description="without a frame, after which an acquisition is over"
    )
    series_attribute: str | None = Field(
        default=None, description="of an array: a series is over when its value changes"
    )
    position_attributes_yx: tuple[str, str] | None = Field(
        default=None, description="of an array: where its frame was taken"
    )
    position_scale_yx_m: tuple[float, float] = Field(
        default=(1.0, 1.0), description="metres a unit of those attributes; negative: mirrored"
    )
    i0_attribute: str | None = Field(
        default=None, description="of an array: the reading of a beam monitor"
    )

    @model_validator(mode="after")
    def _scale_is_a_scale(self) -> PvaSettings:
        if 0 in self.position_scale_yx_m:
            raise ValueError("position_scale_yx_m has a 0, which puts all frames into one place")
        return self


class DetectorSettings(Section):
    """The frame stream."""

    dialect: Literal[
        "dectris-v1", "dectris-v2", "stins", "psi", "slsdet", "odin", "native", "pva"
    ] = "dectris-v1"
    endpoint: FrameEndpoint = "tcp://127.0.0.1:9999"
    more_endpoints: tuple[FrameEndpoint, ...] = Field(
        default=(), description="of the same detector, where several senders share its frames"
    )
    attach: Literal["connect", "bind"] = "connect"
    socket: Literal["pull", "sub"] = "pull"
    crop_yx_px: tuple[SizePx, SizePx] | None = Field(
        default=None,
        description="height and width stored, about the beam centre; the whole frame if unset",
    )
    crop_margin_px: int = Field(
        default=0,
        ge=0,
        description="stored beyond crop_yx_px on each side, so that the centre can be corrected",
    )
    bin_px: int = Field(
        default=1,
        ge=1,
        le=16,
        description="so many detector pixels a side are summed into one that is stored",
    )
    max_shape_yx_px: tuple[SizePx, SizePx] = Field(
        default=(8192, 8192), description="larger frames are refused"
    )
    queue_bytes: int = Field(
        default=1_000_000_000,
        ge=1_000_000,
        description="of the largest frames, kept for a busy ingest by a SUB socket",
    )
    silence_s: float = Field(
        default=60.0,
        gt=0,
        description="a scan without a frame for so long is taken for cut short, or for complete "
        "where the dialect has no end of a series (psi, odin, pva)",
    )
    dectris_v2: DectrisV2Settings = DectrisV2Settings()
    psi: PsiSettings = PsiSettings()
    odin: OdinSettings = OdinSettings()
    slsdet: SlsdetSettings = SlsdetSettings()
    pva: PvaSettings = PvaSettings()

    @property
    def stored_as(self) -> str:
        """The name of a detector whose frames are stored and not reconstructed; else empty."""
        return ""

    @property
    def table(self) -> str:
        """Where in the file it is, for people."""
        return f"more_detectors.{self.stored_as}" if self.stored_as else "detector"

    @property
    def ends_by_silence(self) -> bool:
        """Whether the stream itself never says that a series is over."""
        if self.dialect == "pva":
            return self.pva.acquire_channel is None
        return self.dialect in ("psi", "odin")

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All of the detector's."""
        return (self.endpoint, *self.more_endpoints)

    @model_validator(mode="after")
    def _crop_is_made_of_bins(self) -> DetectorSettings:
        if self.crop_yx_px is None:
            if self.crop_margin_px:
                raise ValueError("crop_margin_px has no effect without crop_yx_px: set that too")
            return self
        stored = tuple(size + 2 * self.crop_margin_px for size in self.crop_yx_px)
        if any(size % self.bin_px for size in stored):
            raise ValueError(
                f"crop_yx_px with its margins is {stored[0]} x {stored[1]} pixels, no whole number "
                f"of bins of {self.bin_px}: make both a multiple of bin_px = {self.bin_px}"
            )
        return self

    @model_validator(mode="after")
    def _endpoints_can_be_attached(self) -> DetectorSettings:
        for endpoint in self.endpoints:
            _check_attached(self.attach, endpoint)
        if len(set(self.endpoints)) < len(self.endpoints):
            raise ValueError("more_endpoints names an endpoint twice")
        return self

    @model_validator(mode="after")
    def _options_are_of_the_dialect(self) -> DetectorSettings:
        for name in ("dectris_v2", "psi", "odin", "slsdet", "pva"):
            table = getattr(self, name)
            # The stages get all settings written out: a table of defaults says nothing.
            if name != self.dialect.replace("-", "_") and table != type(table)():
                raise ValueError(f"has a table [detector.{name}] and dialect = {self.dialect!r}")
        channels = [endpoint for endpoint in self.endpoints if endpoint.startswith(PVA_SCHEME)]
        if self.dialect != "pva" and channels:
            raise ValueError(f"{channels[0]} is a PV Access channel: set dialect = 'pva' for it")
        if self.dialect == "pva":
            if len(self.endpoints) > 1 or not channels:
                raise ValueError("dialect = 'pva' takes one channel: endpoint = 'pva://CHANNEL'")
            if (self.attach, self.socket) != ("connect", "pull"):
                raise ValueError("attach and socket are of ZeroMQ: leave them out for 'pva'")
        return self


class StoredDetector(DetectorSettings):
    """Another detector of the same experiment: its frames are stored, and not reconstructed.

    Each of its scans belongs to one of the reconstructed detector, if that is found.
    """

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$",
        description="small letters, digits, - and _: in scans' headers, metrics and the status",
    )
    match: Literal["time", "series"] = Field(
        default="time",
        description="a scan belongs to that of the other detector that was armed nearest in time, "
        "or to the nearest of those with the same series",
    )
    match_window_s: float = Field(
        default=60.0, gt=0, description="how far apart the two may be armed"
    )

    @property
    def stored_as(self) -> str:
        """Its name."""
        return self.name


def _scale(value: tuple[float, float]) -> tuple[float, float]:
    if 0 in value:
        raise ValueError("has a 0, which puts all frames into one place")
    return value


ScaleYx = Annotated[tuple[float, float], AfterValidator(_scale)]
FieldName = Annotated[str, Field(min_length=1)]


class PandaSettings(Section):
    """A PandA that publishes what it captures as JSON, in datasets by name."""

    y: FieldName = Field(description="dataset of the stage's y, such as /INENC2.VAL.Value")
    x: FieldName = Field(description="dataset of the stage's x")
    scale_yx_m: ScaleYx = Field(description="metres a count; negative: mirrored")
    offset_yx_m: tuple[float, float] = Field(
        default=(0.0, 0.0), description="added after scaling: where the stage is at 0 counts"
    )
    samples_per_frame: int = Field(
        default=1, ge=1, le=100_000, description="of a detector frame, whose mean is its position"
    )
    first_sample: int = Field(
        default=0, ge=0, description="of frame 0; samples before it belong to no frame"
    )
    min_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of a frame's samples that must have come for it to get a position; the rest "
        "is taken for lost when the scan is over, or thousands of samples later",
    )
    i0: FieldName | None = Field(default=None, description="dataset of a beam monitor")
    i0_from: Literal["mean", "sum"] = Field(
        default="mean", description="a frame's reading: of its samples"
    )
    gate: FieldName | None = Field(
        default=None, description="dataset that tells whether the beam was on, such as a shutter's"
    )
    gate_open: Literal["above", "below"] = Field(
        default="above", description="gate_threshold is the beam on; a frame needs it throughout"
    )
    gate_threshold: float = 0.5

    @model_validator(mode="after")
    def _datasets_differ(self) -> PandaSettings:
        names = [name for name in (self.y, self.x, self.i0, self.gate) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError("names one dataset twice: y, x, i0 and gate are different ones")
        if self.i0 is None and self.i0_from != "mean":
            raise ValueError("i0_from is how the dataset `i0` is read: name i0 too")
        if self.gate is None and (self.gate_open, self.gate_threshold) != ("above", 0.5):
            raise ValueError(
                "gate_open and gate_threshold are of the dataset `gate`: name gate too"
            )
        return self


class BlueskySettings(Section):
    """Bluesky documents over 0MQ, serialised as msgpack or JSON."""

    y: FieldName = Field(description="field of the events with the stage's y, such as samy")
    x: FieldName = Field(description="field with the stage's x")
    scale_yx_m: ScaleYx | None = Field(
        default=None,
        description="metres a unit of these fields, negative: mirrored; unset: by the units that "
        "the run's descriptor gives (m, mm, um, nm ...)",
    )
    offset_yx_m: tuple[float, float] = Field(default=(0.0, 0.0), description="added after scaling")
    stream: FieldName = Field(default="primary", description="of the events with positions")
    frames_per_event: int = Field(
        default=1, ge=1, le=1_000_000, description="that the detector takes at each step"
    )
    frame: FieldName | None = Field(
        default=None,
        description="field with the detector's own number of the event's (first) frame; unset: "
        "events are counted, and one that is repeated shifts all that follow",
    )
    first_frame: int = Field(default=0, description="what that field holds at frame 0")
    i0: FieldName | None = Field(default=None, description="field of a beam monitor")
    series_key: FieldName | None = Field(
        default=None,
        description="key of the run's start document that holds the detector's series; unset: run "
        "and series are matched by time",
    )
    only: dict[str, tuple[MetadataValue, ...]] = Field(
        default_factory=dict,
        description="runs are taken whose start document has one of these values under each key, "
        "such as plan_name = ['grid_scan']; empty: all that have y and x",
    )
    prefix: str | None = Field(
        default=None,
        pattern=r"^\S*$",
        description="documents are taken that are published with it; unset: all",
    )

    @model_validator(mode="after")
    def _fields_differ(self) -> BlueskySettings:
        names = [name for name in (self.y, self.x, self.i0, self.frame) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError("names one field twice: y, x, i0 and frame are different ones")
        if self.frame is None and self.first_frame:
            raise ValueError("first_frame is what the field `frame` begins with: name that too")
        return self


class GeneratedSettings(Section):
    """A path that is known beforehand, of a stage that is trusted to follow it."""

    kind: Literal["raster", "snake", "spiral"] = Field(
        description="rows in one direction; there and back; Fermat's spiral from the centre out"
    )
    step_yx_m: ScaleYx = Field(
        description="between neighbours; negative: the other way; of a spiral: the sides of the "
        "area of a point"
    )
    shape_yx: tuple[SizePx, SizePx] | None = Field(
        default=None, description="rows and columns of a raster or snake"
    )
    radius_m: LengthM | None = Field(
        default=None, description="frames of a spiral further out have no position; unset: all have"
    )
    origin_yx_m: tuple[float, float] = Field(
        default=(0.0, 0.0), description="of the first point; of a spiral: its centre"
    )
    fast_axis: Literal["x", "y"] = Field(
        default="x", description="along which a raster or snake moves first"
    )
    angle_deg: float = Field(
        default=0.0, description="by which the path is turned about origin, from x towards y"
    )
    frames_per_point: int = Field(
        default=1, ge=1, le=1_000_000, description="that the detector takes at each point"
    )

    @model_validator(mode="after")
    def _extent_is_of_the_kind(self) -> GeneratedSettings:
        if self.kind == "spiral" and self.shape_yx is not None:
            raise ValueError("shape_yx is of a raster or snake: a spiral has radius_m")
        if self.kind == "spiral" and self.fast_axis != "x":
            raise ValueError("fast_axis is of a raster or snake: leave it out for a spiral")
        if self.kind != "spiral" and self.radius_m is not None:
            raise ValueError(f"radius_m is of a spiral: a {self.kind} has shape_yx")
        if self.kind != "spiral" and self.shape_yx is None:
            raise ValueError(f"a {self.kind} needs shape_yx, its rows and columns")
        return self


class PositionSettings(Section):
    """Where scan positions come from and how long frames wait for them."""

    source: Literal["native", "panda", "bluesky", "inline", "file", "generated"] = "native"
    endpoint: Endpoint | None = Field(
        default=None, description="of the position stream (native, panda, bluesky)"
    )
    attach: Literal["connect", "bind"] = "connect"
    socket: Literal["pull", "sub"] = Field(
        default="pull", description="'sub' unless set otherwise for panda and bluesky"
    )
    path: Path | None = Field(default=None, description="NPZ or CSV, for source = 'file'")
    panda: PandaSettings | None = None
    bluesky: BlueskySettings | None = None
    generated: GeneratedSettings | None = None
    wait_s: float = Field(
        default=10.0, gt=0, description="after a series' end, for positions to come"
    )
    match_window_s: float = Field(
        default=60.0,
        gt=0,
        description="how far apart a scan and an epoch that waits for one may be armed",
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The one there is, or none."""
        return () if self.endpoint is None else (self.endpoint,)

    @property
    def is_stream(self) -> bool:
        """Whether positions come on their own, from a socket."""
        return self.source in ("native", "panda", "bluesky")

    @property
    def is_measured(self) -> bool:
        """Whether positions are read while frames are taken, so that neither is long before."""
        return self.source in ("panda", "bluesky")

    @model_validator(mode="before")
    @classmethod
    def _publishers_are_subscribed_to(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("source") in ("panda", "bluesky"):
            return {"socket": "sub", **raw}
        return raw

    @model_validator(mode="after")
    def _source_is_complete(self) -> PositionSettings:
        if self.is_stream and self.endpoint is None:
            raise ValueError(f"source = {self.source!r} needs an endpoint (tcp://HOST:PORT)")
        for name in ("panda", "bluesky", "generated"):
            given = getattr(self, name) is not None
            if given and name != self.source:
                raise ValueError(f"has a table [positions.{name}] and source = {self.source!r}")
            if name == self.source and not given:
                raise ValueError(f"source = {name!r} needs a table [positions.{name}]")
        if self.source == "file" and self.path is None:
            raise ValueError("source = 'file' needs a path (NPZ or CSV)")
        if self.endpoint is not None:
            _check_attached(self.attach, self.endpoint)
        return self


class GeometrySettings(Section):
    """The experiment, where the stream's header does not tell it or tells it wrongly."""

    photon_energy_eV: float | None = Field(default=None, gt=0)
    detector_distance_m: float | None = Field(default=None, gt=0)
    detector_pixel_yx_m: tuple[LengthM, LengthM] | None = None
    override_stream: bool = Field(default=False, description="prefer these to the stream's header")


class ViewSettings(Section):
    """How stored frames are looked at; a change makes a new generation of the image."""

    orientation: Orientation = "identity"
    center_yx_px: tuple[float, float] | None = Field(
        default=None,
        description="zero frequency in stored pixels; unset: the header's, else the middle",
    )
    dc: Literal["center", "corner"] = "center"
    bad_value_from: int | None = Field(
        default=None,
        description="counts from this value on mean a bad pixel; unset: the dtype's top two",
    )
    bad_pixels_path: Path | None = Field(
        default=None,
        description="NPY, NPZ or TIFF of the detector's shape or the stored one; not 0 is bad",
    )
    hot_pixels: Literal["suggest", "auto"] = Field(
        default="suggest",
        description="pixels that are found to count far too much or nothing: said, or masked by "
        "itself (trust.diagnosis = 'off' looks for none)",
    )
    flat_field_path: Path | None = Field(
        default=None,
        description="response of each pixel, by which counts are divided; NPY, NPZ or TIFF; any "
        "scale; not above 0 is bad",
    )
    background: Literal["none", "dark-frames"] = Field(
        default="none",
        description="counts that are there without a sample: none, or the mean of the dark frames "
        "of the scan or of the last dark series before it",
    )
    background_path: Path | None = Field(
        default=None, description="the same from a file, counts a frame; NPY, NPZ or TIFF"
    )
    bad_frames_path: Path | None = Field(
        default=None,
        description="text with numbers of frames to leave out, and ranges such as 20-25",
    )
    use_i0: bool = Field(
        default=True,
        description="scale each frame by its reading of the beam monitor, where there is one",
    )

    @model_validator(mode="after")
    def _one_background(self) -> ViewSettings:
        if self.background != "none" and self.background_path is not None:
            raise ValueError(
                "background and background_path are both set: keep one of them, dark frames or file"
            )
        return self


class ZonePlateSettings(Section):
    """A Fresnel zone plate in a plane wave, its first order."""

    kind: Literal["zone-plate"] = "zone-plate"
    diameter_m: LengthM
    outer_zone_width_m: LengthM
    central_stop_m: float = Field(default=0.0, ge=0, description="its diameter; 0: none")
    defocus_m: float = Field(
        default=0.0, description="from the focus to the sample; negative: the sample is before it"
    )

    @model_validator(mode="after")
    def _stop_is_smaller(self) -> ZonePlateSettings:
        if self.central_stop_m >= self.diameter_m:
            raise ValueError("central_stop_m must be smaller than diameter_m")
        return self


class PinholeSettings(Section):
    """A round hole in a plane wave."""

    kind: Literal["pinhole"] = "pinhole"
    diameter_m: LengthM
    distance_m: float = Field(ge=0, description="from the pinhole to the sample")


class GaussianSettings(Section):
    """A Gaussian beam."""

    kind: Literal["gaussian"] = "gaussian"
    fwhm_m: LengthM = Field(description="full width at half maximum of the intensity, at the waist")
    defocus_m: float = Field(
        default=0.0, description="from the waist to the sample; negative: the sample is before it"
    )


OpticsSettings = ZonePlateSettings | PinholeSettings | GaussianSettings


class ProbeSettings(Section):
    """The illumination: from a file, or made from optics."""

    path: Path | None = Field(
        default=None, description="NPZ with `probe` (modes, N, N), or a ptychodus product"
    )
    optics: Annotated[OpticsSettings, Field(discriminator="kind")] | None = Field(
        default=None, description="what the probe is made from, for the energy of each scan"
    )
    modes: int | None = Field(default=None, ge=1, description="use the first ones only; unset: all")
    photons: float | None = Field(
        default=None,
        gt=0,
        description="of the unattenuated beam, a frame; unset: from the first frames",
    )
    carry: bool = Field(
        default=True,
        description="a scan begins with the probe that refinement made of the one before, if that "
        "was taken with the same beam and went well",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ProbeSettings:
        if self.path is None and self.optics is None:
            raise ValueError("has neither `path` (a file) nor a table [probe.optics]: set one")
        if self.path is not None and self.optics is not None:
            raise ValueError("has both `path` and [probe.optics]: keep one of them")
        return self


class ModelSettings(Section):
    """The network."""

    name: str = "default"
    registry: Path | None = Field(
        default=None, description="folder of models; unset: shipped ones only"
    )


class ReconstructSettings(Section):
    """The reconstruct stage."""

    size_px: int = Field(default=128, multiple_of=32, ge=32, le=1024)
    device: Annotated[str, AfterValidator(device_name)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    fallback_to_cpu: bool = Field(
        default=True, description="make images on the CPU when the GPU has failed three times"
    )
    threads: int = Field(default=1, ge=1, description="of the network on a CPU")
    helpers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="processes that predict beside the first: one for each further GPU",
    )
    batch_frames: int = Field(default=16, ge=1, le=1024)
    batch_deadline_ms: float = Field(
        default=50.0, ge=0, description="a partial batch waits no longer"
    )
    neighbours: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="where a network takes frames in groups: a frame's group is sought among so "
        "many nearest ones, or twice the group's size if that is more",
    )
    tile_px: int = Field(default=128, ge=32, le=4096, description="clients refuse larger ones")
    save_interval_s: float = Field(default=5.0, gt=0, description="of the image's state on disk")
    max_extent_m: float = Field(default=0.01, gt=0, description="positions further out are flagged")
    max_step_m: float = Field(
        default=0.001, gt=0, description="positions that jump further are flagged"
    )


class RefinementSettings(Section):
    """Refinement of what the network made, between arrivals and after a scan's last frame."""

    enabled: bool = True
    seconds: float = Field(
        default=10.0, ge=0, description="after all frames of a scan are in its image, at most"
    )
    share: float = Field(
        default=0.75,
        ge=0,
        le=0.9,
        description="of the time, where the network needs more and frames were visited little",
    )
    sweeps: float = Field(
        default=60.0, gt=0, description="visits of a frame on average, after which it is done"
    )
    method: Literal["lsqml", "rpie"] = "lsqml"
    noise: Literal["gaussian", "poisson"] = "gaussian"
    modes: int = Field(default=3, ge=1, le=32, description="of the probe; missing ones are added")
    probe: bool = Field(default=True, description="the probe is refined too")
    positions: bool = Field(default=False, description="positions are corrected too")
    max_object_px: int = Field(
        default=1 << 25, ge=1, description="images of more pixels are not refined: 48 bytes each"
    )
    cache_bytes: int = Field(default=1 << 29, ge=0, description="of frames kept in memory")


class TrustSettings(Section):
    """How far an image can be trusted: what is looked at, and how much time it may take."""

    enabled: bool = True
    interval_s: float = Field(default=1.0, gt=0, description="between figures that are published")
    share: float = Field(
        default=0.15, gt=0, lt=1, description="of the time, as long as there is other work"
    )
    seconds: float = Field(
        default=5.0, ge=0, description="after the last sweep of a scan's refinement, at most"
    )
    diagnosis: Literal["off", "suggest", "auto"] = Field(
        default="suggest",
        description="which way round the detector is, and where the pattern's centre: not looked "
        "at, said, or corrected by itself",
    )


class TrainingSettings(Section):
    """Training on demand: what a job uses where its request says nothing."""

    device: Annotated[str, AfterValidator(device_name)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    devices: int = Field(default=1, ge=1, le=64, description="processes of a job, one a device")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field(
        default="32-true", description="of the network's arithmetic; weights stay float32"
    )
    threads: int = Field(default=1, ge=1, description="of each process on a CPU")
    minutes: float = Field(default=2.0, gt=0, description="a job's budget if it names none")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak rate; unset: what suits the kind of job"
    )
    batch_frames: int = Field(default=16, ge=2, le=1024, description="frames of a step")
    held_out: float = Field(
        default=0.1, gt=0, le=0.5, description="share of frames never trained on, for validation"
    )
    loggers: tuple[Literal["csv", "tensorboard", "mlflow"], ...] = ("csv",)
    mlflow_uri: str | None = Field(
        default=None, description="tracking store; unset: the folder mlruns of the job"
    )
    nice: int = Field(default=10, ge=0, le=19, description="a job yields so much to other stages")
    automatic_above: float | None = Field(
        default=None, gt=0, description="excess misfit that starts a fine-tuning; unset: never"
    )
    automatic_minutes: float = Field(default=2.0, gt=0, description="budget of such a job")


class ResultSettings(Section):
    """What subscribers get."""

    endpoint: Endpoint = "tcp://127.0.0.1:9600"
    resync_endpoint: Endpoint = "tcp://127.0.0.1:9601"
    publish_interval_ms: float = Field(
        default=100.0, gt=0, description="kept to the nearest moment between two batches"
    )
    queue_bytes: int = Field(default=64_000_000, gt=0, description="kept for a slow subscriber")


class ControlSettings(Section):
    """Where the daemon takes requests."""

    endpoint: Endpoint = "tcp://127.0.0.1:9602"


class HttpSettings(Section):
    """`/metrics` and `/healthz`."""

    host: str = Field(
        default="127.0.0.1", pattern=r"^[0-9A-Za-z.:-]+$", description="name or address to bind"
    )
    port: int = Field(default=9603, ge=0, le=65535, description="0: any free port, said in the log")
    token_path: Path | None = Field(
        default=None, description="file with the word that requests must show (bearer token)"
    )
    host_names: tuple[str, ...] = Field(
        default=(), description="under which browsers may ask, beside addresses and this machine's"
    )

    @model_validator(mode="after")
    def _others_need_a_token(self) -> HttpSettings:
        if self.host not in LOOPBACK_HOSTS and self.token_path is None:
            raise ValueError(
                f"host = {self.host!r} would be open to the network without a token: set "
                "http.token_path (`ptycho-stream keys token FILE` makes one), or host = '127.0.0.1'"
            )
        return self


class SecuritySettings(Section):
    """Who may connect, and which files requests may name (docs/security.md)."""

    key_path: Path | None = Field(
        default=None,
        description="the daemon's private key; set: every socket that it binds asks for keys",
    )
    allowed_keys_path: Path | None = Field(
        default=None, description="who may connect, and to do what (`ptycho-stream keys allow`)"
    )
    server_keys: dict[Endpoint, PublicKey] = Field(
        default_factory=dict,
        description="public keys of senders, by the endpoint that the daemon connects to",
    )
    readable_folders: tuple[Path, ...] = Field(
        default=(),
        description="whose files requests may name, beside data.directory and the folder of this "
        "file",
    )

    @model_validator(mode="after")
    def _keys_come_together(self) -> SecuritySettings:
        if (self.key_path is None) != (self.allowed_keys_path is None):
            given, other = "key_path", "allowed_keys_path"
            if self.key_path is None:
                given, other = other, given
            raise ValueError(f"has {given} and no {other}: sockets with keys need both")
        if self.server_keys and self.key_path is None:
            raise ValueError("has server_keys and no key_path, the key to show to these senders")
        return self


class ViewerSettings(Section):
    """The page for browsers."""

    enabled: bool = True
    host: Literal["127.0.0.1", "localhost", "::1"] = "127.0.0.1"
    port: int = Field(default=9604, ge=0, le=65535, description="0: any free port, said in the log")
    token_path: Path | None = Field(
        default=None, description="file with the word that pages must show; needed with keys"
    )
    updates_per_s: float = Field(
        default=5.0, gt=0, le=30, description="of the image, that a page gets at most"
    )
    bytes_per_s: int = Field(
        default=120_000,
        ge=20_000,
        description="that a page gets, with five seconds' worth at once for a new picture; what "
        "does not fit comes later",
    )
    max_pages: int = Field(default=32, ge=1, le=1000, description="at the same time")


ExportFormat = Literal["npz", "png", "tiff", "ptychodus", "cxi", "ptychopinn"]


class ExportSettings(Section):
    """Files of images, written when a scan ends and while it runs (docs/files.md)."""

    directory: Path = Path("exports")
    formats: tuple[ExportFormat, ...] = Field(default=(), description="written when a scan ends")
    partial_interval_s: float | None = Field(
        default=None,
        ge=1,
        description="between ptychodus products of a scan that runs; unset: there are none",
    )
    partial_keep: int = Field(default=20, ge=1, description="so many of these stay, the newest")


class SupervisorSettings(Section):
    """How stages are watched and restarted."""

    heartbeat_timeout_s: float = Field(
        default=15.0, gt=1, description="a silent stage is restarted"
    )
    stop_timeout_s: float = Field(
        default=4.0, gt=0, le=4.5, description="to drain and seal, before a stage is killed"
    )
    max_backoff_s: float = Field(
        default=30.0, gt=0, description="between restarts of a failing stage"
    )


class Settings(Section):
    """All of a configuration file."""

    # Defaults too: their relative paths count from the file's folder like all others.
    model_config = ConfigDict(validate_default=True)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metadata: dict[str, MetadataValue] = Field(
        default_factory=dict, description="sample, proposal, operator ...: goes into every result"
    )
    data: DataSettings = DataSettings()
    detector: DetectorSettings = DetectorSettings()
    more_detectors: tuple[StoredDetector, ...] = Field(
        default=(), description="whose frames are stored beside those that are reconstructed"
    )
    positions: PositionSettings = PositionSettings(source="inline")
    geometry: GeometrySettings = GeometrySettings()
    view: ViewSettings = ViewSettings()
    probe: ProbeSettings
    model: ModelSettings = ModelSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    refine: RefinementSettings = RefinementSettings()
    trust: TrustSettings = TrustSettings()
    training: TrainingSettings = TrainingSettings()
    results: ResultSettings = ResultSettings()
    control: ControlSettings = ControlSettings()
    http: HttpSettings = HttpSettings()
    viewer: ViewerSettings = ViewerSettings()
    security: SecuritySettings = SecuritySettings()
    export: ExportSettings = ExportSettings()
    supervisor: SupervisorSettings = SupervisorSettings()

    @property
    def bound_endpoints(self) -> tuple[tuple[str, str], ...]:
        """The ZeroMQ endpoints that the daemon binds, each with its key."""
        bound = [
            ("results.endpoint", self.results.endpoint),
            ("results.resync_endpoint", self.results.resync_endpoint),
            ("control.endpoint", self.control.endpoint),
        ]
        streams = {**self.detectors, "positions": self.positions}
        for table, stream in streams.items():
            if stream.attach == "bind":
                for n, endpoint in enumerate(stream.endpoints):
                    key = f"{table}.more_endpoints.{n - 1}" if n else f"{table}.endpoint"
                    bound.append((key, endpoint))
        return tuple(bound)

    @model_validator(mode="after")
    def _bound_endpoints_differ(self) -> Settings:
        bound = self.bound_endpoints
        if self.http.port:
            bound = (*bound, ("http.port", f"tcp://{self.http.host}:{self.http.port}"))
        if self.viewer.enabled and self.viewer.port:
            bound = (*bound, ("viewer.port", f"tcp://{self.viewer.host}:{self.viewer.port}"))
        keys: dict[str, str] = {}
        for key, endpoint in bound:
            place = endpoint.replace("//localhost:", "//127.0.0.1:")
            if place in keys:
                raise ValueError(f"{keys[place]} and {key} are the same endpoint ({endpoint})")
            keys[place] = key
        return self

    @model_validator(mode="after")
    def _open_endpoints_ask_for_keys(self) -> Settings:
        for key, endpoint in self.bound_endpoints:
            if self.security.key_path is None and not is_local(endpoint):
                raise ValueError(
                    f"{key} = {endpoint!r} would be open to the network without keys: set "
                    "security.key_path and security.allowed_keys_path (docs/security.md), or bind "
                    "tcp://127.0.0.1:PORT or ipc:///PATH"
                )
        return self

    @model_validator(mode="after")
    def _pages_are_no_way_around_keys(self) -> Settings:
        viewer = self.viewer
        if self.security.key_path and viewer.enabled and viewer.token_path is None:
            raise ValueError(
                "security.key_path is set and viewer.token_path is not: who reaches the page could "
                "command the daemon without a key; set it (`ptycho-stream keys token FILE` makes a "
                "word), or viewer.enabled = false"
            )
        return self

    @model_validator(mode="after")
    def _senders_with_keys_are_connected_to(self) -> Settings:
        connected = {
            endpoint
            for stream in (*self.detectors.values(), self.positions)
            if stream.attach == "connect"
            for endpoint in stream.endpoints
        }
        for endpoint in self.security.server_keys:
            if endpoint not in connected:
                raise ValueError(
                    f"security.server_keys names {endpoint!r}, to which neither detector nor "
                    "positions connect: write it as there"
                )
        return self

    @model_validator(mode="after")
    def _detectors_differ(self) -> Settings:
        names = [detector.name for detector in self.more_detectors]
        if len(set(names)) < len(names):
            raise ValueError(f"more_detectors names one twice: {', '.join(names)}")
        read: dict[str, DetectorSettings] = {}
        for detector in (self.detector, *self.more_detectors):
            for endpoint in detector.endpoints:
                other = read.setdefault(endpoint, detector)
                if other is not detector and "sub" not in (detector.socket, other.socket):
                    raise ValueError(
                        f"{other.table} and {detector.table} would take each other's frames: both "
                        f"pull from {endpoint}"
                    )
        return self

    @property
    def detectors(self) -> dict[str, DetectorSettings]:
        """All detectors by the names of their tables, the reconstructed one first."""
        return {one.table: one for one in (self.detector, *self.more_detectors)}

    def of_detector(self, name: str) -> Settings:
        """What ingest goes by for the detector of that name, empty for the reconstructed one.

        Positions, geometry and view are of the reconstructed one.

        Raises:
            SettingsError: there is none.
        """
        if not name:
            return self
        for detector in self.more_detectors:
            if detector.name == name:
                changes = {
                    "detector": detector,
                    "positions": PositionSettings(source="inline"),
                    "geometry": GeometrySettings(),
                    "view": ViewSettings(),
                }
                return self.model_copy(update=changes)
        raise SettingsError(f"there is no detector {name!r} in more_detectors any more")

    @model_validator(mode="after")
    def _automatic_models_have_a_use(self) -> Settings:
        if self.training.automatic_above is not None:
            if self.model.registry is None:
                raise ValueError(
                    "training.automatic_above needs a folder for new models: set model.registry"
                )
            if self.model.name != "default":
                raise ValueError(
                    "training.automatic_above makes models that model.name, which pins another, "
                    "keeps from being used: set model.name to 'default', or leave one of them out"
                )
        return self

    @field_validator("*", mode="after")
    @classmethod
    def _absolute_paths(cls, value: Any, info: ValidationInfo) -> Any:
        context: dict[str, Path] = info.context or {}
        folder = context.get("folder")
        if folder is None or not isinstance(value, Section):
            return value
        changes = {
            name: absolute
            for name in type(value).model_fields
            if (absolute := _absolute(held := getattr(value, name), folder)) != held
        }
        return value.model_copy(update=changes) if changes else value


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, tuple):
        return tuple(_absolute(held, folder) for held in cast("tuple[Any, ...]", value))
    return value


def load_settings(path: Path) -> Settings:
    """Read and check a configuration file.

    Raises:
        SettingsError: the file is missing, is not TOML, or a key is unknown or wrong; the text
            has a line for every key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"there is no configuration file {path}: give an existing one with --config"
        ) from None
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    return checked_settings(raw, str(path), path.resolve().parent)


def checked_settings(raw: dict[str, Any], where: str, folder: Path | None = None) -> Settings:
    """Settings of plain values, by table and key as in a file.

    Args:
        raw: the values.
        where: they are from, for errors.
        folder: that relative paths count from; None: they stay as they are.

    Raises:
        SettingsError: a key is unknown or wrong; the text has a line for every key.
    """
    try:
        return Settings.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise SettingsError(f"{where} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def _explain(problem: Any) -> str:
    key = ".".join(_keys(problem["loc"])) or "(top level)"
    match problem["type"]:
        case "union_tag_not_found":
            return f"  {key}.kind: missing; it has no default and must be set"
        case "union_tag_invalid":
            context = problem["ctx"]
            return f"  {key}.kind: is one of {context['expected_tags']} (got {context['tag']!r})"
        case "extra_forbidden":
            return f"  {key}: unknown key; remove it or correct its spelling"
        case "missing":
            return f"  {key}: missing; it has no default and must be set"
        case _:
            text = problem["msg"].removeprefix("Value error, ")
            if not problem["loc"]:  # of several tables, whose keys are in the text
                return f"  {text}"
            given = problem["input"]
            return f"  {key}: {text}" + ("" if isinstance(given, dict) else f" (got {given!r})")


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """A problem's place as the file has it: pydantic adds the kind of optics that was chosen."""
    parts = [str(part) for part in loc]
    if parts[:2] == ["probe", "optics"]:
        del parts[2:3]
    return parts
