"""Does this sample come from that density? The test whose critic is learned (Grathwohl et al. 2020).

The sample is split in three: a critic network is trained to see the difference, chosen on rows it was
not trained on, and asked once on rows that neither saw. Called like the tests by kernels; public names are
re-exported by ``companion.stein``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from companion._kernel_stein import Verdict, paired, upper_tail
from companion.networks import MLP, StackedLinear, _SiLUTangent

__all__ = ["learned_stein_test", "power_objective", "train_power_critic", "value_and_trace"]


def value_and_trace(
    critic: MLP, x: Tensor, keep: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """f(x), ``(*stack, n, d)``, and the exact trace, ``(*stack, n)``, of a SiLU MLP with two hidden layers.

    With a_1 = x W_1 + b_1 and a_2 = silu(a_1) W_2 + b_2 the trace is the bilinear form::

        sum_jl silu'(a_1)_j M_jl silu'(a_2)_l,   M = W_2 * (W_3 W_1)^T elementwise,

    of H^2 multiplications a row: no more than one random probe would need, and nothing random about it.
    ``keep`` multiplies the hidden units of the two layers (dropout), broadcastable to ``(*stack, n, H)``.
    Raises ``ValueError`` for another network.
    """
    layers = list(critic.layers)
    if [type(layer) for layer in layers] != [StackedLinear, nn.SiLU, StackedLinear, nn.SiLU, StackedLinear]:
        raise ValueError("the closed-form trace needs an MLP of two hidden layers and SiLU")
    first, second, last = layers[::2]
    keep = (x.new_ones(()), x.new_ones(())) if keep is None else keep
    h, d1 = _SiLUTangent.apply(first(x), keep[0])
    h, d2 = _SiLUTangent.apply(second(h * keep[0]), keep[1])
    f = last(h * keep[1])
    if f.shape != x.shape:
        raise ValueError(f"the critic maps {tuple(x.shape)} to {tuple(f.shape)}; it must keep the shape")
    mixed = second.weight * (last.weight @ first.weight).mT  # (*stack, H, H)
    return f, ((d1 @ mixed) * d2).sum(-1)


def power_objective(operator: Tensor, square: Tensor, lam: float) -> Tensor:
    """``mean(A f) / (std(A f) + 1e-6) - lam mean|f|^2`` over rows: ``(*stack, n)`` twice -> ``(*stack,)``.

    Of the test sqrt(n) mean/std the first term decides the power; the penalty holds the critic's scale,
    which that term does not feel.
    """
    return operator.mean(-1) / (operator.std(-1) + 1e-6) - lam * square.mean(-1)


def train_power_critic(
    critic: MLP,
    x: Tensor,
    s: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    steps: int,
    rate: float,
    lam: float = 0.5,
    dropout: float = 0.5,
    weight_decay: float = 5e-4,
    every: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[MLP, Tensor]:
    """Train on the power objective, full batch; returns the critic at its best validation ratio, and that.

    x, s, and the pair ``validation``: ``(*stack, rows, d)``, stacked like the critic. The ratio mean/std is
    taken every ``every`` steps and at the last, without dropout, and each stacked critic keeps its own best
    weights. A dropout mask is drawn a step and unit and shared by the rows. Raises ``FloatingPointError``
    with the step if the objective is not finite.
    """
    parameters = list(critic.parameters())
    adam = torch.optim.Adam(parameters, lr=rate, weight_decay=weight_decay)
    best, kept = None, [p.detach().clone() for p in parameters]
    widths = [layer.weight.shape[-1] for layer in critic.layers if isinstance(layer, StackedLinear)][:2]
    for step in range(1, steps + 1):
        keep = None
        if dropout:
            sizes = [(*x.shape[:-2], 1, width) for width in widths]
            draws = [torch.rand(size, generator=generator, device=x.device) >= dropout for size in sizes]
            keep = tuple(draw.to(x) / (1 - dropout) for draw in draws)
        f, trace = value_and_trace(critic, x, keep)
        objective = power_objective((s * f).sum(-1) + trace, f.square().sum(-1), lam)
        adam.zero_grad(set_to_none=True)
        (-objective.sum()).backward()  # stacked critics are independent: each gets its own gradient
        adam.step()
        if step % every == 0 or step == steps:
            if not torch.isfinite(objective).all():
                raise FloatingPointError(f"the power objective is not finite at step {step}: lower the rate")
            ratio = _ratio(critic, *validation)
            better = torch.ones_like(ratio, dtype=torch.bool) if best is None else ratio > best
            best = ratio if best is None else torch.where(better, ratio, best)
            for p, old in zip(parameters, kept, strict=True):
                old.copy_(torch.where(better.reshape(*better.shape, *[1] * (p.ndim - better.ndim)), p, old))
    with torch.no_grad():
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
    return critic, best


@torch.no_grad()
def _ratio(critic: MLP, x: Tensor, s: Tensor) -> Tensor:
    f, trace = value_and_trace(critic, x)
    operator = (s * f).sum(-1) + trace
    return operator.mean(-1) / operator.std(-1)


def learned_stein_test(
    x: Tensor,
    s: Tensor,
    *,
    hidden: int = 64,
    steps: int = 50,
    rate: float = 2e-3,
    lam: float = 0.5,
    dropout: float = 0.5,
    weight_decay: float = 5e-4,
    every: int = 5,
    split: tuple[float, float] = (0.8, 0.1),
    standardise: bool = True,
    at_once: int = 100,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Test by a learned critic: sqrt(n) mean/std of A f on rows that f never saw, a one-sided z-test.

    The first ``split[0]`` of the rows train an MLP with two layers of ``hidden`` units, the next
    ``split[1]`` choose its best moment, the rest are the test. As f does not depend on them, A f has mean 0
    under the hypothesis and the threshold is the normal one: no bootstrap. ``standardise`` shows the critic
    (x - m)/c and c s, with m and c the training rows' mean and deviations, which is the same problem in
    other coordinates and takes a tenth of the steps. ``at_once`` stacked tests train together, which bounds
    the memory. The published settings are hidden=300, steps=1000, rate=1e-3, every=100, standardise=False.

    x, s: ``(n, d)`` or ``(S, n, d)``. Raises ``ValueError`` for shapes, shares or scores that do not serve,
    with fewer than 10 rows in a part, ``FloatingPointError`` from training.
    """
    train, choose = split
    if not (0 < train < 1 and 0 < choose < 1 and train + choose < 1):
        raise ValueError(f"split needs two positive shares that leave some rows for the test, got {split}")
    if not 0 <= dropout < 1 or steps < 1 or every < 1 or at_once < 1:
        raise ValueError("need 0 <= dropout < 1, and steps, every and at_once of at least 1")
    x, s, lead = paired(x, s, least=30)
    n, d = x.shape[-2:]
    parts = [round(train * n), round(choose * n)]
    parts.append(n - sum(parts))
    if min(parts) < 10:
        raise ValueError(f"{n} rows split into {parts}: each part needs at least 10")
    ratios = []
    for i in range(0, len(x), at_once):
        y, t = x[i : i + at_once], s[i : i + at_once]
        if standardise:
            seen = y[:, : parts[0]]
            scale = seen.std(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            y, t = (y - seen.mean(1, keepdim=True)) / scale, t * scale
        (fit, fit_s), (val, val_s), (test, test_s) = zip(y.split(parts, 1), t.split(parts, 1), strict=True)
        critic = MLP((d, hidden, hidden, d), stack=len(y), generator=generator).to(x)
        train_power_critic(
            critic, fit, fit_s, (val, val_s), steps=steps, rate=rate, lam=lam, dropout=dropout,
            weight_decay=weight_decay, every=every, generator=generator,
        )  # fmt: skip
        ratios.append(_ratio(critic, test, test_s))
    statistic = (math.sqrt(parts[2]) * torch.cat(ratios)).reshape(lead)
    return Verdict(statistic, upper_tail(statistic))
