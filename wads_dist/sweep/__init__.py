"""Grids, seeds, ablations, Slurm arrays."""
