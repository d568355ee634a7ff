"""The path from a Gaussian to a target, and chains that climb it: what ``ais`` is made of.

Public names are re-exported by ``companion.normaliser``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.energies import Energy, energy_and_gradient
from companion.langevin import DivergenceError, Gauges, _Watch

__all__ = ["Ends", "Ladder", "Walk"]


@dataclass(frozen=True)
class Ladder:
    """The rungs from the start (b = 0) to the target (b = 1), fixed before any weight is counted.

    betas: ``(K + 1,)``, from 0 to 1 and rising. step_size: MALA's eps at each, ``(K + 1,)``, or, one a
    stacked model, ``(K + 1, S)``; the first and the last are never used. Raises ``ValueError`` for anything
    else.
    """

    betas: Tensor
    step_size: Tensor

    def __post_init__(self) -> None:
        b, eps = self.betas, self.step_size
        if b.ndim != 1 or len(b) < 2 or b[0] != 0 or b[-1] != 1 or not bool((b.diff() > 0).all()):
            raise ValueError("a ladder's betas must rise from 0 to 1 in at least 1 rung")
        if eps.ndim not in (1, 2) or len(eps) != len(b) or not bool((eps > 0).all()):
            raise ValueError(f"a ladder of {len(b)} betas needs as many positive step sizes")

    @classmethod
    def even(cls, rungs: int, step_size: float | Callable[[float], float]) -> Ladder:
        """``rungs`` equal differences in b; ``step_size`` is one number or a function of b."""
        if rungs < 1:
            raise ValueError(f"rungs must be at least 1, got {rungs}")
        betas = torch.linspace(0, 1, rungs + 1, dtype=torch.float64)
        eps = [step_size(b) if callable(step_size) else step_size for b in betas.tolist()]
        return cls(betas, torch.tensor(eps, dtype=torch.float64))


@dataclass(frozen=True)
class Ends:
    """Both ends of the path: the Gaussian N(mean, std^2), and the target."""

    energy: Energy
    temperature: float | Tensor  # a tensor is (S, 1), beside values
    base_std: float | None
    mean: float | Tensor
    std: float | Tensor
    batch: tuple[int, ...]  # (*stack, chains)
    shape: tuple[int, ...]
    like: Tensor  # of the states' dtype and device

    @classmethod
    def build(
        cls,
        energy: Energy,
        shape: tuple[int, ...],
        chains: int,
        generator: torch.Generator | None,
        *,
        temperature: float | Tensor,
        base_std: float | None,
        start_std: float | Tensor | None,
        start_mean: float | Tensor,
        stack: int | None,
        start: Tensor | None = None,
    ) -> Ends:
        """The ends as the arguments of ``ais`` describe them; ``ValueError`` for what they cannot be."""
        std = base_std if start_std is None else start_std
        if std is None:
            raise ValueError(
                "without base_std the path needs a start_std: it would start from nothing proper"
            )
        for name, value in (("temperature", temperature), ("base_std", base_std), ("start_std", std)):
            if value is not None and not bool((torch.as_tensor(value) > 0).all()):
                raise ValueError(f"{name} must be positive, got {value}")
        like = next(iter(energy.parameters()), None) if isinstance(energy, nn.Module) else None
        if like is None:
            like = torch.empty(0, device=None if generator is None else generator.device)
        lead = () if stack is None else (stack,)
        if start is not None:
            like, chains = start, start.shape[len(lead)] if start.ndim > len(lead) else 0
            if start.shape != (*lead, chains, *shape) or not start.is_floating_point():
                raise ValueError(f"start must be floating, {(*lead, 'n', *shape)}, got {tuple(start.shape)}")
        if chains < 2:
            raise ValueError(f"an error bar needs at least 2 chains, got {chains}")
        mean, std = (v.to(like) if isinstance(v, Tensor) else float(v) for v in (start_mean, std))
        batch = (*lead, chains)
        if isinstance(temperature, Tensor) and temperature.ndim and temperature.shape != lead:
            raise ValueError(f"temperature is a number or {lead}, got {tuple(temperature.shape)}")
        temperature = lift(temperature, len(batch), like)
        return cls(energy, temperature, base_std, mean, std, batch, tuple(shape), like)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """x_0 ~ N(mean, std^2 I), the start of every chain: ``(*stack, chains, *shape)``."""
        x = self.like.new_empty(*self.batch, *self.shape).normal_(generator=generator)
        return x * self.std + self.mean

    def log_normaliser(self) -> Tensor:
        """log Z_0 of ``exp(-|x - m|^2 / 2 s^2)``, ``(*stack)``, in double precision."""
        log_std = torch.as_tensor(self.std, dtype=torch.float64, device=self.like.device).log()
        each = (log_std + 0.5 * math.log(2 * math.pi)).expand(*self.batch[:-1], 1, *self.shape)
        return each.reshape(*self.batch[:-1], -1).sum(-1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U_0 and U at x, ``(*stack, chains)``, and their gradients, of x's shape."""
        value, grad = energy_and_gradient(self.energy, x)
        if value.shape != self.batch:
            raise ValueError(f"the energy maps {tuple(x.shape)} to {tuple(value.shape)}, not {self.batch}")
        away = x - self.mean
        pull = away / self.std**2
        u, g = value / self.temperature, grad / lift(self.temperature, x.ndim, x)
        if self.base_std is not None:
            u, g = u + inner(x, x, u.ndim) / (2 * self.base_std**2), g + x / self.base_std**2
        return inner(away, pull, u.ndim) / 2, u, pull, g


class Walk:
    """Chains on the path, with the values and gradients of both ends where they stand."""

    def __init__(self, ends: Ends, x: Tensor, generator: torch.Generator | None) -> None:
        self.ends, self.x, self.generator = ends, x, generator
        self.u0, self.u1, self.g0, self.g1 = ends(x)
        self.first, self.noise, self.uniform = self.u1, torch.empty_like(x), torch.empty_like(self.u1)
        self.watch, self.eps, self.rate = _Watch(x.device), 0.0, torch.ones_like(self.u1).mean(-1)
        self.check(0, now=True)

    def slack(self) -> Tensor:
        """U_0 - U, the slope of each log-weight in b: ``(*stack, chains)``."""
        return self.u0 - self.u1

    def rung(self, beta: float, step_size: Tensor, transitions: int) -> Tensor:
        """``transitions`` MALA steps under (1 - b) U_0 + b U; returns the mean acceptance, ``(*stack)``."""
        n = self.u0.ndim
        self.eps = eps = lift(step_size, self.x.ndim, self.x)
        total = 0.0
        for _ in range(transitions):
            noise = self.noise.normal_(generator=self.generator)
            grad = torch.lerp(self.g0, self.g1, beta)
            proposal = self.x - eps**2 / 2 * grad + eps * noise
            u0, u1, g0, g1 = self.ends(proposal)
            # With a = eps/2 (g + g') the reverse step would have drawn a - z: log q(x|x') - log q(x'|x)
            # = (|z|^2 - |a - z|^2) / 2 = a^T (z - a/2), without the difference of two large squares.
            a = eps / 2 * (grad + torch.lerp(g0, g1, beta))
            log_ratio = (1 - beta) * (self.u0 - u0) + beta * (self.u1 - u1) + inner(a, noise - a / 2, n)
            log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)  # a diverged proposal
            total = total + log_ratio.clamp(max=0).exp()
            accept = self.uniform.uniform_(generator=self.generator).log() < log_ratio
            moved = accept.reshape(*accept.shape, *[1] * (self.x.ndim - n))
            self.x = torch.where(moved, proposal, self.x)
            self.u0, self.u1 = torch.where(accept, u0, self.u0), torch.where(accept, u1, self.u1)
            self.g0, self.g1 = torch.where(moved, g0, self.g0), torch.where(moved, g1, self.g1)
        self.rate = (total / transitions).mean(-1)
        return self.rate

    def check(self, step: int, now: bool = False) -> None:
        """``DivergenceError`` for a non-finite energy; a GPU is asked at times only, unless ``now``."""
        if not self.watch.sees_trouble(step, self.slack()) and not (now and self.watch.step >= 0):
            return
        grad, size = torch.as_tensor(self.eps**2 / 2) * self.g1, math.sqrt(math.prod(self.ends.shape))
        drift = inner(grad, grad, self.u1.ndim).sqrt().mean(-1)
        noise = torch.as_tensor(self.eps).to(drift).flatten().squeeze() * size
        gauges = Gauges(self.first.mean(-1), self.u1.mean(-1), drift, noise, self.rate)
        raise DivergenceError(self.watch.step, gauges, "non-finite energy")


def lift(v: float | Tensor, ndim: int, like: Tensor) -> float | Tensor:
    """A number, or a tensor with trailing dimensions of size 1 up to ``ndim``."""
    if not isinstance(v, Tensor) or v.ndim == 0:
        return float(v)
    return v.to(like).reshape(*v.shape, *[1] * (ndim - v.ndim))


def inner(a: Tensor, b: Tensor, batch_dims: int) -> Tensor:
    """a^T b of each state: ``(*batch, *shape)`` -> ``(*batch,)``."""
    return (a * b).flatten(batch_dims).sum(-1) if a.ndim > batch_dims else a * b
