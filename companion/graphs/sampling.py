"""Graphs from an energy: annealed Langevin chains on relaxed adjacencies, read off at the end.

At each noise level, from the largest down, a chain of ``companion.langevin`` walks on p(a) proportional to
exp(-E(a, sigma)) with step eps = sigma sqrt(2 ratio): in the notation of Song & Ermon 2019 and Niu et al.
2020, alpha = ratio * sigma^2, at temperature 1 throughout. A last step to the posterior mean,
a + sigma^2 s(a, sigma) (Tweedie's formula), takes out the remaining noise before edges are thresholded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.graphs.batch import GraphBatch, threshold
from companion.graphs.network import mirror
from companion.graphs.training import scaled_score
from companion.langevin import langevin

__all__ = ["Generated", "annealed_langevin", "generate"]


@dataclass(frozen=True)
class Generated:
    """Graphs and how they came about."""

    graphs: GraphBatch  #: thresholded; isolated nodes dropped, as the published protocol does
    dropped: Tensor  #: ``(G,)`` int64: how many nodes each lost
    relaxed: GraphBatch  #: before the threshold, with the node numbers asked for


class _AtLevel(nn.Module):
    """A graph energy at one noise level a graph: a module, so that one recording serves all levels."""

    def __init__(self, energy: nn.Module, sigma: Tensor) -> None:
        super().__init__()
        self.energy, self.sigma = energy, sigma

    def forward(self, a: Tensor) -> Tensor:
        return self.energy(a, self.sigma)


def annealed_langevin(
    energy: nn.Module,
    nodes: int,
    count: int,
    levels: Tensor | tuple[float, ...],
    *,
    steps: int = 100,
    ratio: float = 0.1,
    denoise: bool = True,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``count`` chains of graphs on ``nodes`` nodes: coordinates (count, P), and the path if recorded.

    ``levels`` in any order, walked from the largest down with ``steps`` Langevin steps each. Chains start
    from the energy's quadratic base at the largest level. ``record_every=k`` keeps every k-th state of each
    level, ``(records, count, P)``. Raises ``ValueError`` for levels or a ratio out of range and
    ``DivergenceError`` from the chain.
    """
    levels = sorted((float(level) for level in levels), reverse=True)
    if not levels or levels[-1] <= 0 or not 0 < ratio < 1:
        raise ValueError(f"levels must be positive and ratio in (0, 1); got {levels}, {ratio}")
    mean = energy.mean.detach()
    a = torch.empty(count, nodes * (nodes - 1) // 2, device=mean.device).normal_(generator=generator)
    a = mean + (energy.log_variance.detach().exp() + levels[0] ** 2).sqrt() * a
    path, at_level = [], _AtLevel(energy, torch.empty(count, device=a.device))
    sigma = at_level.sigma
    for level in levels:
        sigma.fill_(level)
        chain = langevin(
            at_level, a, steps, level * math.sqrt(2 * ratio), generator=generator, record_every=record_every
        )
        a = chain.x
        if chain.path is not None:
            path.append(chain.path)
    if denoise:
        a = a + sigma.unsqueeze(-1) * scaled_score(energy, a, sigma)
    return a, torch.cat(path) if path else None


def generate(
    energy: nn.Module,
    sizes: Tensor,
    levels: Tensor | tuple[float, ...],
    *,
    level: float = 0.5,
    generator: torch.Generator | None = None,
    **options: object,
) -> Generated:
    """One graph for each entry of ``sizes`` (G,), in a random order: chains of one size walk together.

    ``options`` go to ``annealed_langevin``; an edge is where the relaxed entry reaches ``level``.
    """
    order = torch.randperm(len(sizes), generator=generator, device=sizes.device)
    sizes = sizes[order]
    largest = int(sizes.max())
    adjacency = torch.zeros(len(sizes), largest, largest, device=sizes.device)
    for nodes in sorted(set(sizes.tolist())):
        rows = (sizes == nodes).nonzero().squeeze(1)
        a, _ = annealed_langevin(energy, nodes, len(rows), levels, generator=generator, **options)
        adjacency[rows, :nodes, :nodes] = mirror(a)
    mask = torch.arange(largest, device=sizes.device) < sizes.unsqueeze(1)
    graphs, dropped = threshold(adjacency, mask, level)
    return Generated(graphs, dropped, GraphBatch(adjacency, mask))
