"""An image in words: a line, a JSON object, the rows of a table.

Used by ``ptycho-stream watch`` and ``export``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptycho_stream.results import Image

_WORDS = {
    "r_factor": "R {}",
    "r_poisson": "{} of Poisson noise alone",
    "r_free": "R {}",
    "excess_free": "excess {}",
    "frames_judged": "{} frames",
    "frames_unseen": "{} unseen",
    "bad_share": "{} of them bad",
    "resolution_nm": "{} nm",
    "resolution_frames": "from {} frames",
    "coverage_um2": "{} um2",
    "coverage_share": "{} of the rectangle",
    "step_nm": "step {} nm",
}


def summary(image: Image) -> dict[str, Any]:
    """What a program may want to know of an image besides its pixels."""
    return {
        "scan_id": image.scan_id,
        **image.known(),
        "frames": image.frame_numbers.size,
        "shape_yx": list(image.object_yx.shape),
        "origin_yx_m": list(image.origin_yx_m),
        "pixel_yx_m": list(image.pixel_yx_m),
        "latency_ms": round(image.latency_s * 1e3, 3),
        "metadata": dict(image.metadata),
    }


def warning(image: Image) -> str:
    """What to beware of in this image; empty if nothing."""
    if not image.collapsed:
        return ""
    return (
        f"warning: the output of {image.content.model} has collapsed, its patches do not vary as "
        "the frames say they must: use another model, or train this one for the probe"
    )


def line(image: Image, frames_per_s: float) -> str:
    """One image in words."""
    height, width = image.object_yx.shape
    expected = image.counts.get("expected")
    of_all = f" of {expected}" if expected else ""
    return (
        f"{image.scan_id} {image.state}: {image.frame_numbers.size}{of_all} frames, "
        f"{frames_per_s:.0f} frames/s, {height} x {width} px, {layer_words(image)}, generation "
        f"{image.content.generation}, {image.latency_s * 1e3:.1f} ms{_trust_words(image)}"
    )


def layer_words(image: Image) -> str:
    """Where the image comes from."""
    return f"refined, {image.sweeps:.1f} sweeps" if image.layer == "refined" else image.layer


def _trust_words(image: Image) -> str:
    """The figures that matter most and the verdict, to end a line with; empty if none is known."""
    told: list[str] = []
    if (r_factor := image.trust.get("r_factor")) is not None:
        told.append(f"R {r_factor:.4f}")
    if (excess := image.trust.get("excess")) is not None:
        told.append(f"excess {excess:.4f}")
    if (resolution_nm := image.trust.get("resolution_nm")) is not None:
        told.append(f"resolution {resolution_nm:.3g} nm")
    if image.verdict:
        told.append(f"verdict: {image.verdict}")
    return f"; {', '.join(told)}" if told else ""


def trust_rows(image: Image) -> list[tuple[str, str]]:
    """The figures of trust for a table: those that belong together in one row."""
    left = dict(image.trust)

    def taken(*names: str) -> list[str]:
        known = [(name, left.pop(name)) for name in names if name in left]
        return [_WORDS.get(name, name + " {}").format(f"{value:.4g}") for name, value in known]

    rows = [
        ("misfit", ", ".join(taken("r_factor", "r_poisson", "excess", "deviance"))),
        ("held out", ", ".join(taken("r_free", "excess_free"))),
        ("judged", ", ".join(taken("frames_judged", "frames_unseen", "bad_share"))),
        ("resolution", ", ".join(taken("resolution_nm", "resolution_frames"))),
        ("covered", ", ".join(taken("coverage_um2", "coverage_share", "overlap", "step_nm"))),
    ]
    rows += [(name, f"{value:.4g}") for name, value in left.items()]
    return [row for row in rows if row[1]]
