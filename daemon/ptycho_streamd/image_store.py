"""The images of the scans in the store: what each is made with, opening and finishing them.

Owned by the reconstruct stage. What a scan alone was told to be made with (``ctl reprocess``) is
kept in its folder, so that it holds over restarts.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ptycho_stream.errors import FileFormatError, ModelError, ScanNotFound, StoreError
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe, load_probe
from ptycho_stream.reconstruct.history import read_history
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.reconstruct.probe_life import probe_of_scan_before, save_probe
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image, ImageState
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.disk import replace_file
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import Settings
from ptycho_streamd.stored_images import IMAGE_FILE
from ptycho_streamd.tries import begin_try, end_tries

DONE_FILE = "reconstruct.done"
REQUEST_FILE = "reprocess.json"
PROBE_SWEEPS = 8.0
"""A probe of a scan that was refined for fewer is not handed on; a good one waits for six."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reprocessing:
    """What one scan is made with instead of what the settings name; None: as they say."""

    probe: str | None = None
    model: str | None = None


class ImageStore:
    """Images by the identity of their scan.

    Attributes:
        catalogue: of the scans.
        recipe: of the settings; None before it is loaded.
        problem: why there is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.catalogue = Catalogue(settings.data.directory, verify_reads=settings.data.verify_reads)
        self.recipe: Recipe | None = None
        self.problem = ""

    def open(self, scan_id: str) -> OpenScan | None:
        """The image of a scan to go on with; None if the scan is gone.

        Raises:
            StoreError: the scan cannot be read, or has ended the stage too often.
            ProbeError: it was told to be made with a probe that cannot be used, or the settings'
                optics do not suit it.
            ModelError: or with such a model.
        """
        try:
            lease = self.catalogue.lease(scan_id, "reconstruct")
        except ScanNotFound:
            return None  # retired in this moment
        try:
            reader = self.catalogue.open(scan_id)
        except StoreError:
            lease.release()
            raise
        try:
            recipe = self.recipe_for(reader.header)
            if reader.pair_count:
                begin_try(reader.directory)
            return OpenScan.of(reader, lease, recipe, self.settings)
        except Exception:
            reader.close()
            lease.release()
            raise

    def recipe_for(self, header: ScanHeader) -> Recipe:
        """What the image of a scan is made with: the settings' recipe, but for the probe that
        refinement made of it in the scan before, and for what this scan alone was told.

        Raises:
            ProbeError, ModelError: what this scan was told cannot be used, or the settings' optics
                do not suit it.
        """
        recipe = self._settings_recipe()
        told = self._reprocessing(header.scan_id)
        if told.model is not None:
            network, manifest = ModelRegistry(self.settings.model.registry).load(told.model)
            recipe = replace(
                recipe, network=network, model=manifest.name, model_sha256=manifest.sha256
            )
        probe = load_probe(told.probe) if told.probe else self._carried(header, recipe)
        return recipe.made_for(header) if probe is None else recipe.with_probe(probe)

    def _settings_recipe(self) -> Recipe:
        if self.recipe is None:
            raise ModelError(self.problem or "network and probe are not loaded yet: try again")
        return self.recipe

    def _carried(self, header: ScanHeader, recipe: Recipe) -> Probe | None:
        if not self.settings.probe.carry:
            return None
        root = self.settings.data.directory
        return probe_of_scan_before(self.catalogue, root, header, recipe.origin_digest)

    def keep_probe(self, scan: OpenScan) -> None:
        """Save the refined probe of a scan that went well, for the next one."""
        layer = scan.image.refined
        report = None if scan.trust is None else scan.trust.report
        if layer is None or layer.shown_sweeps < PROBE_SWEEPS:
            return
        if self.settings.trust.enabled and (report is None or report.verdict != "good"):
            return
        digest = self._settings_recipe().origin_digest
        try:
            save_probe(scan.reader.directory, Probe(layer.shown_probe), digest)
        except FileFormatError as error:
            log.error("scan %s: its probe is not kept: %s", scan.reader.scan_id, error)

    def keep_image(self, scan: OpenScan) -> None:
        """Keep the final image of a scan in its folder, for whoever asks for it later.

        Raises:
            FileFormatError: the disk refused, or the image spans too much for one array.
        """
        state = scan.state(final=True)
        if state.tiles:
            Image(state).save(scan.reader.directory / IMAGE_FILE)

    def reprocess(self, scan_id: str, what: Reprocessing) -> None:
        """Have the image of a scan made again; what was told before is forgotten.

        Raises:
            ScanNotFound: there is no such scan.
            ProbeError, ModelError: ``what`` cannot be used.
            StoreError: the disk refused.
        """
        with self.catalogue.open(scan_id) as reader:
            header = reader.header
        path = self._folder(scan_id) / REQUEST_FILE
        before = path.read_bytes() if path.exists() else None
        replace_file(path, json.dumps(asdict(what)).encode())
        try:
            self.recipe_for(header)
        except Exception:
            path.unlink() if before is None else replace_file(path, before)
            raise
        (self._folder(scan_id) / DONE_FILE).unlink(missing_ok=True)
        end_tries(self._folder(scan_id))

    def _reprocessing(self, scan_id: str) -> Reprocessing:
        path = self._folder(scan_id) / REQUEST_FILE
        try:
            return Reprocessing(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return Reprocessing()
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}): delete it, or reprocess the scan again"
            ) from error

    def stored(self, scan_id: str) -> ImageState:
        """The final image of a scan that is not open, with what was thought of it in the end.

        Raises:
            ScanNotFound: there is no such scan.
            ModelError: there is no recipe yet.
            StoreError: it cannot be read.
        """
        recipe, tile_px = self._settings_recipe(), self.settings.reconstruct.tile_px
        with (
            self.catalogue.lease(scan_id, "reconstruct-export"),
            self.catalogue.open(scan_id) as reader,
        ):
            state = ScanImage(reader, recipe, tile_px).image(final=True)
            told = read_history(reader.directory)
            last = next((e for e in reversed(told) if e.generation == state.generation), None)
            if last is not None:
                state = replace(
                    state, trust=last.figures, verdict=last.verdict, reasons=last.reasons
                )
            return state

    def done(self, scan_id: str) -> bool:
        """Whether the image of a scan was finished."""
        return (self._folder(scan_id) / DONE_FILE).exists()

    def mark_done(self, scan_id: str) -> None:
        """The image of a scan is finished and saved."""
        (self._folder(scan_id) / DONE_FILE).touch()

    def _folder(self, scan_id: str) -> Path:
        return scan_directory(self.settings.data.directory, scan_id)
