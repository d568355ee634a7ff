"""The normaliser of an energy: annealed importance sampling from both ends, and bridge sampling.

The target is p(x) = exp(-U(x)) / Z with ``U(x) = E(x) / T + |x|^2 / (2 tau^2)``, the density that
``langevin`` and ``mala`` walk on; the second term is there only if ``base_std`` (tau) is given. Everything
here estimates log Z, in nats, with an error bar: one number, or ``(S,)`` for stacked models, in double
precision.

Which way an estimate errs matters: started from the Gaussian (``ais``), log Z is on average too *small*, so
that a likelihood computed with it flatters the model; started from exact samples of the target
(``direction="reverse"``) it is too large. The two together are a sandwich, and ``bridge_from_ais`` finds the
best value between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion._bridge import (
    LogNormaliser,
    bridge,
    bridge_from_ais,
    log_mean_exp,
    log_unnormalised,
    relative_error,
)
from companion._ladder import Ends, Ladder, Walk
from companion.energies import Energy, frozen

__all__ = [
    "Ladder",
    "LogLikelihood",
    "LogNormaliser",
    "ais",
    "bridge",
    "bridge_from_ais",
    "log_likelihood",
    "plan_ladder",
]


@dataclass(frozen=True)
class LogLikelihood:
    """log p of examples, in nats an example."""

    value: Tensor  #: ``(*stack)``: the mean
    error: Tensor  #: ``(*stack)``: its standard error
    each: Tensor  #: ``(*stack, n)``


def plan_ladder(
    energy: Energy,
    shape: tuple[int, ...],
    rungs: int,
    *,
    chains: int = 100,
    transitions: int = 1,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    start_std: float | Tensor | None = None,
    start_mean: float | Tensor = 0.0,
    stack: int | None = None,
    stride: float = 0.1,
    acceptance: float = 0.6,
    limit: int = 5000,
    generator: torch.Generator | None = None,
) -> Ladder:
    """A ladder of ``rungs`` rungs for ``ais``, from a preliminary run with chains of its own.

    That run chooses each difference in b so that the log-weights' standard deviation over the chains grows
    by ``stride`` (in the worst of stacked models), and multiplies eps by exp(mean acceptance -
    ``acceptance``) after each rung. Its rungs are then refined or thinned to ``rungs``, evenly in their
    index, which leaves each the same share of the spread. Chains and weights are thrown away, so that
    adapting biases nothing. On its few large rungs the chains lag behind, and the eps that suits them is a
    little too large later: a smaller ``stride`` comes nearer to ``acceptance``. Arguments and errors
    otherwise as in ``ais``; ``ValueError`` if the run needs more than ``limit`` rungs.
    """
    if rungs < 1 or transitions < 1:
        raise ValueError(f"rungs and transitions must be at least 1, got {rungs} and {transitions}")
    if not (stride > 0 and 0 < acceptance < 1):
        raise ValueError("stride must be positive and acceptance between 0 and 1")
    ends = Ends.build(
        energy, shape, chains, generator,
        temperature=temperature, base_std=base_std, start_std=start_std, start_mean=start_mean, stack=stack,
    )  # fmt: skip
    with frozen(energy):
        walk = Walk(ends, ends.draw(generator), generator)
        # MALA's optimum on the Gaussian itself is near 1.65 d^(-1/6) standard deviations.
        eps = 1.5 * torch.as_tensor(ends.std).min().item() * math.prod(shape) ** (-1 / 6)
        eps = torch.full(ends.batch[:-1], eps, dtype=torch.float64)
        betas, sizes = [0.0], [eps]
        while betas[-1] < 1:
            spread = walk.slack().double().std(-1).max().item()
            beta = betas[-1] + min(stride / max(spread, 1e-30), 1 - betas[-1])
            if len(betas) > limit or beta == betas[-1]:
                raise ValueError(
                    f"after {len(betas) - 1} rungs the path is only at b = {betas[-1]:.3g}: the start is too "
                    "far from the target. Try start_mean and start_std nearer to it, or a larger stride"
                )
            rate = walk.rung(beta, eps, transitions)
            walk.check(len(betas), now=True)
            eps = eps * (rate.cpu().double() - acceptance).exp()
            betas.append(beta if beta < 1 - 1e-12 else 1.0)
            sizes.append(eps)
    old, new = np.linspace(0, 1, len(betas)), np.linspace(0, 1, rungs + 1)
    log_eps = torch.stack(sizes).log().reshape(len(sizes), -1).T.numpy()  # (S or 1, rungs run)
    fine = np.stack([np.interp(new, old, row) for row in log_eps], 1)
    fine = torch.from_numpy(fine).exp().reshape(rungs + 1, *ends.batch[:-1])
    return Ladder(torch.from_numpy(np.interp(new, old, betas)), fine)


def ais(
    energy: Energy,
    shape: tuple[int, ...],
    ladder: int | Ladder,
    *,
    chains: int = 100,
    transitions: int = 1,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    start_std: float | Tensor | None = None,
    start_mean: float | Tensor = 0.0,
    stack: int | None = None,
    direction: str = "forward",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LogNormaliser:
    """Annealed importance sampling along the geometric path from a Gaussian N(m, s^2) to the target::

        U_b(x) = (1 - b) |x - m|^2 / (2 s^2) + b U(x),    log w = sum_k (b_k - b_{k-1}) (U_0 - U)(x_{k-1}),

    with ``transitions`` MALA steps under ``U_{b_k}`` from ``x_{k-1}`` to ``x_k``. Without m, and with s = tau
    (the default), the base measure stays and only the energy is switched on: ``U_b = b E/T + |x|^2 / (2
    tau^2)``.

    ``shape`` is one state's; ``ladder`` is a ``Ladder``, or a number of rungs, for which ``plan_ladder`` is
    run first from the same generator. ``start_std`` (s) and ``start_mean`` (m) may be tensors that broadcast
    against ``(*stack, chains, *shape)``; ``temperature`` may be ``(S,)``. ``direction="reverse"`` runs the
    same path backwards from ``start``, ``(*stack, n, *shape)``, independent samples *of the target*: from
    anything else (data, chains not yet at home) the result bounds nothing. Few rungs make it the harmonic
    mean, whose tails no bar sees: take it for a bound then. The energy is evaluated once a MALA step and
    once at the start, so that K rungs cost what K MALA steps cost.

    Raises ``ValueError`` for arguments out of range, or without both ``base_std`` and ``start_std``: the path
    would start from nothing proper. Raises ``DivergenceError``, with the rung, for a non-finite energy;
    proposals of infinite energy are merely rejected. Source: Neal 2001; backwards, Burda et al. 2015 and
    Grosse et al. 2015 (bidirectional Monte Carlo).
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction is "forward" or "reverse", got {direction!r}')
    backwards = direction == "reverse"
    if backwards != (start is not None):
        raise ValueError("start, samples of the target, belongs to the reverse direction and to it alone")
    if transitions < 1:
        raise ValueError(f"transitions must be at least 1, got {transitions}")
    target = {
        "temperature": temperature, "base_std": base_std,
        "start_std": start_std, "start_mean": start_mean, "stack": stack,
    }  # fmt: skip
    if not isinstance(ladder, Ladder):
        ladder = plan_ladder(
            energy, shape, ladder, chains=chains, transitions=transitions, generator=generator, **target
        )
    ends = Ends.build(energy, shape, chains, generator, start=start, **target)
    betas, sizes = ladder.betas.tolist(), list(ladder.step_size)
    if sizes[0].ndim and sizes[0].shape != ends.batch[:-1]:
        raise ValueError(f"this ladder has step sizes of {len(sizes[0])} stacked models; stack is {stack}")
    if backwards:
        betas, sizes = betas[::-1], sizes[::-1]
    with frozen(energy):
        walk = Walk(ends, start.detach() if backwards else ends.draw(generator), generator)
        log_w, rates = torch.zeros(ends.batch, dtype=torch.float64, device=walk.x.device), []
        for k in range(1, len(betas)):
            log_w += (betas[k] - betas[k - 1]) * walk.slack().double()
            if k < len(betas) - 1:
                rates.append(walk.rung(betas[k], sizes[k], transitions))
                walk.check(k)
        walk.check(len(betas) - 1, now=True)
    log_z0, sign = ends.log_normaliser(), -1 if backwards else 1  # backwards, these are the weights of 1/Z
    error, ess = relative_error(log_w)
    value, log_weights = log_z0 + sign * log_mean_exp(log_w), log_z0.unsqueeze(-1) + sign * log_w
    return LogNormaliser(
        value, error, ess, log_weights, torch.stack(rates) if rates else None, ladder, walk.x
    )


def log_likelihood(
    energy: Energy,
    x: Tensor,
    log_z: float | Tensor | LogNormaliser,
    *,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
) -> LogLikelihood:
    """log p(x) = -U(x) - log Z of examples ``(*stack, n, *shape)``: mean in nats an example, and its error.

    ``log_z``: a number, ``(S,)``, or an estimate, whose error is then added in quadrature (it is common to
    all examples, and does not fall with n). Raises ``ValueError`` for an example of non-finite energy.
    """
    log_f = log_unnormalised(energy, x, temperature, base_std)
    if not torch.isfinite(log_f).all():
        raise ValueError("the energy is not finite at some of the examples")
    known = not isinstance(log_z, LogNormaliser)
    value = torch.as_tensor(log_z if known else log_z.value).to(log_f)
    each = log_f - value.unsqueeze(-1)
    variance = each.var(-1) / each.shape[-1]
    if not known:
        variance = variance + log_z.error.to(variance).square()
    return LogLikelihood(each.mean(-1), variance.sqrt(), each)
