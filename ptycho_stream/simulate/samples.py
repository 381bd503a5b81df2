"""Synthetic samples: complex transmissions of many kinds, by name or drawn from a mixture.

The kinds are chosen so that a network trained on them meets sharp and soft edges, flat areas, fine
and coarse structure, and phase with or without matching absorption. Used by the scan simulator,
``ptycho-stream simulate`` and, through them, by training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import SettingsError
from ptycho_stream.simulate.grid import (
    Field,
    Grid,
    Shape,
    grid_of,
    inside,
    radius_px,
    shape_of,
    unit_range,
)
from ptycho_stream.simulate.shapes import bars, circuits, edges, leaves, polygons, spokes
from ptycho_stream.simulate.solids import polyhedra
from ptycho_stream.simulate.textures import cells, perlin, power_law, simplex

Relation = Literal["matching", "unrelated", "mixed"]
"""Absorption follows the phase, a density of its own, or the mean of both."""


def _showcase(rng: np.random.Generator, grid: Grid) -> Field:
    """A resolution target among grains: something to look at, with detail at every scale."""
    grains = leaves(rng, grid, number=260, opaque=True)
    target = spokes(rng, grid, off_centre=0.0)
    disc = inside(radius_px(*grid) - np.float32(0.36 * min(shape_of(grid))), 1.5)
    return disc * target + (1 - disc) * grains


def _procedural(rng: np.random.Generator, grid: Grid) -> Field:
    """Layers of other kinds, added, multiplied, laid over or showing through holes."""
    out = unit_range(_LAYERS[rng.integers(len(_LAYERS))](rng, grid))
    for _ in range(rng.integers(1, 4)):
        layer = unit_range(_LAYERS[rng.integers(len(_LAYERS))](rng, grid))
        how = rng.integers(4)
        if how == 0:
            out = out + np.float32(rng.uniform(0.3, 1)) * layer
        elif how == 1:
            out = out * (np.float32(0.3) + layer)
        elif how == 2:
            out = np.maximum(out, layer)
        else:
            hole = inside(np.float32(8) * (power_law(rng, grid) - np.float32(0.3)), 2.0)
            out = out + hole * (layer - out)
    return out


_LAYERS = (bars, leaves, polygons, edges, circuits, cells, power_law, perlin, polyhedra)

SAMPLE_KINDS: Mapping[str, Callable[[np.random.Generator, Grid], Field]] = MappingProxyType(
    {
        "showcase": _showcase,
        "bars": bars,
        "spokes": spokes,
        "leaves": leaves,
        "polygons": polygons,
        "edges": edges,
        "circuits": circuits,
        "cells": cells,
        "power-law": power_law,
        "perlin": perlin,
        "simplex": simplex,
        "polyhedra": polyhedra,
        "procedural": _procedural,
    }
)
"""Every kind by name: what draws its density on a grid (any range)."""


def _known(kind: str) -> Callable[[np.random.Generator, Grid], Field]:
    if kind not in SAMPLE_KINDS:
        raise SettingsError(f"there is no sample {kind!r}; there are {', '.join(SAMPLE_KINDS)}")
    return SAMPLE_KINDS[kind]


@dataclass(frozen=True)
class SampleMix:
    """What random samples are made of.

    Attributes:
        kinds: names of SAMPLE_KINDS, all as likely; a name that is there twice is twice as likely.
        blended: share of densities that mix two kinds.
        matching: share of samples whose absorption follows the phase.
        unrelated: share whose absorption has a density of its own; the rest mixes both.
        phase_rad: lowest and highest phase range of most samples.
        strong: share of strong samples, and ``strong_phase_rad`` their phase ranges.
        weak: share of very weak ones, and ``weak_phase_rad`` their phase ranges.
        absorbing: share of samples whose largest -ln|T| is 0.3 to 0.9; of the others 0 to 0.3.
    """

    kinds: tuple[str, ...]
    blended: float = 0.35
    matching: float = 0.5
    unrelated: float = 0.25
    phase_rad: tuple[float, float] = (0.2, 1.8)
    strong: float = 0.2
    strong_phase_rad: tuple[float, float] = (1.6, 3.2)
    weak: float = 0.0
    weak_phase_rad: tuple[float, float] = (0.03, 0.2)
    absorbing: float = 0.15

    def __post_init__(self) -> None:
        for name in self.kinds:
            _known(name)
        if not self.kinds:
            raise SettingsError("a mixture of samples names no kind")


WIDE_SAMPLES = SampleMix(
    (
        *("bars", "bars", "spokes", "spokes", "leaves", "leaves", "leaves"),
        *("polygons", "edges", "circuits", "circuits", "cells"),
        *("power-law", "perlin", "simplex", "polyhedra", "procedural", "procedural"),
    ),
    blended=0.25,
    strong=0.1,
    weak=0.05,
)
"""All kinds."""


def random_sample(
    rng: np.random.Generator, shape_yx_px: Shape, mix: SampleMix = WIDE_SAMPLES
) -> NDArray[np.complex64]:
    """Draw one sample of a mixture.

    Args:
        rng: the only source of randomness.
        shape_yx_px: rows and columns.
        mix: the kinds and their shares.

    Returns:
        complex64 transmission, |T| in [0.4, 1].
    """
    phase = random_field(rng, shape_yx_px, mix)
    kind = rng.random()
    if kind < mix.matching:
        density = phase
    elif kind < mix.matching + mix.unrelated:
        density = random_field(rng, shape_yx_px, mix)
    else:
        density = np.float32(0.5) * (phase + random_field(rng, shape_yx_px, mix))
    depth = _depth_rad(rng, mix)
    absorption = rng.uniform(0.3, 0.9) if rng.random() < mix.absorbing else rng.uniform(0.0, 0.3)
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return _transmission(phase - phase.mean(), density, sign * depth, absorption)


def _depth_rad(rng: np.random.Generator, mix: SampleMix) -> float:
    # Most hard X-ray samples are weak phase objects; a fifth is strong, to pi/2 and beyond.
    low, high = mix.strong_phase_rad if rng.random() < mix.strong else mix.phase_rad
    if mix.weak and rng.random() < mix.weak:
        low, high = mix.weak_phase_rad
    return rng.uniform(low, high)


def random_field(
    rng: np.random.Generator, shape_yx_px: Shape, mix: SampleMix = WIDE_SAMPLES
) -> Field:
    """Draw one projected-density map with values in [0, 1], float32, of a kind of the mixture."""
    grid = grid_of(shape_yx_px)
    field = SAMPLE_KINDS[mix.kinds[rng.integers(len(mix.kinds))]](rng, grid)
    if rng.random() < mix.blended:
        other = SAMPLE_KINDS[mix.kinds[rng.integers(len(mix.kinds))]](rng, grid)
        share = np.float32(rng.uniform(0.1, 0.5))
        field = (1 - share) * field + share * other
    return unit_range(field)


def sample_of_kind(
    rng: np.random.Generator,
    shape_yx_px: Shape,
    kind: str,
    *,
    phase_rad: float = 1.0,
    absorption: float = 0.2,
    relation: Relation = "matching",
) -> NDArray[np.complex64]:
    """Draw a sample of one kind with a told strength.

    Args:
        rng: the only source of randomness.
        shape_yx_px: rows and columns.
        kind: a name of SAMPLE_KINDS, or ``random`` for one of WIDE_SAMPLES with a strength of its
            own.
        phase_rad: range of the phase, 0 to this; negative values retard.
        absorption: largest -ln|T|.
        relation: of absorption and phase.

    Returns:
        complex64 transmission, |T| in [exp(-absorption), 1].

    Raises:
        SettingsError: there is no such kind, or the strength is no number.
    """
    if kind == "random":
        return random_sample(rng, shape_yx_px, WIDE_SAMPLES)
    draw = _known(kind)
    if not (np.isfinite(phase_rad) and 0 <= absorption < np.inf):
        raise SettingsError(
            f"a sample of phase {phase_rad} rad and absorption {absorption} cannot be drawn: give "
            "a phase range in radians and an absorption of 0 or more"
        )
    grid = grid_of(shape_yx_px)
    phase = unit_range(draw(rng, grid))
    density = phase
    if relation != "matching":
        density = unit_range(draw(rng, grid))
        if relation == "mixed":
            density = np.float32(0.5) * (phase + density)
    return _transmission(phase, density, phase_rad, absorption)


def showcase_sample(rng: np.random.Generator, shape_yx_px: Shape) -> NDArray[np.complex64]:
    """The sample of the demo: kind ``showcase``, phase about 1 rad, absorption to 20 per cent."""
    density = _showcase(rng, grid_of(shape_yx_px))
    return _transmission(density, density, 1.0, 0.2)


def _transmission(
    phase: Field, density: Field, phase_rad: float, absorption: float
) -> NDArray[np.complex64]:
    """exp(-absorption * density + i phase_rad * phase), complex64.

    By parts: numpy's complex exponential takes four times as long.
    """
    angle = np.float32(phase_rad) * phase.astype(np.float32, copy=False)
    modulus = np.exp(np.float32(-absorption) * density.astype(np.float32, copy=False))
    out = np.empty(angle.shape, np.complex64)
    np.multiply(modulus, np.cos(angle), out=out.real)
    np.multiply(modulus, np.sin(angle), out=out.imag)
    return out
