"""Mechanism and accountant: noise, epsilon, calibration. Nothing here may import a model."""
