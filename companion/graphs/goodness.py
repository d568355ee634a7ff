"""Do these graphs come from that energy? The learned Stein test on relaxed graphs of one size and level.

A critic that is equivariant under relabelling is trained on one part of the graphs to make the mean of its
Stein operator large against its spread, chosen on a second part, and asked once on a third (Grathwohl et al.
2020). Under the model that mean is zero for every critic, so that sqrt(n) mean / std is standard normal.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from companion._kernel_stein import Verdict, upper_tail
from companion._learned_test import power_objective
from companion._stein_operator import probe
from companion.energies import frozen
from companion.graphs.network import GraphCritic, n_nodes
from companion.graphs.training import difference_trace, scaled_score

__all__ = ["stein_test"]


def stein_test(
    energy: nn.Module,
    a: Tensor,
    sigma: float,
    *,
    steps: int = 150,
    rate: float = 3e-3,
    lam: float = 0.5,
    probes: int = 4,
    channels: int = 4,
    hidden: int = 16,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Test whether the relaxed graphs ``a`` (n, P) follow exp(-E(a, sigma)): statistic and p-value.

    The rows are split at random in half, a quarter and a quarter: training (full batch, ``steps`` Adam steps
    on the power objective with penalty ``lam``), choice of the critic (every 25 steps), test. ``probes``
    Rademacher probes a row estimate the trace of the test; the expectation under the model stays zero
    whatever their number. Samples that are themselves noisy relaxations, a_0 + sigma eps, belong here, not
    binary graphs. Raises ``ValueError`` for fewer than 40 graphs and for non-finite scores.
    """
    if len(a) < 40:
        raise ValueError(f"{len(a)} graphs are too few to train, choose and test a critic; give at least 40")
    a = a[torch.randperm(len(a), generator=generator, device=a.device)]
    levels = torch.full((len(a),), float(sigma), device=a.device)
    with frozen(energy):
        u = scaled_score(energy, a, levels)
    if not torch.isfinite(u).all():
        raise ValueError("the energy's score is not finite at some of the graphs")
    seed = int(torch.randint(2**31, (1,), generator=generator, device=a.device))
    cpu = torch.Generator().manual_seed(seed)
    size = {"layers": 2, "channels": channels, "node_width": channels, "hidden": hidden}
    critic = GraphCritic(n_nodes(a.shape[1]), **size, generator=cpu).to(a.device)
    optimizer = torch.optim.Adam(critic.parameters(), rate, weight_decay=5e-4)

    def operator(rows: slice, count: int) -> tuple[Tensor, Tensor]:
        x, s = a[rows], levels[rows]
        trace = 0.0
        for _ in range(count):
            f, one = difference_trace(critic, x, s, probe(x, generator=generator))
            trace = trace + one / count
        pairs = x.shape[1]
        return ((u[rows] * f).sum(-1) + trace) / pairs, f.square().sum(-1) / pairs

    half, rest = len(a) // 2, len(a) - len(a) // 4
    best, chosen = -float("inf"), critic.state_dict()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (-power_objective(*operator(slice(0, half), 1), lam)).backward()
        optimizer.step()
        if (step + 1) % 25 == 0 or step == steps - 1:
            with torch.no_grad():
                value, _ = operator(slice(half, rest), probes)
            ratio = (value.mean() / value.std()).item()
            if ratio > best:
                best, chosen = ratio, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(chosen)
    with torch.no_grad():
        value, _ = operator(slice(rest, len(a)), probes)
    statistic = len(value) ** 0.5 * value.mean() / value.std()
    return Verdict(statistic, upper_tail(statistic))
