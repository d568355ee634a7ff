"""Batches of undirected graphs as dense tensors, and the way back from relaxed adjacencies to graphs.

A graph on n nodes sits in the first n rows of an N x N matrix; the rest is padding. Everything that
computes on such a batch (energies, critics, noise) has to leave the diagonal and the padding at zero:
:func:`check` says whether it did, :func:`pair_mask` is the mask to do it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import networkx

__all__ = ["GraphBatch", "check", "pair_mask", "threshold"]

_SLACK = 1e-5  # by which a relaxed adjacency may miss symmetry: rounding, in units of its largest entry


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """B graphs of at most N nodes.

    ``adjacency``: floats (B, N, N), symmetric, zero on the diagonal and at padding; ``mask``: bool (B, N),
    true at real nodes, which come first. Raises ``ValueError`` where shapes or types do not fit; the values
    are :func:`check`'s business, since looking at them stops a GPU.
    """

    adjacency: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        a, m = self.adjacency, self.mask
        if a.ndim != 3 or a.shape[1] != a.shape[2] or not a.is_floating_point():
            raise ValueError(f"adjacency must be floats (B, N, N), not {a.dtype} {tuple(a.shape)}")
        if m.shape != a.shape[:2] or m.dtype != torch.bool:
            raise ValueError(f"mask must be bool {tuple(a.shape[:2])}, not {m.dtype} {tuple(m.shape)}")
        if m.device != a.device:
            raise ValueError(f"adjacency is on {a.device} and mask on {m.device}")

    @classmethod
    def from_edges(
        cls,
        edges: Sequence[Sequence[Sequence[int]] | Tensor],
        sizes: Sequence[int],
        max_nodes: int | None = None,
        device: torch.device | str | None = None,
    ) -> GraphBatch:
        """One graph for each list of edges (i, j), 0 <= i, j < n, and each number of nodes n.

        An edge may be listed in either direction, or in both. Raises ``ValueError`` for a node that does
        not exist, a self-loop, a graph larger than ``max_nodes``, and lists of different lengths.
        """
        if len(edges) != len(sizes):
            raise ValueError(f"{len(edges)} lists of edges for {len(sizes)} sizes")
        n_max = _room([int(n) for n in sizes], max_nodes)
        adjacency = torch.zeros(len(sizes), n_max, n_max)
        for k, (pairs, n) in enumerate(zip(edges, sizes, strict=True)):
            i, j = torch.as_tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2).T
            if len(i) and (min(i.min(), j.min()) < 0 or max(i.max(), j.max()) >= n):
                raise ValueError(f"graph {k} has {n} nodes and an edge that leaves 0..{n - 1}")
            if (i == j).any():
                raise ValueError(f"graph {k} has a self-loop at node {int(i[i == j][0])}")
            adjacency[k, i, j] = adjacency[k, j, i] = 1.0
        mask = torch.arange(n_max) < torch.tensor([int(n) for n in sizes], dtype=torch.int64).unsqueeze(1)
        return cls(adjacency.to(device), mask.to(device))

    @classmethod
    def from_networkx(
        cls,
        graphs: Sequence[networkx.Graph],
        max_nodes: int | None = None,
        device: torch.device | str | None = None,
    ) -> GraphBatch:
        """networkx graphs, each in its own order of nodes; weights and attributes are not read.

        Raises ``ValueError`` for a directed graph and for what :meth:`from_edges` refuses.
        """
        edges = []
        for k, graph in enumerate(graphs):
            if graph.is_directed():
                raise ValueError(f"graph {k} is directed; pass graph.to_undirected()")
            place = {node: i for i, node in enumerate(graph)}
            edges.append([(place[u], place[v]) for u, v in graph.edges()])
        return cls.from_edges(edges, [len(graph) for graph in graphs], max_nodes, device)

    def to_networkx(self) -> list[networkx.Graph]:
        """The graphs with nodes 0..n-1 and an edge wherever the adjacency is not zero (no weights)."""
        import networkx

        graphs = []
        sizes = self.sizes.tolist()
        pairs = self.adjacency.triu(1).nonzero().cpu()
        for n, part in zip(
            sizes, pairs.split(pairs[:, 0].bincount(minlength=len(self)).tolist()), strict=True
        ):
            graph = networkx.empty_graph(n)
            graph.add_edges_from(part[:, 1:].tolist())
            graphs.append(graph)
        return graphs

    @property
    def sizes(self) -> Tensor:
        """The numbers of real nodes, (B,) int64."""
        return self.mask.sum(1)

    @property
    def n_edges(self) -> Tensor:
        """The numbers of edges, (B,) int64: non-zero entries above the diagonal."""
        return self.adjacency.triu(1).count_nonzero((1, 2))

    def __len__(self) -> int:
        return len(self.adjacency)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> GraphBatch:
        """A smaller batch, of one graph where ``index`` is a number; N stays as it is."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.mask.device)
            if index.ndim == 0:
                if not -len(self) <= index < len(self):
                    raise IndexError(f"graph {int(index)} of {len(self)}")  # what ends a loop over the batch
                index = index.unsqueeze(0)
            elif index.numel() == 0:
                index = index.long()  # an empty list makes floats
        return GraphBatch(self.adjacency[index], self.mask[index])

    def subset(self, indices: Sequence[int] | Tensor) -> GraphBatch:
        """The graphs at ``indices`` (k,), in that order, repeats allowed."""
        return self[indices]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GraphBatch:
        """The batch on another device, or with an adjacency of another floating-point type."""
        return GraphBatch(self.adjacency.to(device=device, dtype=dtype), self.mask.to(device=device))

    def pad(self, max_nodes: int) -> GraphBatch:
        """The same graphs with N = ``max_nodes``; raises ``ValueError`` if one of them is larger."""
        extra = _room(self.sizes.tolist(), max_nodes) - self.mask.shape[1]
        return GraphBatch(F.pad(self.adjacency, (0, extra, 0, extra)), F.pad(self.mask, (0, extra)))

    def trim(self) -> GraphBatch:
        """The same graphs with N the size of the largest."""
        return self.pad(int(self.sizes.max()) if len(self) else 0)


def _room(sizes: list[int], max_nodes: int | None) -> int:
    """N for graphs of these sizes; refuses a graph that does not fit in ``max_nodes``."""
    largest = max(sizes, default=0)
    if min(sizes, default=0) < 0:
        raise ValueError(f"a graph cannot have {min(sizes)} nodes")
    if max_nodes is not None and largest > max_nodes:
        raise ValueError(f"graph {sizes.index(largest)} has {largest} nodes, more than max_nodes {max_nodes}")
    return largest if max_nodes is None else max_nodes


def pair_mask(mask: Tensor) -> Tensor:
    """Where edges may be: (B, N) bool -> (B, N, N) bool, true for i != j both real."""
    loops = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(2) & mask.unsqueeze(1) & ~loops


def check(batch: GraphBatch, binary: bool = False) -> GraphBatch:
    """The batch itself, if it holds what :class:`GraphBatch` promises; with ``binary``, entries 0 and 1 only.

    Raises ``ValueError`` that names the first graph with a non-finite entry, a gap in its mask, a
    self-loop, an edge at a padded node, an asymmetric adjacency or, with ``binary``, another entry.
    """
    a, m = batch.adjacency, batch.mask
    edge_of_padding = (a != 0) & ~(m.unsqueeze(2) & m.unsqueeze(1))
    uneven = (a - a.mT).abs() > (0 if binary else _SLACK * a.abs().amax((1, 2), keepdim=True).clamp(min=1))
    faults = {
        "has a non-finite entry": ~a.isfinite().flatten(1).all(1),
        "has a padded node before a real one": (m[:, 1:] & ~m[:, :-1]).any(1),
        "has a self-loop": (a.diagonal(dim1=1, dim2=2) != 0).any(1),
        "has an edge at a padded node": edge_of_padding.flatten(1).any(1),
        "has an asymmetric adjacency": uneven.flatten(1).any(1),
        "has entries other than 0 and 1": ((a != 0) & (a != 1)).flatten(1).any(1) & binary,
    }
    for what, found in faults.items():
        if found.any():
            raise ValueError(f"graph {int(found.nonzero()[0])} of {len(batch)} {what}")
    return batch


def threshold(
    adjacency: Tensor, mask: Tensor, level: float = 0.5, drop_isolated: bool = True
) -> tuple[GraphBatch, Tensor]:
    """Relaxed adjacencies (B, N, N) with mask (B, N) -> graphs, and how many nodes each lost, (B,) int64.

    An edge is where the mean of a_ij and a_ji reaches ``level``. With ``drop_isolated`` nodes without an
    edge are removed and the others move up, in their order; a graph without any edge becomes a single node
    (graphs without nodes have no descriptors). Diagonal and padding are not read.
    Niu et al. 2020 (EDP-GNN) and Jo et al. 2022 (GDSS), as released.

    Raises ``ValueError`` for a non-finite entry at a real pair: thresholding would hide it.
    """
    batch = GraphBatch(adjacency, mask)  # checks the shapes
    pairs = pair_mask(mask)
    bad = (pairs & ~adjacency.isfinite()).flatten(1).any(1)
    if bad.any():
        raise ValueError(
            f"graph {int(bad.nonzero()[0])} of {len(batch)} has a non-finite entry: its chain diverged; "
            "lower the step"
        )
    edges = pairs & ((adjacency + adjacency.mT) / 2 >= level)
    if not drop_isolated:
        return GraphBatch(edges.to(adjacency.dtype), mask), torch.zeros_like(batch.sizes)
    keep = edges.any(2)
    keep[:, :1] |= ~keep.any(1, keepdim=True)
    order = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # kept nodes first
    rows = torch.arange(len(batch), device=mask.device).view(-1, 1, 1)
    moved = edges[rows, order.unsqueeze(2), order.unsqueeze(1)]
    result = GraphBatch(moved.to(adjacency.dtype), keep.gather(1, order))
    return result, batch.sizes - result.sizes
