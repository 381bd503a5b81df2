"""The TOML configuration file as pydantic models: every key, its default, unit and meaning.

Read by the daemon, by ``ptycho-stream config check`` and by all commands that take ``--config``.
Unknown keys are errors.  Relative paths count from the configuration file's folder.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
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

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


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


def _local_endpoint(value: str) -> str:
    parts = urlsplit(_endpoint(value))
    if parts.scheme == "tcp" and parts.hostname not in LOOPBACK_HOSTS:
        raise ValueError(
            "would be open to the network without keys: bind tcp://127.0.0.1:PORT or ipc:///PATH"
        )
    return value


def _check_attached(attach: str, endpoint: str) -> None:
    if attach == "bind":
        _local_endpoint(endpoint)
    elif urlsplit(endpoint).hostname == "*":
        raise ValueError("tcp://*:PORT can only be bound: name the sender's host to connect to")


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
LocalEndpoint = Annotated[str, AfterValidator(_local_endpoint)]
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
    min_free_bytes: int = Field(
        default=2_000_000_000, ge=0, description="below this no new scan is accepted"
    )
    sync_interval_ms: int = Field(
        default=100, ge=1, description="how often frames are synced to disk"
    )
    frames_per_file: int = Field(default=1024, ge=1, le=65_536)
    resume_s: float = Field(
        default=30.0, gt=0, description="a scan found open after a crash waits so for its stream"
    )


class DetectorSettings(Section):
    """The frame stream."""

    dialect: Literal["dectris-v1", "native"] = "dectris-v1"
    endpoint: Endpoint = "tcp://127.0.0.1:9999"
    more_endpoints: tuple[Endpoint, ...] = Field(
        default=(), description="of the same detector, where several senders share its frames"
    )
    attach: Literal["connect", "bind"] = "connect"
    socket: Literal["pull", "sub"] = "pull"
    crop_yx_px: tuple[SizePx, SizePx] | None = Field(
        default=None,
        description="height and width stored, about the beam centre; the whole frame if unset",
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
        default=60.0, gt=0, description="a scan without a frame for so long is taken for cut short"
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All of the detector's."""
        return (self.endpoint, *self.more_endpoints)

    @model_validator(mode="after")
    def _endpoints_can_be_attached(self) -> DetectorSettings:
        for endpoint in self.endpoints:
            _check_attached(self.attach, endpoint)
        if len(set(self.endpoints)) < len(self.endpoints):
            raise ValueError("more_endpoints names an endpoint twice")
        return self


class PositionSettings(Section):
    """Where scan positions come from and how long frames wait for them."""

    source: Literal["native", "inline", "file"] = "native"
    endpoint: Endpoint | None = Field(default=None, description="of a native position stream")
    attach: Literal["connect", "bind"] = "connect"
    socket: Literal["pull", "sub"] = "pull"
    path: Path | None = Field(default=None, description="NPZ or CSV, for source = 'file'")
    wait_s: float = Field(
        default=10.0, gt=0, description="after a series' end, for positions to come"
    )
    match_window_s: float = Field(
        default=60.0,
        gt=0,
        description="how far apart a scan and an epoch that waits for one may be armed",
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> PositionSettings:
        if self.source == "native" and self.endpoint is None:
            raise ValueError("source = 'native' needs an endpoint (tcp://HOST:PORT)")
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
    threads: int = Field(default=1, ge=1, description="of the network on a CPU")
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
        default=0.5, ge=0, le=0.9, description="of the time, where the network cannot keep up"
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
        default=1 << 25, ge=1, description="images of more pixels are not refined: 40 bytes each"
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

    endpoint: LocalEndpoint = "tcp://127.0.0.1:9600"
    resync_endpoint: LocalEndpoint = "tcp://127.0.0.1:9601"
    publish_interval_ms: float = Field(default=100.0, gt=0)
    queue_bytes: int = Field(default=64_000_000, gt=0, description="kept for a slow subscriber")


class ControlSettings(Section):
    """Where the daemon takes requests."""

    endpoint: LocalEndpoint = "tcp://127.0.0.1:9602"


class HttpSettings(Section):
    """`/metrics` and `/healthz`."""

    host: Literal["127.0.0.1", "localhost", "::1"] = "127.0.0.1"
    port: int = Field(default=9603, ge=0, le=65535, description="0: any free port, said in the log")


class ExportSettings(Section):
    """Files written when a scan ends."""

    directory: Path = Path("exports")
    formats: tuple[Literal["npz", "png"], ...] = ()


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
    export: ExportSettings = ExportSettings()
    supervisor: SupervisorSettings = SupervisorSettings()

    @model_validator(mode="after")
    def _bound_endpoints_differ(self) -> Settings:
        bound = {
            "results.endpoint": self.results.endpoint,
            "results.resync_endpoint": self.results.resync_endpoint,
            "control.endpoint": self.control.endpoint,
        }
        if self.http.port:
            bound["http.port"] = f"tcp://{self.http.host}:{self.http.port}"
        if self.detector.attach == "bind":
            bound["detector.endpoint"] = self.detector.endpoint
        if self.positions.attach == "bind" and self.positions.endpoint is not None:
            bound["positions.endpoint"] = self.positions.endpoint
        keys: dict[str, str] = {}
        for key, endpoint in bound.items():
            place = endpoint.replace("//localhost:", "//127.0.0.1:")
            if place in keys:
                raise ValueError(f"{keys[place]} and {key} are the same endpoint ({endpoint})")
            keys[place] = key
        return self

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
        changes: dict[str, Path] = {
            name: folder / held
            for name in type(value).model_fields
            if isinstance(held := getattr(value, name), Path) and not held.is_absolute()
        }
        return value.model_copy(update=changes) if changes else value


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
    try:
        return Settings.model_validate(raw, context={"folder": path.resolve().parent})
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise SettingsError(f"{path} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


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
            given = problem["input"]
            return f"  {key}: {text}" + ("" if isinstance(given, dict) else f" (got {given!r})")


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """A problem's place as the file has it: pydantic adds the kind of optics that was chosen."""
    parts = [str(part) for part in loc]
    if parts[:2] == ["probe", "optics"]:
        del parts[2:3]
    return parts
