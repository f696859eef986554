"""Kernels for the ops, one folder a backend. Importing a folder registers with torch what it can run here."""

from selfgen_kernels.backends import cpu, reference, triton

__all__ = ["cpu", "reference", "triton"]
