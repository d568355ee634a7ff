"""The perturbation rules of companion.perturb: each maps gradients to a perturbation in one formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["AMP", "ASAM", "SAM", "Random", "Rule", "norm_of_all", "norms_of_each"]

_TINY = 1e-12  # of a norm that is divided by
BALLS = ("global", "per_tensor")


def norms_of_each(tensors: Sequence[Tensor], stacked: bool) -> Tensor:
    """The 2-norm of each of L tensors, in float32 at least: ``(L,)``, or ``(L, S)`` for stacked models."""
    flat = [t.reshape(len(t), -1) for t in tensors] if stacked else []
    norms = [t.norm(dim=1) for t in flat] if stacked else torch._foreach_norm(tensors)
    return torch.stack([n.to(torch.promote_types(n.dtype, torch.float32)) for n in norms])


def norm_of_all(tensors: Sequence[Tensor], stacked: bool) -> Tensor:
    """The 2-norm of all tensors together: a scalar, or ``(S,)``."""
    return norms_of_each(tensors, stacked).norm(dim=0)


def _scaled(
    tensors: Sequence[Tensor], factor: Tensor, stacked: bool, per_tensor: bool = False
) -> list[Tensor]:
    """Each tensor times ``factor``, which is ``()`` or ``(S,)``, with a leading L if ``per_tensor``."""
    if not (stacked or per_tensor):
        return list(torch._foreach_mul(tensors, factor))
    factors = factor if per_tensor else [factor] * len(tensors)
    if stacked:
        factors = [f.to(t.dtype).view(-1, *[1] * (t.ndim - 1)) for f, t in zip(factors, tensors, strict=True)]
    return [t * f for t, f in zip(tensors, factors, strict=True)]


class _Rule:
    """What the rules share: their numbers are checked, and one of them, ``radius``, is the ball's."""

    radius: ClassVar[str] = "eps"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | float | int) and not bool((torch.as_tensor(value) >= 0).all()):
                raise ValueError(f"{type(self).__name__}: {field.name} must not be below zero, got {value}")
        if getattr(self, "ball", BALLS[0]) not in BALLS:
            raise ValueError(f"unknown ball {self.ball!r}: choose one of {', '.join(BALLS)}")


@dataclass(frozen=True)
class AMP(_Rule):
    """Delta <- Delta + zeta g, scaled back onto the ball of radius eps when it has left it.

    ``eps``: radius; ``lr``: zeta, of the ascent, not normalised; ``ball``: ``"global"``, one 2-norm over all
    tensors (the paper), or ``"per_tensor"``, each tensor clipped to eps by itself (the official code). A rule
    maps gradients (a list of tensors) to perturbations of the same shapes. ``weights``: at theta, which only
    ASAM reads; ``delta``: the previous perturbation, None at the first step. Stacked models may each have a
    radius of their own, eps ``(S,)``. All rules raise ``ValueError`` for a number below zero.
    Source: Zheng, Zhang and Mao 2021, algorithm 1.
    """

    eps: float | Tensor
    lr: float = 1.0
    ball: str = "global"

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        delta: Sequence[Tensor] | None = None,
        *,
        stacked: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        # From Delta = 0 the scale goes into the factor: a pass less over the weights.
        up, scale = grads, self.lr
        if delta is not None:
            up, scale = torch._foreach_add(torch._foreach_mul(grads, self.lr), delta), 1.0
        apart = self.ball == "per_tensor"
        norm = scale * (norms_of_each if apart else norm_of_all)(up, stacked)
        return _scaled(up, scale * (self.eps / norm.clamp(min=_TINY)).clamp(max=1), stacked, apart)


@dataclass(frozen=True)
class SAM(_Rule):
    """``Delta = rho g / |g|``: always on the sphere, whatever the gradient's length. A further ascent step
    starts again from theta, with the gradient at theta + Delta. Source: Foret et al. 2021, eq. 2 with p =
    2."""

    rho: float | Tensor
    radius: ClassVar[str] = "rho"

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        delta: Sequence[Tensor] | None = None,
        *,
        stacked: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        return _scaled(grads, self.rho / norm_of_all(grads, stacked).clamp(min=_TINY), stacked)


@dataclass(frozen=True)
class ASAM(_Rule):
    """``Delta = rho T^2 g / |T g|`` with ``T = |theta| + eta``: a ball that scales with the weights.

    T is applied to every tensor; the authors' code leaves biases at T = 1. Source: Kwon et al. 2021.
    """

    rho: float | Tensor
    eta: float = 0.01
    radius: ClassVar[str] = "rho"

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        delta: Sequence[Tensor] | None = None,
        *,
        stacked: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        if weights is None:
            raise ValueError("ASAM scales with the weights: pass them")
        scale = torch._foreach_add(torch._foreach_abs(weights), self.eta)
        scaled = torch._foreach_mul(scale, grads)  # T g
        factor = self.rho / norm_of_all(scaled, stacked).clamp(min=_TINY)
        return _scaled(torch._foreach_mul(scale, scaled), factor, stacked)


@dataclass(frozen=True)
class Random(_Rule):
    """Delta in a uniformly random direction, of norm eps: the control that asks whether direction matters.

    With ``lr`` its norm is ``min(eps, lr |g|)``, as long as AMP's and as blind as ever.
    """

    eps: float | Tensor
    lr: float | None = None

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        delta: Sequence[Tensor] | None = None,
        *,
        stacked: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        noise = [torch.empty_like(g).normal_(generator=generator) for g in grads]
        norm = norm_of_all(noise, stacked).clamp(min=_TINY)
        length = self.eps if self.lr is None else (self.lr * norm_of_all(grads, stacked)).clamp(max=self.eps)
        return _scaled(noise, length / norm, stacked)


#: Any of the four ways to choose Delta.
Rule = AMP | SAM | ASAM | Random
