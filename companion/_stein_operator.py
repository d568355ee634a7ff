"""The Stein operator of a density with score s, applied to a vector field f: A f = s^T f + Tr grad f.

Its mean under the density itself is zero for every f whose flux dies out at infinity (Stein's identity);
under other data it is E[(s - s_data)^T f]. The learned discrepancy, the tests and the graph models all
stand on the functions of this file; ``companion.stein`` is the name to import them from.

Coordinates. x is ``(*batch, d)``, or with ``symmetric=True`` a symmetric matrix ``(*batch, n, n)`` with zero
diagonal, whose coordinates are its entries a_ij, i < j: the adjacency matrix of an undirected graph. Each
coordinate then stands in two places of x, so that an inner product is *half* the sum over the matrix, the
trace is sum_{i<j} d f_ij / d a_ij, and a probe is drawn above the diagonal and mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from companion.energies import Energy

__all__ = ["Critic", "SteinTerms", "matrix_score", "optimal_critic", "probe", "stein_operator", "stein_terms"]

#: A field of vectors: a batch ``(*batch, d)`` -> ``(*batch, d)``.
Critic = Callable[[Tensor], Tensor]

_CHUNK = 64  # basis vectors that go through a closed-form tangent at once


class SteinTerms(NamedTuple):
    """What the operator and its penalty are made of, each ``(*batch,)``."""

    drift: Tensor  #: ``s^T f``
    trace: Tensor  #: Tr grad f, or its Hutchinson estimate
    square: Tensor  #: ``|f|^2``

    @property
    def operator(self) -> Tensor:
        """A f = s^T f + Tr grad f, ``(*batch,)``."""
        return self.drift + self.trace


def probe(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    symmetric: bool = False,
    kind: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random v of x's shape with E[v v^T] = I on x's coordinates, so that E[v^T J v] = Tr J.

    ``kind`` is "rademacher" (signs, the smaller variance) or "gaussian". Masked coordinates are 0; with
    ``symmetric`` the draw stands above the diagonal and is mirrored. Raises ``ValueError`` for an unknown
    kind or a mask that does not fit. Source: Hutchinson 1989.
    """
    v = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if kind == "rademacher":
        v.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    elif kind == "gaussian":
        v.normal_(generator=generator)
    else:
        raise ValueError(f'kind must be "rademacher" or "gaussian", got {kind!r}')
    if symmetric:
        v = v.triu(1)
        v = v + v.mT
    active = _active(x, mask, symmetric)
    return v if active is None else v * active


def stein_terms(
    score: Tensor,
    critic: Critic,
    x: Tensor,
    *,
    trace: str = "hutchinson",
    probes: int = 1,
    kind: str = "rademacher",
    mask: Tensor | None = None,
    symmetric: bool = False,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> SteinTerms:
    """``s^T f``, ``Tr grad f``, ``|f|^2`` of each sample, f = ``critic(x)``; differentiable in both.

    score, x: ``(*batch, d)``; with ``symmetric`` ``(*batch, n, n)``, the score mirrored (``matrix_score``).
    ``mask`` is of x's shape, or, with ``symmetric``, of nodes, ``(*batch, n)``; masked coordinates (and the
    diagonal) contribute nothing. ``trace="hutchinson"`` averages ``probes`` random probes of ``kind``, one
    product with the Jacobian each; ``"exact"`` takes one for every coordinate and draws nothing. Samples
    must not interact in the critic (no batch statistics). A critic with a method
    ``value_and_tangent(x, v)`` (``networks.MLP``) gives f and (grad f) v in one forward pass; of any other,
    autograd takes a vector-Jacobian product. ``check=False`` leaves out the test that x is symmetric,
    which makes a GPU wait.

    Raises ``ValueError`` for shapes that differ, an x that is not symmetric, a mask that does not fit and
    an unknown ``trace``. Source: Grathwohl et al. 2020, eqs. 3 and 6.
    """
    if score.shape != x.shape:
        raise ValueError(f"score {tuple(score.shape)} and x {tuple(x.shape)} must have the same shape")
    if symmetric and check:
        _check_symmetric(x)
    active = _active(x, mask, symmetric)
    if trace == "hutchinson":
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        draws = [probe(x, symmetric=symmetric, kind=kind, generator=generator) for _ in range(probes)]
        directions, share = torch.stack(draws), 1 / probes
    elif trace == "exact":
        directions, share = _basis(x, symmetric), 1.0
    else:
        raise ValueError(f'trace must be "hutchinson" or "exact", got {trace!r}')
    if active is not None:
        directions = directions * active
    half = 0.5 if symmetric else 1.0  # each coordinate of a symmetric matrix stands in two places
    dims = (-2, -1) if symmetric else (-1,)
    f, total = _value_and_trace(critic, x, directions, half, dims)
    if active is not None:
        f = f * active
    drift = half * (score * f).sum(dims)
    return SteinTerms(drift, share * total, half * f.square().sum(dims))


def stein_operator(score: Tensor, critic: Critic, x: Tensor, **options: object) -> Tensor:
    """A f(x) = s(x)^T f(x) + Tr grad f(x) of each sample, ``(*batch,)``: arguments as in ``stein_terms``."""
    return stein_terms(score, critic, x, **options).operator


def optimal_critic(score_model: Tensor, score_data: Tensor, lam: float) -> Tensor:
    """``f* = (s_model - s_data) / (2 lam)``, of the scores' shape: the best critic there is.

    It maximises ``E_data[A f] - lam E_data|f|^2``. The maximum itself is ``E_data|s_model - s_data|^2 / (4
    lam)``, the Fisher divergence over 4 lam.
    """
    return (score_model - score_data) / (2 * lam)


def matrix_score(
    energy: Energy, x: Tensor, *, mask: Tensor | None = None, create_graph: bool = False
) -> Tensor:
    """s_ij = -dE/da_ij, mirrored, of an energy of symmetric matrices x ``(*batch, n, n)``; of x's shape.

    The coordinate a_ij stands in two places, so that s_ij = -(G_ij + G_ji) with G autograd's gradient in
    the matrix: the factor 2 that is easily lost. Zero on the diagonal and where ``mask`` says so.
    ``create_graph`` keeps it differentiable in the energy's parameters.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=create_graph)
    return -(grad + grad.mT) * _active(x, mask, symmetric=True)


def _value_and_trace(
    critic: Critic, x: Tensor, directions: Tensor, half: float, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """f(x) and the sum over the directions v, ``(P, *x.shape)``, of half * v^T (grad f) v."""
    tangent = getattr(critic, "value_and_tangent", None)
    if tangent is not None and len(directions) == 1:
        f, change = tangent(x, directions[0])
        return _checked(f, x), half * (directions[0] * change).sum(dims)
    if tangent is not None:
        total = 0.0
        for v in directions.split(_CHUNK):
            f, change = tangent(x, v)
            total = total + half * (v * change).sum((0, *dims))
        return _checked(f, x), total
    keep = torch.is_grad_enabled()
    total = x.new_zeros(x.shape[: -len(dims)])
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        f = _checked(critic(leaf), x)
        if f.requires_grad:
            for v in directions:
                # <v, (grad f)^T v>: of a symmetric matrix this is 1/2 <V, D f[V]>, autograd's own convention
                # (every entry by itself) undone by the mirrored V.
                (back,) = torch.autograd.grad(
                    half * (f * v).sum(), leaf, create_graph=keep, retain_graph=True, allow_unused=True
                )
                if back is not None:  # None: f does not depend on x
                    total = total + (v * back).sum(dims)
    return (f, total) if keep else (f.detach(), total)


def _checked(f: Tensor, x: Tensor) -> Tensor:
    if f.shape != x.shape:
        raise ValueError(f"the critic maps {tuple(x.shape)} to {tuple(f.shape)}; it must keep the shape")
    return f


def _basis(x: Tensor, symmetric: bool) -> Tensor:
    """A unit vector for each coordinate, ``(P, *x.shape)`` (expanded, not copied)."""
    if not symmetric:
        rows = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        lead = x.ndim - 1
    else:
        n = x.shape[-1]
        i, j = torch.triu_indices(n, n, 1, device=x.device)
        rows = x.new_zeros(len(i), n, n)
        k = torch.arange(len(i), device=x.device)
        rows[k, i, j] = rows[k, j, i] = 1.0
        lead = x.ndim - 2
    return rows.reshape(len(rows), *[1] * lead, *rows.shape[1:]).expand(len(rows), *x.shape)


def _active(x: Tensor, mask: Tensor | None, symmetric: bool) -> Tensor | None:
    """1 where x has a coordinate and 0 elsewhere, broadcastable to x; None if that is everywhere."""
    if not symmetric:
        if mask is not None and mask.shape != x.shape:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
        return None if mask is None else mask.to(x)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"a symmetric x is (*batch, n, n), got {tuple(x.shape)}")
    off = 1 - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if mask is None:
        return off
    if mask.shape == x.shape:
        return off * mask.to(x)
    if mask.shape == x.shape[:-1]:
        nodes = mask.to(x)
        return off * nodes.unsqueeze(-1) * nodes.unsqueeze(-2)
    raise ValueError(
        f"mask {tuple(mask.shape)} fits neither the nodes {tuple(x.shape[:-1])} nor x {tuple(x.shape)}"
    )


def _check_symmetric(x: Tensor) -> None:
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"a symmetric x is (*batch, n, n), got {tuple(x.shape)}")
    gap = (x - x.mT).abs().max().item() if x.numel() else 0.0
    if gap > 1e-5:
        raise ValueError(f"symmetric=True, but x and its transpose differ by up to {gap:.3g}")
