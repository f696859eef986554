"""Kernels for the ops, one folder or file per backend. Importing a folder registers with torch what it can run here."""

from selfgen_kernels.backends import cpu, flash_attn, reference, triton

__all__ = ["cpu", "flash_attn", "reference", "triton"]
