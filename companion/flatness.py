"""How flat a minimum is: the risk along random directions, on a ball's worst side, and its curvature.

For S models in stacked weights (every parameter ``(S, ...)``), each measured by itself. ``risk`` maps nothing
to ``(S,)`` losses at the present weights; it has to be a fixed function of them, so put the network in eval
mode, with batch-norm statistics of the unperturbed weights. No measure here is free of the weights' scale but
the first; see Dinh et al. 2017 on how little the others mean across networks of different scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from companion._weight_rules import AMP, SAM, norm_of_all
from companion.perturb import WeightPerturbation

__all__ = ["filter_normalised", "risk_along", "top_eigenvalue", "worst_rise"]

Risk = Callable[[], Tensor]


def filter_normalised(net: nn.Module, generator: torch.Generator | None = None) -> list[Tensor]:
    """A random direction in which each filter is as long as the network's own, a tensor a parameter.

    A filter is what feeds one output: a column of a weight ``(S, in, out)``. Biases and batch-norm parameters
    stay where they are. Source: Li et al. 2018, section 4.
    """
    directions = []
    for p in net.parameters():
        noise = torch.empty_like(p).normal_(generator=generator)
        if p.ndim == 3 and p.shape[1] > 1:  # (S, in, out); a bias is (S, 1, out)
            noise *= p.detach().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        else:
            noise.zero_()
        directions.append(noise)
    return directions


@torch.no_grad()
def risk_along(net: nn.Module, risk: Risk, direction: Sequence[Tensor], steps: Sequence[float]) -> Tensor:
    """The risks at theta + t d for each t of ``steps``, ``(len(steps), S)``; theta is put back."""
    rows = []
    for t in steps:
        # A ball without end: Delta is t d itself.
        rule = AMP(float("inf"), abs(t))
        given = [d if t >= 0 else -d for d in direction]
        with WeightPerturbation(net.parameters(), rule, grads=given, stacked=True):
            rows.append(risk())
    return torch.stack(rows)


def worst_rise(net: nn.Module, risk: Risk, radius: float) -> Tensor:
    """L(theta + Delta) - L(theta), ``Delta = radius g/|g|``, the worst of a ball to first order: ``(S,)``."""
    params = list(net.parameters())
    here = risk()
    grads = torch.autograd.grad(here.sum(), params)
    with torch.no_grad(), WeightPerturbation(params, SAM(radius), grads=grads, stacked=True):
        return risk() - here.detach()


def top_eigenvalue(
    net: nn.Module, risk: Risk, iterations: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """The eigenvalue of largest modulus of the Hessian of the risk, by power iteration: ``(S,)``.

    A Hessian-vector product an iteration; all models at once, since their Hessians share no entry. The
    Rayleigh quotient of the last vector approaches the eigenvalue from below.
    """
    params = list(net.parameters())
    grads = torch.autograd.grad(risk().sum(), params, create_graph=True)
    v = [torch.empty_like(p).normal_(generator=generator) for p in params]
    value = torch.zeros(params[0].shape[0], device=params[0].device)
    for _ in range(iterations):
        scale = 1 / norm_of_all(v, True)
        v = [part * scale.view(-1, *[1] * (part.ndim - 1)) for part in v]
        product = torch.autograd.grad(grads, params, v, retain_graph=True)
        value = sum((a * b).flatten(1).sum(1) for a, b in zip(v, product, strict=True))
        v = list(product)
    return value.detach()
