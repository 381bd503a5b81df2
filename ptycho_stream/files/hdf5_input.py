"""HDF5 files from outside: datasets by their paths, checked, with errors that name file and path.

Used by the readers of ptychodus, CXI and NeXus files. Links into other files and virtual datasets
are followed; what is too large is refused before memory is allocated.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, cast

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.plausible import real_number

MAX_ARRAY_BYTES: Final = 12 * 1024**3
"""Of arrays that are read as a whole: positions, masks, probes, objects."""
MAX_FRAME_BYTES: Final = 512 * 1024**2
_NAMES_TOLD: Final = 12
_PLUGIN_FILTERS: Final = {32008: "bitshuffle", 32004: "LZ4", 32001: "Blosc", 32015: "Zstandard"}

UNITS_EV: Final = {"ev": 1.0, "kev": 1e3, "mev": 1e6, "j": 1 / 1.602176634e-19}


class Hdf5Input:
    """An HDF5 file, open for reading; closed when the last of its datasets is dropped."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            FileFormatError: it is missing or no HDF5 file.
        """
        self.path = path
        if not path.is_file():
            raise FileFormatError(f"there is no file {path}")
        try:
            self._file = h5py.File(path, "r")
        except (OSError, RuntimeError) as error:
            raise FileFormatError(f"{path} is not a readable HDF5 file: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> None:
        """Close the file; datasets of it cannot be read any more."""
        self._file.close()

    def find(self, *paths: str) -> Any | None:
        """The first dataset that is there; None: there is none.

        Raises:
            FileFormatError: a link to one leads nowhere.
        """
        for path in paths:
            with self._faults(path):
                held = self._file.get(path)
                if isinstance(held, h5py.Dataset):
                    return held
                if held is None:
                    self._check_link(path)
        return None

    def get(self, path: str) -> Any:
        """The dataset at ``path``.

        Raises:
            FileFormatError: it is not there; the text names some that are.
        """
        found = self.find(path)
        if found is None:
            raise FileFormatError(f"{self.path} has no dataset {path}; {self.names()}")
        return found

    def matching(self, pattern: str) -> list[Any]:
        """Datasets of a path whose last part may hold ``*``, in the order of their names.

        Raises:
            FileFormatError: a link to one leads nowhere.
        """
        if "*" not in pattern:
            found = self.find(pattern)
            return [] if found is None else [found]
        folder, _, last = pattern.rpartition("/")
        with self._faults(pattern):
            group = self._file.get(folder or "/")
            names = sorted(group) if isinstance(group, h5py.Group) else []
        held = [self.find(f"{folder}/{name}") for name in fnmatch.filter(names, last)]
        return [dataset for dataset in held if dataset is not None]

    def array(self, path: str, kinds: str, *, what: str = "") -> NDArray[Any] | None:
        """A whole dataset, None if it is not there.

        Args:
            path: of it.
            kinds: numpy kinds that it may have (``iuf``).
            what: it is, for errors.

        Raises:
            FileFormatError: it is of another kind, too large, or cannot be read.
        """
        dataset = self.find(path)
        if dataset is None:
            return None
        name = f"{self.path}: {path}"
        if dataset.dtype.kind not in kinds:
            raise FileFormatError(f"{name} is {dataset.dtype}, which is no {what or 'number'}")
        if dataset.size is None or dataset.size * dataset.dtype.itemsize > MAX_ARRAY_BYTES:
            raise FileFormatError(f"{name} has shape {dataset.shape}, too large for {what}")
        return read_dataset(dataset, ())

    def required(self, path: str, kinds: str, *, what: str) -> NDArray[Any]:
        """A whole dataset that must be there; as :meth:`array`.

        Raises:
            FileFormatError: it is not there either.
        """
        found = self.array(path, kinds, what=what)
        if found is None:
            raise FileFormatError(f"{self.path} has no dataset {path}; {self.names()}")
        return found

    def number(self, *paths: str) -> float | None:
        """One number, of the first path that is there; None if it is not above 0 or not there.

        Raises:
            FileFormatError: it is not one number.
        """
        dataset = self.find(*paths)
        if dataset is None:
            return None
        if dataset.size != 1 or dataset.dtype.kind not in "iuf":
            raise FileFormatError(
                f"{self.path}: {dataset.name} is {dataset.dtype} {dataset.shape}, not one number"
            )
        value = float(np.asarray(read_dataset(dataset, ())).reshape(-1)[0])
        return value if 0 < value < np.inf else None

    def measure(self, units: Mapping[str, float], *paths: str) -> float | None:
        """Like :meth:`number`, in the unit that the dataset's ``units`` attribute names.

        Raises:
            FileFormatError: it names none of ``units``, or nothing.
        """
        value = self.number(*paths)
        if value is None:
            return None
        dataset = self.find(*paths)
        unit = units_of(dataset)
        if unit is None or unit.lower() not in units:
            raise FileFormatError(
                f"{self.path}: {cast('Any', dataset).name} is {value} of unit {unit!r}: give the "
                "value yourself (photon_energy_eV, detector_distance_m, detector_pixel_yx_m)"
            )
        return value * units[unit.lower()]

    def text(self, *paths: str) -> str:
        """A text, empty if it is not there."""
        dataset = self.find(*paths)
        if dataset is None or dataset.size != 1 or dataset.dtype.kind not in "OSU":
            return ""
        value = np.asarray(read_dataset(dataset, ())).reshape(-1)[0]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def attribute(self, name: str, path: str = "/") -> Any | None:
        """An attribute of a group or dataset; None if either is not there."""
        with self._faults(path):
            held = cast("Any", self._file.get(path))
            return None if held is None else held.attrs.get(name)

    def attributes(self, path: str) -> dict[str, Any]:
        """All attributes of a group or dataset, by name."""
        with self._faults(path):
            held = cast("Any", self._file.get(path))
            return {} if held is None else dict(held.attrs)

    def root_names(self) -> list[str]:
        """What lies at the root."""
        with self._faults("/"):
            return list(self._file)

    def attribute_number(self, name: str, path: str = "/") -> float | None:
        """An attribute that is a number above 0; None if it is not there, or not above 0.

        Raises:
            FileFormatError: it is no number.
        """
        number = self.coordinate(name, path)
        return number if number is not None and number > 0 else None

    def coordinate(self, name: str, path: str = "/") -> float | None:
        """An attribute that is any finite number; None if it is not there.

        Raises:
            FileFormatError: it is no number.
        """
        value = self.attribute(name, path)
        if value is None:
            return None
        number = real_number(f"{self.path}: attribute {name} of {path}", value)
        return number if np.isfinite(number) else None

    def names(self) -> str:
        """Some datasets of the file, as the end of a sentence."""
        found: list[str] = []

        def look(name: str, item: Any) -> bool | None:
            if isinstance(item, h5py.Dataset):
                found.append(f"/{name} {cast('Any', item).shape}")
            return True if len(found) > _NAMES_TOLD else None

        with self._faults("/"):
            self._file.visititems(look)
        more = " ..." if len(found) > _NAMES_TOLD else ""
        return f"there are {', '.join(found[:_NAMES_TOLD]) or 'none'}{more}"

    def _check_link(self, path: str) -> None:
        """Say so where ``path`` is a link into a file that cannot be opened."""
        link = self._file.get(path, getlink=True) if path in _linked(self._file, path) else None
        if isinstance(link, h5py.ExternalLink):
            raise FileFormatError(
                f"{self.path}: {path} is a link to {link.path} in {link.filename}, which cannot be "
                "opened: put that file where the link says (beside this one)"
            )

    @contextmanager
    def _faults(self, path: str) -> Generator[None]:
        with faults(f"{self.path}: {path}"):
            yield


@contextmanager
def opened_for_frames(path: Path) -> Generator[Hdf5Input]:
    """An HDF5 file that stays open after the block as long as one of its datasets is held.

    Raises:
        FileFormatError: it is missing or no HDF5 file.
    """
    file = Hdf5Input(path)
    try:
        yield file
    except BaseException:
        file.close()
        raise


def _linked(file: Any, path: str) -> Sequence[str]:
    """``path`` if its folder is there and holds a link of that name, else nothing."""
    folder, _, last = path.rstrip("/").rpartition("/")
    group = file.get(folder or "/")
    return [path] if isinstance(group, h5py.Group) and last in list(group) else []


@contextmanager
def faults(where: str) -> Generator[None]:
    """Turn what h5py raises on a damaged file into an error that says where."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise FileFormatError(f"{where} cannot be read, the file is damaged: {error}") from error


def read_dataset(dataset: Any, key: Any) -> NDArray[Any]:
    """``dataset[key]``.

    Raises:
        FileFormatError: it cannot be read; a missing filter is named with the package that has it.
    """
    where = f"{dataset.file.filename}: {dataset.name}"
    _require_filters(dataset, where)
    with faults(where):
        return dataset[key]


def units_of(dataset: Any) -> str | None:
    """The ``units`` attribute of a dataset; None: there is none.

    Raises:
        FileFormatError: it cannot be read.
    """
    with faults(f"{dataset.file.filename}: {dataset.name}"):
        value = dataset.attrs.get("units")
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value.strip() if isinstance(value, str) and value.strip() else None


def _require_filters(dataset: Any, where: str) -> None:
    plist = dataset.id.get_create_plist()
    for index in range(plist.get_nfilters()):
        code = plist.get_filter(index)[0]
        if h5py.h5z.filter_avail(code):
            continue
        try:
            import hdf5plugin  # noqa: F401  # pyright: ignore
        except ImportError as error:
            name = _PLUGIN_FILTERS.get(code, f"number {code}")
            raise FileFormatError(
                f"{where} is compressed with the filter {name}, which h5py reads with the package "
                "hdf5plugin: pip install 'ptycho-stream[hdf5]'"
            ) from error
        if not h5py.h5z.filter_avail(code):
            raise FileFormatError(f"{where} needs HDF5 filter {code}, which hdf5plugin lacks")


class Hdf5Frames:
    """Frames of one or several datasets, one after another.

    Args:
        datasets: each (n, h, w), of a raster (rows, columns, h, w), or (h, w, n).
        where: file and path, for errors.
        frames_last: they are (h, w, n).
    """

    def __init__(self, datasets: Sequence[Any], where: str, *, frames_last: bool = False) -> None:
        self._datasets, self._where, self._last = datasets, where, frames_last
        shapes = [self._shape_of(dataset) for dataset in datasets]
        if len({(*shape[1:], d.dtype) for shape, d in zip(shapes, datasets, strict=True)}) > 1:
            raise FileFormatError(f"{where}: datasets of several shapes or dtypes: name one")
        count, (_, h, w) = sum(shape[0] for shape in shapes), shapes[0]
        self.shape: tuple[int, int, int] = (count, h, w)
        self.dtype: np.dtype[Any] = datasets[0].dtype
        self._ends = np.cumsum([shape[0] for shape in shapes])
        if 0 in self.shape or h * w * self.dtype.itemsize > MAX_FRAME_BYTES:
            raise FileFormatError(f"{where} has shape {datasets[0].shape}: no frames")

    def _shape_of(self, dataset: Any) -> tuple[int, int, int]:
        shape: tuple[int, ...] = dataset.shape or ()
        if self._last and len(shape) == 3:
            return shape[2], shape[0], shape[1]
        if len(shape) == 4 and not self._last:
            return shape[0] * shape[1], shape[2], shape[3]
        if len(shape) != 3:
            raise FileFormatError(
                f"{self._where} has shape {shape}; frames are (N, h, w), or (rows, columns, h, w) "
                "of a raster: name another dataset"
            )
        return shape[0], shape[1], shape[2]

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Frames (n, h, w), runs of neighbours at once.

        Raises:
            FileFormatError: the file cannot be read there.
        """
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        at = 0
        while at < len(rows):
            run = 1
            while at + run < len(rows) and rows[at + run] == rows[at] + run:
                run += 1
            self._read_run(int(rows[at]), out[at : at + run])
            at += run
        return out

    def _read_run(self, first: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (n, h, w) with frames ``first`` on, over the borders of datasets."""
        done = 0
        while done < len(out):
            which = int(np.searchsorted(self._ends, first + done, side="right"))
            start = first + done - int(self._ends[which - 1] if which else 0)
            dataset = self._datasets[which]
            left = int(self._ends[which]) - (first + done)
            count = min(left, len(out) - done)
            if self._last:
                part = np.moveaxis(read_dataset(dataset, np.s_[..., start : start + count]), -1, 0)
            elif len(dataset.shape) == 4:
                row, column = divmod(start, dataset.shape[1])
                count = min(count, dataset.shape[1] - column)
                part = read_dataset(dataset, np.s_[row, column : column + count])
            else:
                part = read_dataset(dataset, np.s_[start : start + count])
            out[done : done + count] = part
            done += count
