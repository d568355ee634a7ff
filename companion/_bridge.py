"""Bridge sampling of the normaliser, and the error bar of every estimate of it.

Two sides, draws of a density that is known and samples of one that is not, meet in the one root of
Bennett's equation. The sides may be a Gaussian and the target (``bridge``) or the two ends of a ladder
(``bridge_from_ais``): a bridge is what the ladder becomes with one rung. Public names are re-exported by
``companion.normaliser``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from companion._ladder import Ladder, inner, lift
from companion.energies import Analytic, Energy, Gaussian

__all__ = ["LogNormaliser", "bridge", "bridge_from_ais"]


@dataclass(frozen=True)
class LogNormaliser:
    """An estimate of log Z in nats. Leading dimensions ``*stack`` are () or ``(S,)``.

    ``error`` is one standard error of ``value``: the delta method, or, where it is larger, what log-normal
    weights with this upper quarter would have. The first alone is blind to a tail that it has not met and
    never exceeds 1; where the quarter holds chains of different modes the second overstates. ``ess`` says
    what to make of it: below about 10 the value hangs on a few chains.
    """

    value: Tensor  #: ``(*stack)``
    error: Tensor  #: ``(*stack)``
    ess: Tensor  #: ``(*stack)``: ``(sum w)^2 / sum w^2``; of a bridge, the poorer side's
    #: ``(*stack, n)``: forward, Z is the mean of exp(these); reverse, 1/Z that of exp(-these). A bridge has
    #: both.
    log_weights: Tensor
    acceptance: Tensor | None = None  #: ``(K - 1, *stack)``: of MALA, a rung; AIS only
    ladder: Ladder | None = None
    x: Tensor | None = None  #: ``(*stack, chains, *shape)``: where the chains ended

    def __str__(self) -> str:
        rows = zip(*(v.flatten().tolist() for v in (self.value, self.error, self.ess)), strict=True)
        return ", ".join(f"log Z {v:.3f} +- {e:.3f} nats (ess {n:.1f})" for v, e, n in rows)


def bridge_from_ais(
    forward: LogNormaliser, reverse: LogNormaliser, *, worth: float | Tensor | None = None
) -> LogNormaliser:
    """log Z from a forward and a reverse run of ``ais`` on one ladder, by Bennett's acceptance ratio.

    The weights of the two ends are related by p_forward(log w) = p_reverse(log w) Z / w (Crooks 1999);
    the value is the maximum-likelihood one, see ``bridge``. ``worth``, a number or ``(S,)``: how many
    independent draws the reverse run's starts are worth, if fewer than their number. Raises ``ValueError``
    if the ladders differ.
    """
    a, b = forward.ladder, reverse.ladder
    if a is None or b is None or a.betas.shape != b.betas.shape:
        raise ValueError("the two runs must share one ladder; plan it once and pass it to both")
    if not (torch.equal(a.betas, b.betas) and torch.equal(a.step_size, b.step_size)):
        raise ValueError("the two runs must share one ladder; theirs differ")
    return bennett(forward.log_weights, reverse.log_weights, worth)


def bridge(
    energy: Energy,
    samples: Tensor,
    *,
    proposal: Analytic | Sequence[Analytic] | None = None,
    draws: int | None = None,
    worth: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    generator: torch.Generator | None = None,
) -> LogNormaliser:
    """log Z by bridge sampling between the target's ``samples``, ``(*stack, n, *shape)``, and a proposal q.

    With l = -U - log q, n draws of q and m samples of p, log Z is the one root r of::

        sum_q sigmoid(l - r - log n/m) = sum_p sigmoid(r + log n/m - l),

    the fixed point of the optimal bridge's iteration (Meng & Wong 1996; Bennett 1976), found by
    bisection. ``proposal`` is anything with ``sample(n, generator)`` and ``log_density``, on ``(n, d)`` with
    states flattened, one or one a stacked model; without it a Gaussian is fitted to the first half of the
    samples and the second half is bridged, for a q that has seen the samples it is bridged to biases r.
    ``draws`` of q default to as many as samples bridged. ``worth``, a number or ``(S,)``: how many
    independent draws these are worth (``metrics.effective_sample_size``), if they are correlated.

    Raises ``ValueError`` for an energy that is not finite at a sample, or too few samples to fit a Gaussian.
    """
    log_f = log_unnormalised(energy, samples, temperature, base_std)  # (*stack, n)
    *stack, n = log_f.shape
    if not torch.isfinite(log_f).all():
        raise ValueError("the energy is not finite at some of the samples")
    models = samples.reshape(-1, n, math.prod(samples.shape[log_f.ndim :]))  # (S or 1, n, d)
    if proposal is None:
        half, d = n // 2, models.shape[-1]
        if half <= d:
            raise ValueError(f"{half} samples cannot fit a Gaussian in {d} dimensions; give a proposal")
        fits = models[:, :half].double().cpu()
        proposal = [Gaussian(part.mean(0), torch.cov(part.T).reshape(d, d)) for part in fits]
        models, log_f = models[:, half:], log_f[..., half:]
    each = list(proposal) if isinstance(proposal, Sequence) else [proposal] * len(models)
    if len(each) != len(models):
        raise ValueError(f"{len(models)} stacked models need as many proposals, got {len(each)}")
    draws = log_f.shape[-1] if draws is None else draws
    drawn = torch.stack([q.sample(draws, generator) for q in each]).to(models)
    log_q = [
        torch.stack([q.log_density(v.double()) for q, v in zip(each, part, strict=True)]).reshape(*stack, -1)
        for part in (drawn, models)
    ]
    points = drawn.reshape(*stack, draws, *samples.shape[log_f.ndim :])
    log_drawn = log_unnormalised(energy, points, temperature, base_std)
    if log_drawn.isnan().any():
        raise ValueError("the energy is not a number at some of the proposal's draws")
    return bennett(log_drawn - log_q[0], log_f - log_q[1], worth)


def log_unnormalised(
    energy: Energy, x: Tensor, temperature: float | Tensor, base_std: float | None
) -> Tensor:
    """-U(x), ``(*stack, n, *shape)`` -> ``(*stack, n)``, in double precision."""
    with torch.no_grad():
        value = energy(x).double()
    log_f = -value / lift(temperature, value.ndim, value)
    if base_std is None:
        return log_f
    return log_f - inner(x.double(), x.double(), value.ndim) / (2 * base_std**2)


def log_mean_exp(v: Tensor) -> Tensor:
    return torch.logsumexp(v, -1) - math.log(v.shape[-1])


def relative_error(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The standard error of log mean w, and the effective number of weights, over the last dimension."""
    n = log_w.shape[-1]
    ess = (2 * torch.logsumexp(log_w, -1) - torch.logsumexp(2 * log_w, -1)).exp()
    delta = ((1 / ess - 1 / n) * n / (n - 1)).clamp(min=0)  # the weights' variance over n and mean squared
    # A tail that was not met cannot show in the weights, but the log-weights' upper quarter points to it.
    # Were they normal, of variance v, E (log w - quartile)^2 above it would be 0.5975 v, and the mean
    # weight's relative variance (e^v - 1) / n. The rest is left out: chains that were left behind do no harm.
    quartile = log_w.quantile(0.75, -1, keepdim=True)
    above = (log_w > quartile).sum(-1).clamp(min=1)
    v = (log_w - quartile).clamp(min=0).square().sum(-1) / above / 0.5975
    guard = torch.logaddexp(v - math.log(n), torch.full_like(v, math.log1p(-1 / n)))  # log(1 + (e^v - 1) / n)
    return torch.maximum(delta, guard).sqrt(), ess


def bennett(forward: Tensor, reverse: Tensor, worth: float | Tensor | None) -> LogNormaliser:
    """The root of the bridge's equation, from log-weights ``(*stack, n)`` and ``(*stack, m)``."""
    n, m = forward.shape[-1], reverse.shape[-1]
    if min(n, m) < 2 or forward.shape[:-1] != reverse.shape[:-1]:
        raise ValueError(f"cannot bridge weights of shapes {tuple(forward.shape)} and {tuple(reverse.shape)}")
    worth = torch.as_tensor(m if worth is None else worth).to(reverse)
    if not bool((worth > 0).all()):
        raise ValueError(f"worth must be positive, got {worth}")
    forward = forward.clamp(min=reverse.amax() - 1e5)  # a draw of infinite energy: its share is 0 either way
    both, shift = torch.cat([forward, reverse], -1), (n / worth).log()
    low, high = both.amin(-1) - shift.abs() - 1, both.amax(-1) + shift.abs() + 1
    for _ in range(90):  # halvings: from a width of 1e5 nats to the last bit
        y = ((low + high) / 2).unsqueeze(-1)
        excess = n * (forward - y).sigmoid().mean(-1) - worth * (y - reverse).sigmoid().mean(-1)
        low, high = torch.where(excess > 0, y.squeeze(-1), low), torch.where(excess > 0, high, y.squeeze(-1))
    y = ((low + high) / 2).unsqueeze(-1)
    error_q, ess_q = relative_error(F.logsigmoid(forward - y))
    error_p, ess_p = relative_error(F.logsigmoid(y - reverse))
    error = (error_q.square() + error_p.square() * (m / worth)).sqrt()
    return LogNormaliser(y.squeeze(-1) - shift, error, torch.minimum(ess_q, ess_p * (worth / m)), both)
