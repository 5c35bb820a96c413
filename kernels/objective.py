"""The objective over one batch: reconstruction (SSIM + L2, Eq 3.2), focal loss (Eq 3.7) and sparsity KL (Eq 3.6).

    L = w_con · [w_ssim · (1 − SSIM(X, X̂)) + w_l2 · MSE(X, X̂)] + w_focal · focal(logits, M) + w_kl · KL(ρ ‖ p̄)

This file is the PyTorch form. Everything is computed in fp32 (fp64 for fp64 inputs) whatever the storage type.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights and readings of the terms; the defaults are the ``wads`` preset's."""

    reconstruction: float = 20.0
    ssim: float = 1.0
    l2: float = 1.0
    focal: float = 1.0
    gamma: float = 2.0
    kl: float = 0.01
    rho: float = 0.1
    kl_form: Literal["area", "pixel"] = "area"


@dataclass(frozen=True)
class ObjectiveTerms:
    """The differentiable ``total`` and the four terms, detached, as batch means (0-d tensors)."""

    total: Tensor
    dissimilarity: Tensor
    mse: Tensor
    focal: Tensor
    kl: Tensor


@lru_cache(maxsize=32)
def _gaussian_band(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length − 10, length] matrix whose product with a column is its valid 11-tap Gaussian blur."""
    taps = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    gauss = torch.exp(-(taps**2) / (2 * SIGMA**2))
    gauss = gauss / gauss.sum()
    band = torch.zeros(length - WINDOW + 1, length, dtype=torch.float64)
    for i in range(len(band)):
        band[i, i : i + WINDOW] = gauss
    return band.to(device, dtype)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of each image (Wang et al. 2004): window 11, σ 1.5, valid windows, data range 1.

    With s = x + y and d = x − y, E[s²] and E[d²] give both E[x² + y²] and E[xy], so four blurs do the work of five; and since
    variances do not change when a plane's mean is subtracted, centring first keeps fp32 from cancelling on bright images.

    Args:
        x, y: [N, C, H, W] in [0, 1], H and W at least 11.

    Returns:
        [N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: the images are smaller than the window.
    """
    height, width = x.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = _gaussian_band(height, dtype, x.device), _gaussian_band(width, dtype, x.device).T

    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        centre_x, centre_y = x.mean((-2, -1), keepdim=True), y.mean((-2, -1), keepdim=True)
        s, d = (x - centre_x) + (y - centre_y), (x - centre_x) - (y - centre_y)
        mean_s, mean_d, square_s, square_d = (rows @ torch.stack([s, d, s * s, d * d]) @ columns).unbind(0)
        var_s, var_d = square_s - mean_s * mean_s, square_d - mean_d * mean_d
        variances, covariance = (var_s + var_d) / 2, (var_s - var_d) / 4
        mu_x, mu_y = (mean_s + mean_d) / 2 + centre_x, (mean_s - mean_d) / 2 + centre_y
        luminance = (2 * mu_x * mu_y + C1) / (mu_x * mu_x + mu_y * mu_y + C1)
        return (luminance * (2 * covariance + C2) / (variances + C2)).mean((-3, -2, -1))


def focal_loss(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Eq 3.7, mean over each image's pixels: −(1 − p_t)^γ · log p_t, p_t the probability of the true class. Returns [N]."""
    logits, mask = _full(logits), mask.to(_full(logits).dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    # 1 − p_t = σ(−logit of the true class), which stays exact where 1 − exp(−CE) would cancel; the clamp keeps the
    # derivative of (1 − p_t)^γ finite at γ < 1.
    miss = torch.sigmoid(logits * (1 - 2 * mask)).clamp_min(1e-12)
    return (miss**gamma * cross_entropy).flatten(1).mean(1)


def sparsity_kl(logits: Tensor, rho: float, form: Literal["area", "pixel"]) -> Tensor:
    """Eq 3.6, KL(Bernoulli(ρ) ‖ Bernoulli(p)), per image: p is the mean predicted mask (``area``), or each pixel's own
    probability and the divergence is averaged (``pixel``). Returns [N]; finite for every finite logit."""
    logits = _full(logits).flatten(1)
    if form == "area":
        log_p, log_q = _log_mean_sigmoid(logits), _log_mean_sigmoid(-logits)
    else:
        log_p, log_q = F.logsigmoid(logits).mean(1), F.logsigmoid(-logits).mean(1)
    return rho * (math.log(rho) - log_p) + (1 - rho) * (math.log(1 - rho) - log_q)


def objective(
    x: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor, weights: ObjectiveWeights
) -> ObjectiveTerms:
    """The weighted sum and its four terms.

    Args:
        x: target of the reconstruction, [N, C, H, W] in [0, 1].
        reconstruction: X̂, like ``x``.
        logits: [N, 1, H, W].
        mask: synthetic truth in {0, 1}, [N, 1, H, W].
    """
    dissimilarity = 1 - ssim(x, reconstruction).mean()
    mse = F.mse_loss(_full(reconstruction), _full(x))
    focal = focal_loss(logits, mask, weights.gamma).mean()
    kl = sparsity_kl(logits, weights.rho, weights.kl_form).mean()
    total = (
        weights.reconstruction * (weights.ssim * dissimilarity + weights.l2 * mse)
        + weights.focal * focal
        + weights.kl * kl
    )
    return ObjectiveTerms(total, dissimilarity.detach(), mse.detach(), focal.detach(), kl.detach())


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_mean_sigmoid(logits: Tensor) -> Tensor:
    """log of the mean of σ over the last dimension, without underflow however negative the logits are."""
    return torch.logsumexp(F.logsigmoid(logits), -1) - math.log(logits.shape[-1])
