"""Prediction, stitching and the growing image of a scan."""
