"""Kernels compiled for AMD GPUs and executed without one; see README.md."""
