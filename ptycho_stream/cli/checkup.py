"""What ``ptycho-stream doctor`` finds, and its checks of files, disk and device."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptycho_stream.errors import ModelError, ProbeError
from ptycho_stream.geometry import object_pixel_yx_m
from ptycho_stream.settings import Settings


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at, a table or key of the settings.
        state: ``OK`` or, in a word or two, what it is instead.
        target: endpoint or path.
        detail: a sentence; what to do where something is wrong.
        ok: whether the daemon can do its work with it.
    """

    subject: str
    state: str
    target: str
    detail: str
    ok: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_files(settings: Settings) -> list[Finding]:
    """Probe, model, data directory, and the files of the view that are named."""
    found = [_probe(settings), _model(settings), _data_directory(settings)]
    return found + _view_files(settings)


def check_machine(settings: Settings) -> list[Finding]:
    """The device that the reconstruct stage will use."""
    import torch  # takes a second

    wanted = settings.reconstruct.device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and index >= count:
        seen = f"torch finds {count} GPU(s)" if count else "torch finds no GPU"
        advice = "install a CUDA build and a driver, or set device = 'cpu' or another number"
        return [Finding("reconstruct.device", "missing", wanted, f"{seen}: {advice}", ok=False)]
    if wanted == "cpu" or not count:
        found = f"{count or 'no'} GPU(s), runs on the CPU"
    else:
        found = f"{count} GPU(s), runs on a {torch.cuda.get_device_name(index)}"
    return [Finding("reconstruct.device", "OK", wanted, found)]


def _probe(settings: Settings) -> Finding:
    from ptycho_stream.physics.probe import load_probe  # imports torch

    path, size = settings.probe.path, settings.reconstruct.size_px
    if path is None:
        return _optics(settings)
    try:
        probe = load_probe(path)
    except ProbeError as error:
        state = "unusable" if path.is_file() else "missing"
        return Finding("probe.path", state, str(path), str(error), ok=False)
    detail = f"{len(probe.modes)} mode(s) of {probe.size_px} x {probe.size_px} pixels"
    if probe.size_px != size:
        detail += f", but reconstruct.size_px is {size}: make them the same"
        return Finding("probe.path", "wrong size", str(path), detail, ok=False)
    return Finding("probe.path", "OK", str(path), detail)


def check_optics(settings: Settings) -> float | None:
    """Try out the optics that the probe is made from, if [geometry] tells what it takes.

    Returns:
        Height of the object's pixels in metres; None: there are no optics, or only a scan's stream
        tells its geometry.

    Raises:
        ProbeError: the optics do not suit the geometry.
    """
    from ptycho_stream.physics.optics import optic_of

    optics, size = settings.probe.optics, settings.reconstruct.size_px
    known = settings.geometry
    energy, distance = known.photon_energy_eV, known.detector_distance_m
    detector_pixel = known.detector_pixel_yx_m
    if optics is None or energy is None or distance is None or detector_pixel is None:
        return None
    n = settings.detector.bin_px
    stored = (n * detector_pixel[0], n * detector_pixel[1])
    pixel_yx_m = object_pixel_yx_m(energy, distance, stored, size)
    optic_of(optics, energy, pixel_yx_m).wave(size)
    return pixel_yx_m[0]


def _optics(settings: Settings) -> Finding:
    optics = settings.probe.optics
    kind = "" if optics is None else optics.kind
    try:
        pixel_m = check_optics(settings)
    except ProbeError as error:
        return Finding("probe.optics", "unusable", kind, str(error), ok=False)
    detail = "the probe is made for each scan, from the energy and geometry that its stream tells"
    if pixel_m is not None:
        detail = f"the probe fits {settings.reconstruct.size_px} pixels of {pixel_m * 1e9:.3g} nm"
    return Finding("probe.optics", "OK", kind, detail)


def _model(settings: Settings) -> Finding:
    from ptycho_stream.models.registry import ModelRegistry  # imports torch

    name = settings.model.name
    try:
        _, manifest = ModelRegistry(settings.model.registry).load(name)
    except ModelError as error:
        return Finding("model.name", "unusable", name, str(error), ok=False)
    return Finding("model.name", "OK", name, f"{manifest.architecture} {manifest.name}")


def _view_files(settings: Settings) -> list[Finding]:
    """Whether they are there; that they fit the detector is seen when a scan begins."""
    view = settings.view
    named = {
        "view.bad_pixels_path": view.bad_pixels_path,
        "view.flat_field_path": view.flat_field_path,
        "view.background_path": view.background_path,
        "view.bad_frames_path": view.bad_frames_path,
    }
    missing = "there is no such file: scans are looked at without it; correct the path"
    return [
        Finding(key, "OK", str(path), f"{path.stat().st_size} bytes")
        if path.is_file()
        else Finding(key, "missing", str(path), missing, ok=False)
        for key, path in named.items()
        if path is not None
    ]


def _data_directory(settings: Settings) -> Finding:
    wanted = settings.data.directory
    present = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        return Finding(
            "data.directory",
            "not writable",
            str(wanted),
            f"cannot write in {present}: {error.strerror}",
            ok=False,
        )
    free = shutil.disk_usage(present).free
    detail = f"{free / 1e9:.1f} GB free"
    if free < settings.data.min_free_bytes:
        detail += (
            f", less than data.min_free_bytes ({settings.data.min_free_bytes / 1e9:.1f} GB): "
            "no scan would be accepted; make room"
        )
        return Finding("data.directory", "full", str(wanted), detail, ok=False)
    if present != Path(wanted):
        detail += "; will be made"
    return Finding("data.directory", "OK", str(wanted), detail)
