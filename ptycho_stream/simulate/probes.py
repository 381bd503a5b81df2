"""Probes as beamlines make them: zone plates, mirrors, pinholes, diffusers, many modes.

By name or drawn from a mixture. Used by the scan simulator, ``ptycho-stream simulate`` and,
through them, by training.
"""

from dataclasses import dataclass

import numpy as np

from ptycho_stream.errors import SettingsError
from ptycho_stream.physics.optics import Real, Waves, ZonePlate, frequencies, to_sample
from ptycho_stream.physics.optics_probe import probe_behind
from ptycho_stream.physics.probe import Probe
from ptycho_stream.simulate.optics import OPTICS, smooth

PROBE_KINDS: tuple[str, ...] = (*OPTICS, "random")
"""Names that ``probe_of_kind`` takes; ``random`` is one of WIDE_PROBES."""


@dataclass(frozen=True)
class ProbeMix:
    """What random probes are made of.

    Attributes:
        kinds: names of optics and their shares, which sum to 1.
    """

    kinds: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for name, _ in self.kinds:
            if name not in OPTICS:
                raise SettingsError(f"there is no probe {name!r}; there are {', '.join(OPTICS)}")
        if abs(sum(share for _, share in self.kinds) - 1) > 1e-9:
            raise SettingsError(f"the shares of a mixture of probes sum to 1, not {self.kinds}")

    def draw(self, rng: np.random.Generator) -> str:
        """The name of one kind."""
        chance = rng.random()
        for name, share in self.kinds[:-1]:
            if chance < share:
                return name
            chance -= share
        return self.kinds[-1][0]


WIDE_PROBES = ProbeMix(
    (
        *(("zone-plate", 0.4), ("gaussian", 0.12), ("mirrors", 0.14)),
        *(("zernike", 0.14), ("coded", 0.1), ("pinhole", 0.1)),
    )
)
"""All kinds."""


def random_probe(
    rng: np.random.Generator,
    size_px: int,
    *,
    modes: int = 1,
    photons: float = 1e6,
    mix: ProbeMix = WIDE_PROBES,
) -> Probe:
    """Draw a probe of a mixture; it fills 15 to 65 per cent of the window's width.

    Args:
        rng: the only source of randomness.
        size_px: window size N.
        modes: incoherent modes; those after the first share 2 to 30 per cent of the photons.
        photons: of the unattenuated beam, all modes together.
        mix: the kinds and their shares.

    Returns:
        The probe, centred on (N - 1) / 2 give or take 3 per cent of the window.
    """
    radius = rng.uniform(0.12, 0.36)
    optic = OPTICS[mix.draw(rng)](rng, size_px, radius)
    return _with_modes(rng, optic, modes, photons)


def probe_of_kind(
    rng: np.random.Generator, size_px: int, kind: str, *, modes: int = 1, photons: float = 1e6
) -> Probe:
    """Draw a probe of one kind; the arguments are those of :func:`random_probe`.

    Raises:
        SettingsError: there is no such kind.
    """
    if kind not in PROBE_KINDS:
        raise SettingsError(f"there is no probe {kind!r}; there are {', '.join(PROBE_KINDS)}")
    mix = WIDE_PROBES if kind == "random" else ProbeMix(((kind, 1.0),))
    return random_probe(rng, size_px, modes=modes, photons=photons, mix=mix)


def zone_plate_probe(size_px: int, photons: float = 1e6, plate: ZonePlate | None = None) -> Probe:
    """A defocused zone plate with a central stop, without any randomness.

    Args:
        size_px: window size N.
        photons: of the unattenuated beam.
        plate: the optic; by default one that makes a ring about half as wide as the window.

    Returns:
        One mode, centred on (N - 1) / 2; the same for every call.

    Raises:
        ProbeError: the beam does not fit into the window.
    """
    return probe_behind(plate or ZonePlate.standard(size_px), size_px, photons)


def _with_modes(rng: np.random.Generator, optic: Waves, modes: int, photons: float) -> Probe:
    """The optic's wave at the sample, and partners that share some of its photons."""
    size_px = optic.shape[-1]
    centre_yx_px = (size_px - 1) / 2 + rng.uniform(-0.03, 0.03, 2) * size_px
    first = to_sample(optic, centre_yx_px)
    waves = [first]
    shares = [1.0]
    if modes > 1:
        rest = rng.uniform(0.02, 0.3)
        parts = np.sort(rng.dirichlet(np.full(modes - 1, 2.0)))[::-1]
        waves += [_partner(rng, first, optic, centre_yx_px) for _ in parts]
        shares = [1 - rest, *(rest * parts)]
    powers = [float((w.real**2 + w.imag**2).sum()) for w in waves]
    scaled = [w * np.sqrt(photons * s / p) for w, s, p in zip(waves, shares, powers, strict=True)]
    return Probe(_orthogonal(np.stack(scaled)))


def _partner(
    rng: np.random.Generator,
    first: Waves,
    optic: Waves,
    centre_yx_px: Real,
) -> Waves:
    """A weaker mode: a vibrating or partly coherent beam, or one whose optic is speckled."""
    size_px = optic.shape[-1]
    ky, kx = frequencies(size_px)
    turn = rng.uniform(0, 2 * np.pi)
    axis = np.cos(turn) * ky + np.sin(turn) * kx
    kind = rng.random()
    if kind < 0.4:
        return to_sample(optic * axis, centre_yx_px)
    if kind < 0.6:
        index = np.arange(size_px, dtype=np.float64)
        y, x = index[:, None] - centre_yx_px[0], index[None, :] - centre_yx_px[1]
        return first * (np.cos(turn) * y + np.sin(turn) * x)
    speckle = smooth(rng, size_px, rng.uniform(2, 12)) + 1j * smooth(
        rng, size_px, rng.uniform(2, 12)
    )
    return to_sample(optic * speckle, centre_yx_px)


def _orthogonal(waves: Waves) -> Waves:
    """Mix the modes so that they are orthogonal, strongest first; incoherent sums do not change."""
    if len(waves) == 1:
        return waves.astype(np.complex64)
    flat = waves.reshape(waves.shape[0], -1)
    _, mixing = np.linalg.eigh(flat.conj() @ flat.T)
    mixed = mixing[:, ::-1].T @ flat
    return mixed.reshape(waves.shape).astype(np.complex64)
