"""WADS-dist: distributed training of weakly supervised anomaly detection based on a sparsity prior."""
