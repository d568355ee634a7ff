"""Flatness measures on quadratics, whose answers are known, model by model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from companion.classifiers import StackedConvNet
from companion.flatness import filter_normalised, risk_along, top_eigenvalue, worst_rise


class Bowl(nn.Module):
    """S quadratics theta' H_s theta / 2 whose three weights are split over two tensors."""

    def __init__(self, hessians):
        super().__init__()
        self.hessians = hessians  # (S, 3, 3)
        self.a = nn.Parameter(torch.tensor([[1.0, 2.0], [0.5, -1.0]]))
        self.b = nn.Parameter(torch.tensor([[-1.0], [3.0]]))

    def risk(self):
        theta = torch.cat([self.a, self.b], 1)  # (S, 3)
        return torch.einsum("si,sij,sj->s", theta, self.hessians, theta) / 2


@pytest.fixture
def bowl(rng):
    a = torch.randn(2, 3, 3, generator=rng)
    return Bowl(a @ a.mT)


def test_top_eigenvalue(bowl, rng):
    expected = torch.linalg.eigvalsh(bowl.hessians)[:, -1]
    torch.testing.assert_close(top_eigenvalue(bowl, bowl.risk, 200, rng), expected, rtol=1e-4, atol=1e-4)


def test_worst_rise_is_that_of_the_gradient_s_direction(bowl):
    theta = torch.cat([bowl.a, bowl.b], 1).detach()
    g = torch.einsum("sij,sj->si", bowl.hessians, theta)
    step = 0.1 * g / g.norm(dim=1, keepdim=True)
    after = torch.einsum("si,sij,sj->s", theta + step, bowl.hessians, theta + step) / 2
    before = [p.clone() for p in bowl.parameters()]
    torch.testing.assert_close(worst_rise(bowl, bowl.risk, 0.1), after - bowl.risk().detach())
    assert all(torch.equal(p, q) for p, q in zip(bowl.parameters(), before, strict=True))


def test_risk_along_is_a_parabola_and_leaves_theta(bowl, rng):
    direction = [torch.randn(p.shape, generator=rng) for p in bowl.parameters()]
    before = [p.clone() for p in bowl.parameters()]
    rows = risk_along(bowl, bowl.risk, direction, [-1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(rows[1], bowl.risk().detach())
    d = torch.cat(direction, 1)
    curve = torch.einsum("si,sij,sj->s", d, bowl.hessians, d)
    torch.testing.assert_close(rows[2] + rows[0] - 2 * rows[1], curve, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[3] - 2 * rows[2] + rows[1], curve, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, q) for p, q in zip(bowl.parameters(), before, strict=True))


def test_directions_have_the_filters_lengths(rng):
    net = StackedConvNet((1, 8, 8), 10, 2, (4, 6), generator=rng)
    for p, d in zip(net.parameters(), filter_normalised(net, rng), strict=True):
        if p.ndim == 3 and p.shape[1] > 1:
            torch.testing.assert_close(d.norm(dim=1), p.norm(dim=1))
        else:
            assert d.count_nonzero() == 0
