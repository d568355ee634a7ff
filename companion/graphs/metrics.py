"""How good generated graphs are: the MMD protocol of the field, novelty, uniqueness, connectedness.

The protocol is the one of GraphRNN (You et al. 2018) as EDP-GNN (Niu et al. 2020) and GDSS (Jo et al. 2022)
release it: squared MMD, a V-statistic with its diagonals, no root, between two sets of graphs, in

==========  =====================================================  ====================================
degree      histogram of degrees, normalised                       exp(-W^2 / 2), unit bins
cluster     100 bins of local clustering on [0, 1], normalised     the same, W / 100, sigma .1
orbit       the 15 orbit counts of four nodes, mean over nodes     Gaussian, sigma 30
spectral    200 bins of the normalised Laplacian's eigenvalues     as degree; GDSS's extra, not in the mean
==========  =====================================================  ====================================

W is the earth mover's distance; between histograms on one line of unit bins it is the l1 distance of their
cumulative sums. Figures with the total-variation kernel (GRAN and later) are another quantity.

At twenty graphs the metric is noisy: twenty training graphs of GDSS's community-small file, drawn at random,
have a mean of .017 +- .011 to its test set. Give many draws (:func:`mmd_over_draws`) and the training graphs'
own figure beside that of the generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.graphs.batch import GraphBatch, check
from companion.graphs.orbits import orbit_counts

if TYPE_CHECKING:
    import networkx

    Graphs = GraphBatch | Sequence[networkx.Graph]

__all__ = [
    "Descriptors",
    "connected_share",
    "descriptors",
    "mmd",
    "mmd_over_draws",
    "novelty",
    "summary",
    "uniqueness",
]

_MEAN = ("degree", "cluster", "orbit")  # the three that the published mean is taken over
_ABSENT = 3.0  # outside the spectrum [0, 2] of a normalised Laplacian: where padding's eigenvalues go


@dataclass(frozen=True, eq=False)
class Descriptors:
    """What the metric sees of G graphs, float64 on the CPU; the histograms' rows sum to one.

    ``degree`` (G, N); ``cluster`` (G, 100); ``orbit`` (G, 15); ``spectral`` (G, 200) or None.
    """

    degree: Tensor
    cluster: Tensor
    orbit: Tensor
    spectral: Tensor | None = None

    def __len__(self) -> int:
        return len(self.degree)

    def subset(self, indices: Sequence[int] | Tensor) -> Descriptors:
        """The descriptors of the graphs at ``indices``."""
        rows = torch.as_tensor(indices)
        parts = (self.degree, self.cluster, self.orbit, self.spectral)
        return Descriptors(*(None if part is None else part[rows] for part in parts))


def descriptors(graphs: Graphs, spectral: bool = False) -> Descriptors:
    """The descriptors of a set of graphs, once for all the comparisons it enters.

    Raises ``ValueError`` for no graphs, a graph without nodes, and adjacencies that are not 0/1.
    """
    batch = _batch(graphs)
    mask, n = batch.mask, batch.sizes.unsqueeze(1)
    orbits = orbit_counts(batch).double()
    degree, triangles = orbits[..., 0], orbits[..., 3]
    bins = F.one_hot(degree.long(), mask.shape[1]).double() * mask.unsqueeze(2)
    clustering = 2 * triangles / (degree * (degree - 1)).clamp(min=1)  # zero where the degree is below two
    return Descriptors(
        degree=bins.sum(1) / n,
        cluster=_histogram(clustering, mask, 0.0, 1.0, 100),
        orbit=orbits.sum(1) / n,
        spectral=_spectrum(batch) if spectral else None,
    )


def _batch(graphs: Graphs) -> GraphBatch:
    """Graphs in any form as a checked 0/1 batch on the CPU, where float64 is at hand."""
    batch = graphs if isinstance(graphs, GraphBatch) else GraphBatch.from_networkx(graphs)
    if len(batch) == 0:
        raise ValueError("no graphs to measure")
    empty = (batch.sizes == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"graph {int(empty[0])} of {len(batch)} has no nodes, hence no descriptors; "
            "threshold() leaves a single node"
        )
    return check(batch.to("cpu"), binary=True)


def _histogram(values: Tensor, mask: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Row-wise histograms (G, bins) of the masked values (G, N), as numpy.histogram bins them, normalised."""
    # numpy's own edges: they are rounded otherwise than torch's, and 7/10 would change its bin. A value on an
    # edge belongs to the bin above it, one at the upper end to the last bin.
    edges = torch.from_numpy(np.linspace(low, high, bins + 1))
    place = (torch.searchsorted(edges, values.contiguous(), right=True) - 1).clamp(0, bins - 1)
    counts = torch.zeros(len(values), bins, dtype=torch.float64).scatter_add_(1, place, mask.double())
    return counts / counts.sum(1, keepdim=True)


def _spectrum(batch: GraphBatch) -> Tensor:
    a = batch.adjacency.double()
    degree = a.sum(2)
    scale = degree.clamp(min=1).rsqrt()
    # networkx's convention: an isolated node has the eigenvalue 0.
    diagonal = torch.where(batch.mask, (degree > 0).double(), _ABSENT)
    laplacian = torch.diag_embed(diagonal) - scale.unsqueeze(2) * a * scale.unsqueeze(1)
    values = torch.linalg.eigvalsh(laplacian)
    # A bipartite graph's largest eigenvalue is 2, and rounding must not push it out of the last bin.
    return _histogram(values.clamp(max=2.0), values < (2 + _ABSENT) / 2, -1e-5, 2.0, 200)


def _kernel(name: str, a: Tensor, b: Tensor) -> Tensor:
    """The kernel matrix (n, m) of two sets of descriptors (n, D) and (m, D')."""
    if name == "orbit":
        return torch.exp(-torch.cdist(a, b).square() / (2 * 30.0**2))
    width = max(a.shape[1], b.shape[1])
    a, b = (F.pad(x, (0, width - x.shape[1])).cumsum(1) for x in (a, b))
    distance = torch.cdist(a, b, p=1)  # the earth mover's distance in bins
    if name == "cluster":
        distance = distance / 100 / 0.1
    return torch.exp(-distance.square() / 2)


def _kernels(a: Descriptors, b: Descriptors) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """k(a, a), k(b, b), k(a, b) for every statistic that both sets have."""
    names = [*_MEAN] + ["spectral"] * (a.spectral is not None and b.spectral is not None)
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
    return {n: (_kernel(n, x, x), _kernel(n, y, y), _kernel(n, x, y)) for n, (x, y) in pairs.items()}


def mmd(a: Descriptors, b: Descriptors) -> dict[str, float]:
    """Squared MMD between two sets: ``degree``, ``cluster``, ``orbit``, their ``mean``, and ``spectral`` if
    both sets have it.

    A V-statistic is biased upward, the more the smaller the sets. exp(-W^2/2) is not positive definite, so
    that a value may in principle be negative.
    """
    result = {n: float(aa.mean() + bb.mean() - 2 * ab.mean()) for n, (aa, bb, ab) in _kernels(a, b).items()}
    return result | {"mean": sum(result[name] for name in _MEAN) / len(_MEAN)}


def mmd_over_draws(
    generated: Descriptors,
    reference: Descriptors,
    draw_size: int,
    n_draws: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """:func:`mmd` of ``n_draws`` random subsets of ``generated`` to the whole ``reference``: (n_draws,) each.

    A subset has ``draw_size`` graphs without repeats; at the size of the test set the figures compare with
    published ones. Raises ``ValueError`` for a draw larger than the set.
    """
    if not 1 <= draw_size <= len(generated):
        raise ValueError(f"cannot draw {draw_size} of {len(generated)} graphs")
    kernels = _kernels(generated, reference)
    device = generator.device if generator is not None else None
    result: dict[str, list[Tensor]] = {name: [] for name in kernels}
    for _ in range(n_draws):
        rows = torch.randperm(len(generated), generator=generator, device=device)[:draw_size].cpu()
        for name, (aa, bb, ab) in kernels.items():
            result[name].append(aa[rows][:, rows].mean() + bb.mean() - 2 * ab[rows].mean())
    stacked = {name: torch.stack(values) for name, values in result.items()}
    return stacked | {"mean": torch.stack([stacked[name] for name in _MEAN]).mean(0)}


def uniqueness(graphs: Graphs) -> float:
    """The number of different graphs, up to isomorphism, over the number of graphs."""
    labels, _ = _classes(graphs)
    return len(set(labels)) / len(labels)


def novelty(graphs: Graphs, train: Graphs) -> float:
    """The share of graphs that are isomorphic to no graph of ``train``."""
    labels, known = _classes(graphs, train)
    seen = set(known)
    return sum(label not in seen for label in labels) / len(labels)


def _classes(graphs: Graphs, others: Graphs | None = None) -> tuple[list[int], list[int]]:
    """Isomorphism classes, numbered over both sets together.

    Two graphs are compared node by node only where a hash agrees: each node's orbit counts, refined once
    by those of its neighbours. It tells apart what few other graphs of this size share.
    """
    import networkx

    buckets: dict[tuple, list[tuple[networkx.Graph, int]]] = {}
    labels: list[list[int]] = []
    count = 0
    for batch in [_batch(part) for part in (graphs, others) if part is not None]:
        orbits = orbit_counts(batch)
        around = torch.bmm(batch.adjacency.double(), orbits.double()).long()
        colours = torch.cat([orbits, around], 2).tolist()
        found = []
        for graph, rows in zip(batch.to_networkx(), colours, strict=True):
            for node, row in zip(graph, rows, strict=False):  # the rows of padding come last
                graph.nodes[node]["colour"] = tuple(row)
            key = tuple(sorted(graph.nodes[node]["colour"] for node in graph))
            for known, known_label in buckets.setdefault(key, []):
                if networkx.vf2pp_is_isomorphic(graph, known, node_label="colour"):
                    label = known_label
                    break
            else:
                label = count
                count += 1
                buckets[key].append((graph, label))
            found.append(label)
        labels.append(found)
    return labels[0], labels[1] if len(labels) > 1 else []


def connected_share(graphs: Graphs) -> float:
    """The share of graphs in one piece; a single node counts as one."""
    batch = _batch(graphs)
    reached = F.one_hot(torch.zeros(len(batch), dtype=torch.int64), batch.mask.shape[1]).float().unsqueeze(2)
    while True:  # from node 0, one step of all walks at a time
        wider = ((batch.adjacency.float() @ reached + reached) > 0).float()
        if torch.equal(wider, reached):
            return float((reached.sum((1, 2)) == batch.sizes).double().mean())
        reached = wider


def summary(generated: Graphs, train: Graphs, reference: Graphs) -> dict[str, float]:
    """Everything at once: the MMDs to ``reference``, ``novelty`` against ``train``, ``uniqueness``,
    ``connected``, and the means over graphs of ``nodes``, ``edges`` and ``density`` (edges over pairs; 0 for
    a single node)."""
    batch = _batch(generated)
    n, edges = batch.sizes.double(), batch.n_edges.double()
    return mmd(descriptors(batch), descriptors(reference)) | {
        "novelty": novelty(batch, train),
        "uniqueness": uniqueness(batch),
        "connected": connected_share(batch),
        "nodes": float(n.mean()),
        "edges": float(edges.mean()),
        "density": float((edges / (n * (n - 1) / 2).clamp(min=1)).mean()),
    }
