"""The optics every reconstruction shares: probe modes, far-field forward model, noise models.

Used by the networks, the predictor, refinement, trust and the simulators. One owner for the
normalisation (ortho FFT, photons) and for the signs of shifts.
"""
