"""The objective over one batch: reconstruction (SSIM + L2, Eq 3.3), focal loss (Eq 3.7) and sparsity KL (Eq 3.6).

    L = w_con · [w_ssim · (1 − SSIM(X, X̂)) + w_l2 · MSE(X, X̂)] + w_focal · focal(logits, truth) + w_kl · KL(M ‖ ρ)

M is the predicted mask, σ(logits): each pixel's (``pixel``) or its mean over the image (``area``).

This is the PyTorch form, which defines the meaning. Everything is computed in fp32 (fp64 for fp64 inputs) whatever the
storage type.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
TAPS_SUM = math.fsum(math.exp(-((k - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for k in range(WINDOW))

KLForm = Literal["area", "pixel"]
KLDirection = Literal["printed", "reverse"]


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
    kl_form: KLForm = "area"
    kl_direction: KLDirection = "printed"


DEFAULT = ObjectiveWeights()


@dataclass(frozen=True)
class ObjectiveTerms:
    """The differentiable ``total``; the four terms, detached, as batch means (0-d) and ``per_image`` [4, N] in their order."""

    total: Tensor
    dissimilarity: Tensor
    mse: Tensor
    focal: Tensor
    kl: Tensor
    per_image: Tensor


def _gaussian_band(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length − 10, length] matrix whose product with a column is its valid 11-tap Gaussian blur.

    Made anew each time, on the device: a cached one may be an inference tensor, with which nothing can be trained, and
    ``torch.compile`` does not see caches.
    """
    k = torch.arange(length, device=device) - torch.arange(length - WINDOW + 1, device=device)[:, None]
    taps = torch.exp(-((k - WINDOW // 2).double() ** 2) / (2 * SIGMA**2)) / TAPS_SUM
    return torch.where((k >= 0) & (k < WINDOW), taps, 0).to(dtype)


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
    check_window(height, width)
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


def sparsity_kl(logits: Tensor, rho: float, form: KLForm, direction: KLDirection = "printed") -> Tensor:
    """Eq 3.6 of each image, as a divergence of Bernoulli distributions. Returns [N]; finite for every finite logit.

    Args:
        logits: [N, ...]; M = σ(logits).
        form: ``area``: of the image's mean of M; ``pixel``: of every pixel's M, averaged.
        direction: ``printed``: KL(M ‖ ρ) = M·log(M/ρ) + (1 − M)·log((1 − M)/(1 − ρ)), which lies between 0 and
            −log ρ or −log(1 − ρ), whichever is larger; ``reverse``: KL(ρ ‖ M), which has no bound.
    """
    logits = _full(logits).flatten(1)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    if form == "area":
        log_p, log_q = _log_mean_exp(log_p), _log_mean_exp(log_q)
    if direction == "printed":
        kl = log_p.exp() * (log_p - math.log(rho)) + log_q.exp() * (log_q - math.log(1 - rho))
    else:
        kl = rho * (math.log(rho) - log_p) + (1 - rho) * (math.log(1 - rho) - log_q)
    return kl if form == "area" else kl.mean(1)


def terms_of_each_image(
    x: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor, weights: ObjectiveWeights
) -> Tensor:
    """The four terms of each image, [4, N], differentiable."""
    mse = (_full(reconstruction) - _full(x)).square().mean((1, 2, 3))
    focal = focal_loss(logits, mask, weights.gamma)
    kl = sparsity_kl(logits, weights.rho, weights.kl_form, weights.kl_direction)
    return torch.stack([1 - ssim(x, reconstruction), mse, focal, kl])


def weighted(means: Tensor, weights: ObjectiveWeights) -> Tensor:
    dissimilarity, mse, focal, kl = means.unbind()
    reconstruction = weights.ssim * dissimilarity + weights.l2 * mse
    return weights.reconstruction * reconstruction + weights.focal * focal + weights.kl * kl


def check_window(height: int, width: int) -> None:
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}")


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def computed_in(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dense_format(image: Tensor) -> torch.memory_format:
    """The memory format of the native kernels' copy of ``image`` [N, C, H, W], if they need one, and of its gradient."""
    by_pixel = not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if by_pixel else torch.contiguous_format


def _log_mean_exp(values: Tensor) -> Tensor:
    """log of the mean of exp over the last dimension, without underflow however negative the values are."""
    return torch.logsumexp(values, -1) - math.log(values.shape[-1])
