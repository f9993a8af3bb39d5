"""Measurements of a model on a device: speed, profiles, agreement with a reference, the fastest kernels."""
