"""How often each node takes each of the 15 places in connected induced subgraphs of two to four nodes.

Counted in closed form: first every copy of a subgraph, induced or not, from powers of the adjacency; then
the copies that lie in a denser subgraph on the same nodes are taken off. Hočevar and Demšar, "A
combinatorial approach to graphlet counting", 2014, solve the same linear system on sparse graphs.

Places are numbered as in Pržulj, "Biological network comparison using graphlet degree distribution", 2007,
figure 2, and so as in ORCA, GraphRNN and everything that is compared with them:

======  ================================  ======  ========================================
0       end of an edge                    8       on a 4-cycle
1, 2    end, centre of a path of three    9       the tail's end of a triangle with a tail
3       in a triangle                     10      its two nodes away from the tail
4, 5    end, inside of a path of four     11      its node that holds the tail
6, 7    leaf, centre of a star of four    12, 13  degree 2, 3 in K4 less an edge
..                                        14      in a K4
======  ================================  ======  ========================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.graphs.batch import GraphBatch, check

__all__ = ["ORBITS", "orbit_counts"]

#: How many places there are in connected graphs of two to four nodes.
ORBITS = 15
_CELLS = 1 << 23  # entries of the largest work array at a time, to bound memory


def orbit_counts(batch: GraphBatch) -> Tensor:
    """Orbit counts of every node: (B, N, 15) int64, zero at padding. Exact up to 4,096 nodes.

    Costs two N x N products a graph, and N D^2 memory for a largest degree D. Raises ``ValueError`` for
    a batch that is not of 0/1 adjacencies.
    """
    check(batch, binary=True)
    n = batch.mask.shape[1]
    if n == 0 or len(batch) == 0:
        return torch.zeros(len(batch), n, ORBITS, dtype=torch.int64, device=batch.mask.device)
    largest = int(batch.adjacency.sum(2).max())
    step = max(1, _CELLS // (n * max(n, largest**2)))
    return torch.cat([_counts(part.float(), largest) for part in batch.adjacency.split(step)])


def _counts(a: Tensor, largest: int) -> Tensor:
    """Orbits of 0/1 adjacencies (b, N, N) with degrees up to ``largest``: (b, N, 15) int64."""
    # float32 holds whole numbers up to 2^24 exactly: the products below stay under N^2. Sums need float64.
    common = a @ a  # (b, N, N): common neighbours of i and j; the diagonal holds the degrees
    shared = (a * common).double()  # triangles on edge ij
    tips = (a @ (a * (common - 1)) * a).sum(2, dtype=torch.float64)
    a, common = a.double(), common.double()
    common.diagonal(dim1=1, dim2=2).zero_()
    d = a.sum(2)  # (b, N)
    t = shared.sum(2) / 2  # triangles at i

    def over_neighbours(x: Tensor) -> Tensor:
        return (a @ x.unsqueeze(2)).squeeze(2)

    # Copies with node i in place k, induced or not.
    k4 = _cliques(a.float(), largest)
    c13 = (a * common * (common - 1)).sum(2) / 2  # edge ij and two of its triangles
    c12 = tips / 2  # edge jk opposite to i, and another triangle on it
    c11 = t * (d - 2)
    c10 = (shared @ (d - 2).unsqueeze(2)).squeeze(2)
    c9 = over_neighbours(t) - 2 * t  # a triangle at a neighbour, without i
    c8 = (common * (common - 1)).sum(2) / 2  # i, the node opposite to it, two common neighbours
    c7 = d * (d - 1) * (d - 2) / 6
    c6 = over_neighbours((d - 1) * (d - 2) / 2)
    c5 = (d - 1) * over_neighbours(d - 1) - 2 * t
    c4 = (common @ (d - 1).unsqueeze(2)).squeeze(2) - 2 * t
    # Off with the copies inside denser subgraphs; the factors count the copies on one set of four nodes in
    # which a node of place k of the denser one takes the sparser one's place.
    o14 = k4
    o13 = c13 - 3 * o14
    o12 = c12 - 3 * o14
    o11 = c11 - 2 * o13 - 3 * o14
    o10 = c10 - 2 * o13 - 2 * o12 - 6 * o14
    o9 = c9 - 2 * o12 - 3 * o14
    o8 = c8 - o13 - o12 - 3 * o14
    o7 = c7 - o11 - o13 - o14
    o6 = c6 - o9 - o10 - 2 * o12 - o13 - 3 * o14
    o5 = c5 - 2 * o8 - 2 * o11 - o10 - 2 * o12 - 4 * o13 - 6 * o14
    o4 = c4 - 2 * o8 - 2 * o9 - o10 - 4 * o12 - 2 * o13 - 6 * o14
    o2 = d * (d - 1) / 2 - t
    o1 = over_neighbours(d - 1) - 2 * t
    orbits = torch.stack([d, o1, o2, t, o4, o5, o6, o7, o8, o9, o10, o11, o12, o13, o14], 2)
    return orbits.round().to(torch.int64)


def _cliques(a: Tensor, largest: int) -> Tensor:
    """K4s at each node, (b, N, N) -> (b, N) float64: triangles among the node's neighbours."""
    links, neighbours = a.topk(largest, dim=2)  # (b, N, D): neighbours first, then nodes that are none
    graphs = torch.arange(len(a), device=a.device).view(-1, 1, 1, 1)
    near = a[graphs, neighbours.unsqueeze(3), neighbours.unsqueeze(2)]  # (b, N, D, D)
    near = near * links.unsqueeze(3) * links.unsqueeze(2)
    return ((near @ near) * near).sum((2, 3), dtype=torch.float64) / 6
