"""Which scan of the reconstructed detector a stored detector's scan belongs to.

Used by the ingest of stored detectors, which knows the other detector's scans from the store alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import StoredDetector


def scan_beside(
    header: ScanHeader, headers: Sequence[ScanHeader], detector: StoredDetector
) -> str | None:
    """The scan that the one of ``header`` belongs to; None: there is none, or not yet.

    It is the one that was armed nearest in time (with ``match = "series"``: of those with the same
    series), within the window, was not over before this one began, and has no other scan of this
    detector.

    Args:
        header: of a scan of a stored detector.
        headers: of all scans in the store.
        detector: how to match.
    """
    taken = {
        other.beside
        for other in headers
        if other.detector == header.detector and other.scan_id != header.scan_id
    }
    candidates = [
        (abs(other.created_ns - header.created_ns), other.scan_id)
        for other in headers
        if not other.detector
        and other.scan_id not in taken
        and (other.ended_ns is None or other.ended_ns >= header.created_ns)
        and not (other.state == "aborted" and not other.counts.get("frames"))
        and (detector.match == "time" or other.series == header.series)
    ]
    nearest_ns, scan_id = min(candidates, default=(0, ""))
    return scan_id if scan_id and nearest_ns <= detector.match_window_s * 1e9 else None
