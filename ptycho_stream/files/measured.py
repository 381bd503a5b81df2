"""Read a measured scan from any file that ptycho-stream knows: the one door for all of them.

Used by ``ptycho-stream replay`` and ``reconstruct``, and by people's programs. ``docs/files.md``
says what is in each format.
"""

from __future__ import annotations

import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import h5py  # pyright: ignore[reportMissingTypeStubs]

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files import cxi_names
from ptycho_stream.files.assemble import EAGER_BYTES
from ptycho_stream.files.cxi_input import load_cxi
from ptycho_stream.files.hdf5_input import faults, opened_for_frames
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.nexus_input import load_nexus
from ptycho_stream.files.npz import ScanFile, load_scan
from ptycho_stream.files.npz_members import npz_keys
from ptycho_stream.files.ptychodus_input import is_diffraction, is_product, load_ptychodus
from ptycho_stream.files.ptychopinn_npz import FRAME_KEYS, load_ptychopinn
from ptycho_stream.files.store_input import is_stored_scan, load_stored

_GEOMETRY: Final = ("photon_energy_eV", "detector_distance_m", "detector_pixel_yx_m", "pixel_yx_m")
_FRAMES: Final = ("domain", "photons", "counts_per_unit", "negative")
_PATHS: Final = ("data", "y", "x", "xy", "positions_file", "mask", "position_unit")
_PICKLE: Final = b"\x80"


def load_measured(
    path: Path, choice: MeasuredChoice | None = None, eager_bytes: int = EAGER_BYTES
) -> ScanFile:
    """Read a scan, whatever the format: it is recognised by what is in the file.

    Known are our scan file (NPZ) and a scan's folder in our store, PtychoPINN's NPZ, ptychodus'
    diffraction and product files (either of the two is named), CXI, and frames and positions at
    named paths of any HDF5 (NeXus) file.

    Args:
        path: of the file or folder.
        choice: what the file does not say. One that names paths makes any HDF5 file be read by
            them, also where it is of a known format.
        eager_bytes: decoded size up to which frames are read at once. Beyond it ``counts`` of the
            answer is an array-like that reads (and checks) frames as they are asked for and keeps
            the file open until it is dropped; NPZ files are always read at once.

    Returns:
        Frames as unsigned counts, zero frequency where the file has it (the middle, in every format
        here), positions in metres, and as much of geometry, probe, object and mask as the file
        tells.

    Raises:
        FileFormatError: the file is none of these, damaged, says too little, or contradicts itself
            or what is plausible (units, domain, order of axes); the text says what to do.
        StoreError: a scan of the store cannot be read.
    """
    choice = choice or MeasuredChoice()
    if is_stored_scan(path):
        _check_use(path, choice, "a scan of the store", (*_GEOMETRY, "negative"))
        return load_stored(path, choice, eager_bytes)
    if not path.is_file():
        what = "is a folder, and no scan of the store lies there" if path.is_dir() else "is missing"
        raise FileFormatError(f"{path} {what}: name a file, or a scan's folder")
    if zipfile.is_zipfile(path):
        return _of_npz(path, choice)
    if h5py.is_hdf5(path):
        return _of_hdf5(path, choice, eager_bytes)
    raise FileFormatError(_unknown(path))


def _of_npz(path: Path, choice: MeasuredChoice) -> ScanFile:
    keys = npz_keys(path)
    if is_product(keys) or is_diffraction(keys):
        _check_use(path, choice, "ptychodus'", (*_GEOMETRY, *_FRAMES, "product"))
        return load_ptychodus(path, choice)
    if "xcoords" in keys and any(key in keys for key in FRAME_KEYS):
        _check_use(path, choice, "PtychoPINN's", (*_GEOMETRY, *_FRAMES, "frames_axis"))
        return load_ptychopinn(path, choice)
    if "positions_yx_m" in keys:
        _check_use(path, choice, "a scan file of ours", _GEOMETRY)
        answers = {name: getattr(choice, name) for name in _GEOMETRY}
        told = {name: value for name, value in answers.items() if value is not None}
        scan = replace(load_scan(path), **told)
        known = (scan.photon_energy_eV, scan.detector_distance_m, scan.detector_pixel_yx_m)
        return replace(scan, pixel_yx_m=None) if choice.moves_pixel and None not in known else scan
    raise FileFormatError(
        f"{path} holds {', '.join(keys[:12])}: that is no scan of ours (diffraction, "
        "positions_yx_m, measurement_domain), of PtychoPINN (diff3d, xcoords, ycoords) or of "
        "ptychodus (patterns; probe_position_x_m ...)"
    )


def _of_hdf5(path: Path, choice: MeasuredChoice, eager_bytes: int) -> ScanFile:
    # A damaged type or shape shows wherever it is first looked at.
    with faults(str(path)), opened_for_frames(path) as file:
        if all(getattr(choice, name) is None for name in _PATHS):
            names = file.root_names()
            if is_product(names) or is_diffraction(names):
                _check_use(path, choice, "ptychodus'", (*_GEOMETRY, *_FRAMES, "product"))
                return load_ptychodus(path, choice, eager_bytes)
            if cxi_names.VERSION in names:
                _check_use(path, choice, "a CXI file", (*_GEOMETRY, *_FRAMES, "frames_axis"))
                return load_cxi(file, choice, eager_bytes)
        _check_use(
            path, choice, "read by named paths", (*_PATHS, *_GEOMETRY, *_FRAMES, "frames_axis")
        )
        return load_nexus(file, choice, eager_bytes)


def _check_use(path: Path, choice: MeasuredChoice, what: str, used: tuple[str, ...]) -> None:
    """Refuse answers that would do nothing."""
    idle = [
        field.name
        for field in fields(choice)
        if field.name not in used and getattr(choice, field.name) != field.default
    ]
    if idle:
        raise FileFormatError(
            f"{path} is {what}, which has no use for {', '.join(idle)}: leave out"
        )


def _unknown(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(2)
    if first[:1] == _PICKLE and len(first) == 2 and first[1] <= 5:
        return (
            f"{path} is a Python pickle, which runs code when it is opened and never is here: save "
            "its arrays with numpy.savez"
        )
    return f"{path} is neither NPZ nor HDF5 (ptychodus, CXI, NeXus): convert it to one of these"
