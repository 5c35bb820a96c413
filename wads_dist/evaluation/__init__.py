"""Scores and decisions: metrics, thresholds, calibration, baselines."""
