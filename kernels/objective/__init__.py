"""(X, X̂, logits, mask) → SSIM + L2 + focal + sparsity KL (Eqs 3.3, 3.6, 3.7), and their gradient."""

from .op import objective
from .reference import (
    SIGMA,
    WINDOW,
    KLDirection,
    KLForm,
    ObjectiveTerms,
    ObjectiveWeights,
    focal_loss,
    sparsity_kl,
    ssim,
)

__all__ = [
    "SIGMA",
    "WINDOW",
    "KLDirection",
    "KLForm",
    "ObjectiveTerms",
    "ObjectiveWeights",
    "focal_loss",
    "objective",
    "sparsity_kl",
    "ssim",
]
