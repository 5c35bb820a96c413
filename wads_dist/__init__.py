"""WADS-dist: distributed training of weakly supervised anomaly detection based on a sparsity prior."""

__version__ = "0.1.0"
