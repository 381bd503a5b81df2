"""Simulated samples, probes, scans, detectors and positioners: for tests, training and demo."""
