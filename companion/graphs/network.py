"""A permutation-invariant energy of relaxed graphs, its equivariant critic, and the coordinates they live on.

**Coordinates.** An undirected graph on N nodes is a vector a of P = N (N - 1) / 2 numbers, the upper triangle
of its adjacency matrix row by row; the matrix A mirrors it and has a zero diagonal. Energies, critics, noise,
scores and traces all live on a, so that every formula is the plain one of R^P: no edge is counted twice, no
probe has to be symmetrised. ``mirror`` and ``upper`` lead from one to the other.

**Features** are held as (channels, B, P) for pairs and (channels, B, N) for nodes: linear layers are then one
matrix product over all graphs and pairs, and each channel is a stack of symmetric matrices that can be
multiplied without moving memory.

A layer sees, besides its own channels E_c, their matrix products E_c E_c. Sums over rows count degrees;
only products see a triangle.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GraphCritic", "GraphEnergy", "mirror", "n_nodes", "n_pairs", "upper"]


def n_pairs(nodes: int) -> int:
    """P = N (N - 1) / 2."""
    return nodes * (nodes - 1) // 2


def n_nodes(pairs: int) -> int:
    """N for a vector of P pairs; raises ``ValueError`` when P is not a triangular number."""
    nodes = (1 + math.isqrt(1 + 8 * pairs)) // 2
    if n_pairs(nodes) != pairs:
        raise ValueError(f"{pairs} is no number of node pairs: it must be N (N - 1) / 2, e.g. 190 for N = 20")
    return nodes


_REACH = 3.0  # entries enter the features as r tanh(a / r): bounded, so that the quadratic base wins far out
_DENSE = 64  # nodes up to which x_i + x_j is a matrix product: faster than indexing, but N^3 numbers


class _Pairs(NamedTuple):
    both: Tensor  # (N * N,): which coordinate an entry of the matrix holds (0 on the diagonal, masked by off)
    off: Tensor  # (N * N,): 0 on the diagonal, 1 elsewhere
    above: Tensor  # (P,): where coordinate p stands in the flattened matrix
    below: Tensor  # (P,): and its mirror image
    ends: Tensor | None  # (N, P): 1 where node n is an end of pair p; None for large graphs


@lru_cache(maxsize=256)
def _pairs(nodes: int, device: torch.device, dtype: torch.dtype) -> _Pairs:
    i, j = torch.triu_indices(nodes, nodes, 1, device=device)
    p = torch.arange(len(i), device=device)
    both = torch.zeros(nodes, nodes, dtype=torch.long, device=device)
    both[i, j] = both[j, i] = p
    ends = None
    if nodes <= _DENSE:
        ends = torch.zeros(nodes, len(i), device=device, dtype=dtype)
        ends[i, p] = ends[j, p] = 1
    off = 1 - torch.eye(nodes, device=device, dtype=dtype)
    return _Pairs(both.flatten(), off.flatten(), i * nodes + j, j * nodes + i, ends)


class _Mirror(torch.autograd.Function):
    """(M, P) -> (M, N * N). Its transpose adds both halves; index_select's own would scatter one by one."""

    @staticmethod
    def forward(ctx: object, a: Tensor, pairs: _Pairs) -> Tensor:
        ctx.pairs = pairs
        return a.index_select(1, pairs.both).mul_(pairs.off)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(grad, ctx.pairs), None


class _Fold(torch.autograd.Function):
    """(M, N * N) -> (M, P), a_ij + a_ji: the transpose of ``_Mirror``."""

    @staticmethod
    def forward(ctx: object, full: Tensor, pairs: _Pairs) -> Tensor:
        ctx.pairs = pairs
        return full.index_select(1, pairs.above).add_(full.index_select(1, pairs.below))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return _Mirror.apply(grad, ctx.pairs), None


class _Product(torch.autograd.Function):
    """Upper triangle of F F for mirrored F: (M, N, N) -> (M, P).

    With G the mirrored gradient, the gradient in F is G F + F G up to what ``_Mirror``'s transpose adds
    anyway, (G F) + (G F)^T: one product instead of two. Correct only for an F that ``_Mirror`` made.
    """

    @staticmethod
    def forward(ctx: object, full: Tensor, pairs: _Pairs) -> Tensor:
        ctx.save_for_backward(full)
        ctx.pairs = pairs
        return torch.bmm(full, full).flatten(1).index_select(1, pairs.above)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        (full,) = ctx.saved_tensors
        return torch.bmm(_Mirror.apply(grad, ctx.pairs).view_as(full), full), None


def _both_ends(x: Tensor, pairs: _Pairs) -> Tensor:
    """x_i + x_j at the two ends of every pair: ``(..., N)`` -> ``(..., P)``."""
    if pairs.ends is not None:
        return x @ pairs.ends
    nodes = x.shape[-1]
    i, j = pairs.above // nodes, pairs.above % nodes
    return x[..., i] + x[..., j]


def mirror(a: Tensor) -> Tensor:
    """The symmetric matrix, zero on its diagonal, of coordinates: ``(*batch, P)`` -> ``(*batch, N, N)``."""
    nodes = n_nodes(a.shape[-1])
    flat = a.reshape(-1, a.shape[-1])
    return _Mirror.apply(flat, _pairs(nodes, a.device, a.dtype)).view(*a.shape[:-1], nodes, nodes)


def upper(matrix: Tensor) -> Tensor:
    """The coordinates of a symmetric matrix, ``(*batch, N, N)`` -> ``(*batch, P)``."""
    nodes = matrix.shape[-1]
    return matrix.flatten(-2)[..., _pairs(nodes, matrix.device, torch.float32).above]


class _Linear(nn.Module):
    """Channels first: ``(in, ...)`` -> ``(out, ...)``, one matrix product whatever the other dimensions."""

    def __init__(self, inputs: int, outputs: int, bias: bool, generator: torch.Generator | None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(outputs, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        out = self.weight @ flat if self.bias is None else torch.addmm(self.bias, self.weight, flat)
        return out.view(-1, *x.shape[1:])


class _TwoLayers(nn.Module):
    """Linear, SiLU, linear: smooth, for the trace and the model's step need second derivatives."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, bias: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.first = _Linear(inputs, hidden, True, generator)
        self.second = _Linear(hidden, outputs, bias, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


class _Layer(nn.Module):
    """Pairs (C, B, P) and nodes (W, B, N) -> new pairs and new nodes; equivariant under relabelling."""

    def __init__(
        self,
        channels: tuple[int, int],
        nodes: tuple[int, int],
        hidden: int,
        g: torch.Generator | None,
        products: bool,
    ) -> None:
        super().__init__()
        self.products = products
        self.node = _TwoLayers(channels[0] + nodes[0], hidden, nodes[1], True, g)
        self.ends = _Linear(nodes[1], hidden, True, g)
        self.pair = _Linear((1 + products) * channels[0], hidden, False, g)
        self.out = _Linear(hidden, channels[1], True, g)

    def forward(self, e: Tensor, x: Tensor, pairs: _Pairs, real: Tensor | None) -> tuple[Tensor, Tensor]:
        channels, batch, count = e.shape
        nodes = x.shape[-1]
        full = _Mirror.apply(e.view(-1, count), pairs)
        degree = full.view(channels, batch, nodes, nodes).sum(-1)
        x = self.node(torch.cat([degree / 4, x]))
        both_ends = _both_ends(self.ends(x), pairs).flatten(1)  # (hidden, B * P)
        if self.products:
            product = _Product.apply(full.view(-1, nodes, nodes), pairs).view_as(e)
            e = torch.cat([e, product / 4])
        h = torch.addmm(both_ends, self.pair.weight, e.flatten(1))
        e = self.out(F.silu(h)).view(-1, batch, count)
        return (e if real is None else e * real), x


class _Trunk(nn.Module):
    """a (B, P) at noise sigma (B,) -> all layers' pair channels (L C, B, P) and node features (L W, B, N)."""

    def __init__(
        self,
        layers: int,
        channels: int,
        node_width: int,
        hidden: int,
        max_nodes: int,
        g: torch.Generator | None,
    ) -> None:
        super().__init__()
        if min(layers, channels, node_width, hidden) < 1 or max_nodes < 2:
            raise ValueError(
                "layers, channels, node_width and hidden must be at least 1, max_nodes at least 2"
            )
        self.max_nodes = max_nodes
        widths = [(3, 1), *[(channels, node_width)] * layers]
        self.layers = nn.ModuleList(
            _Layer((c, c2), (w, w2), hidden, g, products=i > 0)
            for i, ((c, w), (c2, w2)) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )

    def forward(self, a: Tensor, sigma: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, count = a.shape
        nodes = n_nodes(count)
        pairs = _pairs(nodes, a.device, a.dtype)
        a = _REACH * torch.tanh(a / _REACH)
        full = _Mirror.apply(a, pairs).view(batch, nodes, nodes)
        square = _Product.apply(full, pairs)
        cube = _Fold.apply((full @ _Mirror.apply(square, pairs).view_as(full)).flatten(1), pairs)
        e = torch.stack([a, square / 4, cube / 16])  # powers of A: paths of one, two and three steps
        if real is not None:
            e = e * real
        x = sigma.log().view(1, -1, 1).expand(1, batch, nodes)
        kept_pairs, kept_nodes = [], []
        for layer in self.layers:
            e, x = layer(e, x, pairs, real)
            kept_pairs.append(e)
            kept_nodes.append(x)
        return torch.cat(kept_pairs), torch.cat(kept_nodes)


def _head(inputs: int, hidden: int, g: torch.Generator | None) -> _TwoLayers:
    """One number from all layers' features, small at first: training starts from the quadratic base."""
    head = _TwoLayers(inputs, hidden, 1, False, g)
    with torch.no_grad():
        head.second.weight.mul_(0.1)
    return head


class _Graphs(nn.Module):
    """What energy and critic share: the trunk and the checks of what comes in."""

    def __init__(
        self,
        layers: int,
        channels: int,
        node_width: int,
        hidden: int,
        max_nodes: int,
        density: float,
        g: torch.Generator | None,
    ) -> None:
        super().__init__()
        if not 0 < density < 1:
            raise ValueError(f"density is the share of pairs that are edges, in (0, 1); got {density}")
        self.trunk = _Trunk(layers, channels, node_width, hidden, max_nodes, g)
        self.head = _head(layers * channels, hidden, g)
        self.mean = nn.Parameter(torch.tensor(float(density)))
        self.log_variance = nn.Parameter(torch.tensor(math.log(density * (1 - density))))

    def _prepare(
        self, a: Tensor, sigma: Tensor | float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if a.ndim != 2:
            raise ValueError(f"graphs come as coordinates (B, P), see `upper`; got shape {tuple(a.shape)}")
        nodes = n_nodes(a.shape[1])
        if nodes > self.trunk.max_nodes:
            raise ValueError(
                f"a graph of {nodes} nodes is larger than the {self.trunk.max_nodes} that this network was "
                "built for (max_nodes)"
            )
        sigma = torch.as_tensor(sigma, dtype=a.dtype, device=a.device).expand(len(a))
        if mask is None:
            return a, sigma, None
        if mask.shape != (len(a), nodes) or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask must be bool of shape ({len(a)}, {nodes}), the nodes of these {len(a)} graphs; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        real = upper(mask.unsqueeze(-1) & mask.unsqueeze(-2)).to(a.dtype)
        return a * real, sigma, real


class GraphEnergy(_Graphs):
    """E(a, sigma): ``(B, P)`` coordinates at noise levels ``(B,)`` (or one number) -> ``(B,)``::

        E = 1/sigma (sum_{i<j} e(pair features) + sum_i v(node features))
            + sum_{i<j} (a_ij - mu)^2 / (2 (tau^2 + sigma^2))

    Invariant under relabelling of the nodes; extensive, so that one network serves all sizes up to
    ``max_nodes``. The features are bounded functions of a, so that far out only the quadratic base is left:
    exp(-E) is integrable and chains find home. mu and tau^2 are learnt, from the training graphs' edge
    density on. ``mask`` (B, N), bool, says which nodes are real; without it all are.

    Raises ``ValueError`` for coordinates that are no triangle, a mask that does not fit, and more nodes than
    ``max_nodes``. The base and the pair read-out follow Grathwohl et al. 2020 and Niu et al. 2020; the energy
    itself is this book's reading of Shankar 2021.
    """

    def __init__(
        self,
        max_nodes: int,
        density: float = 0.3,
        *,
        layers: int = 3,
        channels: int = 8,
        node_width: int = 16,
        hidden: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(layers, channels, node_width, hidden, max_nodes, density, generator)
        self.node_head = _head(layers * node_width, hidden, generator)

    def forward(self, a: Tensor, sigma: Tensor | float, mask: Tensor | None = None) -> Tensor:
        """E: a ``(B, P)``, sigma ``(B,)`` or a number, mask ``(B, N)`` bool or None -> ``(B,)``."""
        a, sigma, real = self._prepare(a, sigma, mask)
        pairs, nodes = self.trunk(a, sigma, real)
        pair, node = self.head(pairs)[0], self.node_head(nodes)[0]  # (B, P), (B, N)
        base = (a - self.mean).square()
        if real is not None:
            pair, node, base = pair * real, node * mask, base * real
        base = base.sum(-1) / (2 * (self.log_variance.exp() + sigma.square()))
        return (pair.sum(-1) + node.sum(-1)) / sigma + base


class GraphCritic(_Graphs):
    """f(a, sigma): ``(B, P)`` -> ``(B, P)``, equivariant under relabelling; 0 at pairs that do not exist.

    The same trunk with one number a pair. An equivariant critic loses nothing: the optimum is a difference
    of scores, and the score of an invariant density is equivariant. With ``based`` it starts from
    sigma (a - mu) / (tau^2 + sigma^2), minus the scaled score of the energy's quadratic base: where the
    optimum is minus the data's own scaled score (the anchored critic), only the rest is to be learnt.
    Arguments and errors as ``GraphEnergy``.
    """

    def __init__(
        self,
        max_nodes: int,
        density: float = 0.3,
        *,
        based: bool = False,
        layers: int = 3,
        channels: int = 8,
        node_width: int = 16,
        hidden: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(layers, channels, node_width, hidden, max_nodes, density, generator)
        self.based = based
        if not based:
            self.mean.requires_grad_(False)
            self.log_variance.requires_grad_(False)

    def forward(self, a: Tensor, sigma: Tensor | float, mask: Tensor | None = None) -> Tensor:
        """f: a ``(B, P)``, sigma ``(B,)`` or a number, mask ``(B, N)`` bool or None -> ``(B, P)``."""
        a, sigma, real = self._prepare(a, sigma, mask)
        pairs, _ = self.trunk(a, sigma, real)
        f = self.head(pairs)[0]
        if self.based:
            scale = sigma / (self.log_variance.exp() + sigma.square())
            f = f + scale.unsqueeze(-1) * (a - self.mean)
        return f if real is None else f * real
