"""Verification: metrics, trials, calibration, reports, plots."""
