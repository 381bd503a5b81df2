"""Reconstruct a recorded scan from its file, with the live stage's own code and without a daemon.

The file is put into a scan store as the daemon would have recorded it; then network, refinement
and trust work on it as they do beside a running scan. For ``ptycho-stream reconstruct`` and for
notebooks::

    image = reconstruct_file(Path("scan.cxi"), outputs=[Path("object.h5"), Path("object.png")])
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptycho_stream.errors import FileFormatError, GeometryError, ProbeError
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile, save_arrays
from ptycho_stream.files.products import ENDINGS, format_of, write_result
from ptycho_stream.files.ptychodus_output import required_geometry
from ptycho_stream.files.store_input import is_stored_scan
from ptycho_stream.files.stored_scan import store_as_settings_say
from ptycho_stream.files.view_change import change_sealed
from ptycho_stream.physics.probe import load_probe
from ptycho_stream.reconstruct.history import losses_of
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.reconstruct.recipe import Recipe, load_recipe
from ptycho_stream.reconstruct.spare_time import SpareTime
from ptycho_stream.reconstruct.trust_watch import TrustReport
from ptycho_stream.results import Image
from ptycho_stream.scans.borrowed import borrow_scan
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import Settings, checked_settings

Tables = Mapping[str, Mapping[str, Any]]
"""Settings by table and key, as in a configuration file."""

_GRID_PX = 32
"""Sizes of a patch are multiples of it."""
_UNHURRIED: Tables = {"refine": {"seconds": 60.0}, "trust": {"seconds": 60.0}}
"""Where there is no configuration: no other scan waits for the end of this one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a reconstruction has come.

    Attributes:
        step: ``storing``, ``predicting``, ``refining``, ``judging`` or ``writing``.
        done: of ``total``: frames, or sweeps over all of them while ``refining``.
        total: at most.
        words: what is thought of the image so far, or which file is written.
    """

    step: str
    done: float
    total: float
    words: str = ""


Report = Callable[[Progress], None]


def reconstruct_file(
    path: Path,
    config: Settings | None = None,
    tables: Tables | None = None,
    *,
    choice: MeasuredChoice | None = None,
    outputs: Sequence[Path] = (),
    data: Path | None = None,
    report: Report | None = None,
) -> Image:
    """Reconstruct a measured scan from its file, or from its folder in a store.

    Args:
        path: of any format that :func:`~ptycho_stream.files.measured.load_measured` reads.
        config: a daemon's settings, by which the scan is cropped, looked at, reconstructed, refined
            and judged; None: the defaults, with the probe in the file and more time.
        tables: settings that go before these, such as ``{"refine": {"seconds": 30}}``.
        choice: what the file does not say of itself.
        outputs: files to write, in the formats that their endings ask for.
        data: data directory in which scan and image are kept; None: they are not. A scan of a
            store is kept where it is.
        report: told how far it has come.

    Returns:
        The final image, with its verdict.

    Raises:
        FileFormatError: the file is not a scan, or an output cannot be written.
        SettingsError: ``tables`` are wrong.
        ProbeError: there is no probe, or none that fits.
        ModelError: the model or the device cannot be used.
        GeometryError: frames and probe do not fit each other.
        StoreError: the store cannot be written.
    """
    _check_outputs(outputs)
    report = report or _unheard
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptycho-stream-")))
        root = folder if data is None else data
        if is_stored_scan(path):
            _check_stored(path, choice, data)
            if path.parent.name != "scans" or not os.access(path, os.W_OK):
                _log.warning("%s cannot be leased: it may be deleted meanwhile", path)
            else:
                stack.enter_context(Catalogue(path.parents[1]).lease(path.name, "reconstruct-file"))
            scan = load_measured(path, eager_bytes=0)
            settings = _settings(scan, config, tables or {}, folder)
            scan_id = borrow_scan(path, folder)
        else:
            scan = load_measured(path, choice)
            settings = _settings(scan, config, tables or {}, folder)
            scan_id = store_as_settings_say(
                root, scan, settings, lambda done, of: report(Progress("storing", done, of))
            )
        del scan
        recipe = load_recipe(settings)
        opened = _open(root, scan_id, settings, recipe)
        stack.callback(opened.close)
        for output in outputs:  # before the work, not after it
            if format_of(output) == "ptychodus":
                required_geometry(output, opened.reader.header.geometry)
        _finish(root, opened, settings, recipe, report)
        image = Image(opened.state(final=True))
        if data is not None:
            opened.begin_save()
            opened.end_save(wait=True)
        _write(image, outputs, opened, report)
        return image


def _check_outputs(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if format_of(output) is None:
            raise FileFormatError(f"{output}: the name must end in one of {', '.join(ENDINGS)}")
        if not output.parent.is_dir():
            raise FileFormatError(f"{output}: there is no folder {output.parent}: make it first")


def _check_stored(path: Path, choice: MeasuredChoice | None, data: Path | None) -> None:
    if data is not None or (choice is not None and choice != MeasuredChoice()):
        raise FileFormatError(
            f"{path} is a scan of a store, which knows its frames and geometry and stays where it "
            "is: leave out the data folder and what describes a file"
        )


def _settings(scan: ScanFile, config: Settings | None, tables: Tables, folder: Path) -> Settings:
    """The settings of ``config`` with ``tables`` before them, and the file's probe behind them."""
    base = _UNHURRIED if config is None else config.model_dump(exclude_unset=True)
    held: dict[str, Any] = dict(base)
    for name, table in tables.items():
        held[name] = {**held.get(name, {}), **table}
    told = tables.get("probe", {})
    if "path" in told or "optics" in told:  # there is one of them only
        held["probe"].pop("optics" if "path" in told else "path", None)
    probe = held["probe"] = dict(held.get("probe", {}))
    if probe.get("path") is None and probe.get("optics") is None:
        if scan.probe is None:
            raise ProbeError(
                "the file holds no probe: name one (an NPZ with `probe`, or a ptychodus product), "
                "or a configuration with probe.path or [probe.optics]"
            )
        probe["path"] = folder / "probe.npz"
        save_arrays(probe["path"], {"probe": scan.probe})
    reconstruct = held["reconstruct"] = dict(held.get("reconstruct", {}))
    if "size_px" not in reconstruct and probe.get("path") is not None:
        reconstruct["size_px"] = _size_px(Path(probe["path"]))
    return checked_settings(held, "what the reconstruction is made with")


def _size_px(probe: Path) -> int:
    size = load_probe(probe).size_px
    if size % _GRID_PX:
        raise ProbeError(
            f"the probe in {probe} has {size} pixels a side, and networks take multiples of "
            f"{_GRID_PX}: crop or pad the frames to one and give the probe for that window; "
            "refine_file() takes any size, without a network"
        )
    return size


def _open(root: Path, scan_id: str, settings: Settings, recipe: Recipe) -> OpenScan:
    """The image of a stored scan, as the reconstruct stage opens it."""
    catalogue = Catalogue(root)
    lease = catalogue.lease(scan_id, "reconstruct-file")
    reader = catalogue.open(scan_id)
    return OpenScan.of(reader, lease, recipe.made_for(reader.header), settings)


def _finish(root: Path, scan: OpenScan, settings: Settings, recipe: Recipe, report: Report) -> None:
    """Do for a scan all that the stage does until it is over."""
    image, scan_id, pairs = scan.image, scan.reader.scan_id, scan.reader.pair_count
    if image.problem:
        raise GeometryError(image.problem)
    spare_time = SpareTime(_Listener(report, pairs, settings.refine.sweeps))
    while True:
        if image.has_work:
            scan.extended(image.step(recipe.batch_frames, _say_damaged))
            report(Progress("predicting", len(image.frames), pairs))
        elif not spare_time.use({scan_id: scan}, between_batches=False):
            if scan.trust is None or (wanted := scan.trust.view_wanted) is None:
                return
            _log.info("scan %s is looked at another way: %s", scan_id, wanted)
            change_sealed(root, scan_id, wanted)
            scan.reader.refresh()


class _Listener:
    """Reports what is done in the time that the network leaves."""

    def __init__(self, report: Report, frames: int, most_sweeps: float) -> None:
        self._report, self._frames, self._most_sweeps = report, frames, most_sweeps
        self._visits, self._words = 0, ""

    def refined(self, visits: int) -> None:
        """Frames were visited by refinement so many times."""
        self._visits += visits
        self._tell("refining")

    def shown(self, sweeps: float) -> None:
        """The image is that of so many visits of a frame."""
        self._visits = round(sweeps * self._frames)

    def judged(self, report: TrustReport) -> None:
        """This is what is known of the image now."""
        excess = report.figures.get("excess")
        known = "" if excess is None else f", misfit {excess:.3f} above noise"
        self._words = report.verdict + known
        self._tell("judging")

    def refinement_failed(self) -> None:
        """The image stays as it was."""
        self._words = "refinement has failed"
        self._tell("refining")

    def judgement_failed(self) -> None:
        """The image goes without a (new) verdict."""
        self._words = "the image cannot be judged"
        self._tell("judging")

    def _tell(self, step: str) -> None:
        sweeps = self._visits / max(self._frames, 1)
        self._report(Progress(step, sweeps, self._most_sweeps, self._words))


def _write(image: Image, outputs: Sequence[Path], scan: OpenScan, report: Report) -> None:
    losses = losses_of(scan.reader.directory, image.content.generation)
    for output in outputs:
        kind = format_of(output)
        assert kind is not None  # checked before anything else

        def written(done: int, of: int, name: str = output.name) -> None:
            report(Progress("writing", done, of, name))

        write_result(image, output, kind, scan.reader, losses=losses, progress=written)


def _say_damaged(slots: list[int]) -> None:
    _log.error("stored frames whose checksums do not match are left out: slots %s", slots)


def _unheard(_progress: Progress) -> None:
    """Nobody asked how far it has come."""
