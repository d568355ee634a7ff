"""How far a classifier's probabilities can be trusted: hard-label NLL, error, and calibration error.

All take logits ``(*stack, N, K)`` and labels ``(N,)`` or ``(*stack, N)`` and return ``(*stack,)`` in double
precision. NLL is that of the true label, whatever loss the classifier was trained with: the smoothed or mixed
training loss has a floor above zero and is no measure to compare methods by.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["calibration_error", "error_rate", "hard_nll", "reliability"]


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images whose largest logit is not that of the label."""
    return (logits.argmax(-1) != labels).double().mean(-1)


def hard_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log p(label), in nats."""
    logp = logits.double().log_softmax(-1)
    return -logp.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1).mean(-1)


def reliability(
    logits: Tensor, labels: Tensor, bins: int = 15, adaptive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of images, mean confidence and accuracy in each bin of confidence: three ``(*stack, bins)``.

    Bins are of equal width on [0, 1], a value on an edge in the lower one, or of equal counts if
    ``adaptive``. An empty bin has share, confidence and accuracy 0. Raises ``ValueError`` for no bins, or
    more adaptive bins than images.
    """
    count = logits.shape[-2]
    if bins < 1 or (adaptive and bins > count):
        raise ValueError(f"{bins} bins for {count} images: bins must be at least 1, adaptive ones not empty")
    confidence, answer = logits.double().softmax(-1).max(-1)  # (*stack, N)
    right = (answer == labels).double()
    if adaptive:
        rank = confidence.argsort(-1).argsort(-1)
        place = rank * bins // count
    else:
        place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    zero = torch.zeros(*confidence.shape[:-1], bins, dtype=torch.double, device=logits.device)
    share = zero.scatter_add(-1, place, torch.full_like(confidence, 1 / count))
    of_all = share.clamp(min=1e-300) * count
    return (
        share,
        zero.scatter_add(-1, place, confidence) / of_all,
        zero.scatter_add(-1, place, right) / of_all,
    )


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15, adaptive: bool = False) -> Tensor:
    """ECE: the sum over bins of ``share * |accuracy - confidence|``; adaptive ECE with bins of equal counts.

    Biased upward by the noise of each bin's accuracy: compare at equal N and equal bins only. Source: Guo et
    al. 2017, eq. 3; adaptive bins: Nixon et al. 2019.
    """
    share, confidence, accuracy = reliability(logits, labels, bins, adaptive)
    return (share * (accuracy - confidence).abs()).sum(-1)
