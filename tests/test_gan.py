"""The adversarial pair: losses by hand, the penalty both ways, and training that restarts exactly."""

from __future__ import annotations

import copy

import pytest
import torch

from companion import gan, networks
from companion.checkpoint import CheckpointError


def pair(stack=None, seed=0, average=None, rate=1e-3):
    rng = torch.Generator().manual_seed(seed)
    network = networks.PointGenerator(2, 2, (16, 16), stack=stack, generator=rng)
    critic = networks.MLPEnergy((2,), (16, 16), stack=stack, generator=rng)
    return gan.new_run(network, critic, rate=rate, average=average, rng=rng)


class AutogradOnly(torch.nn.Module):
    """The same critic without its forward derivative, so that the penalty goes through autograd twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shape, self.stack = inner, inner.shape, inner.stack

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("stack", [None, 3])
def test_gradient_penalty_is_the_same_forwards_and_backwards(stack):
    critic = pair(stack).critic.double()
    lead = () if stack is None else (stack,)
    gen = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(*lead, 40, 2, generator=gen, dtype=torch.double) for _ in range(2))
    values, grads = [], []
    for which in (critic, AutogradOnly(critic)):
        value = gan.gradient_penalty(which, real, fake, torch.Generator().manual_seed(2))
        values.append(value)
        grads.append(torch.autograd.grad(value.sum(), list(critic.parameters()), allow_unused=True))
    assert values[0].shape == lead
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) or a.abs().max() == 0
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradient_penalty_of_a_linear_critic():
    class Linear(torch.nn.Module):
        shape, stack = (3,), None

        def forward(self, x):
            return x @ torch.tensor([3.0, 0.0, 4.0])  # slope 5 everywhere

    gen = torch.Generator().manual_seed(0)
    value = gan.gradient_penalty(Linear(), torch.randn(9, 3), torch.randn(9, 3), gen)
    assert value.item() == pytest.approx(16.0, rel=1e-5)


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert gan.LOSSES["wasserstein"](real, fake).item() == pytest.approx(-1.5 - 1.25)
    assert gan.LOSSES["hinge"](real, fake).item() == pytest.approx(0.25 + 0.5)


def test_critic_loss_adds_drift_and_says_the_gap():
    critic = pair().critic
    gen = torch.Generator().manual_seed(3)
    real, fake = torch.randn(8, 2, generator=gen), torch.randn(8, 2, generator=gen)
    plain, gauges = gan.critic_loss(critic, real, fake)
    drifted, _ = gan.critic_loss(critic, real, fake, drift=0.5)
    with torch.no_grad():
        plus, minus = critic(real), critic(fake)
    assert gauges["gap"].item() == pytest.approx((plus.mean() - minus.mean()).item(), abs=1e-6)
    expected = 0.5 * (plus.square().mean() + minus.square().mean())
    assert (drifted - plain).item() == pytest.approx(expected.item(), abs=1e-6)


def test_stacked_pairs_train_as_if_alone():
    together = pair(stack=2)
    alone = []
    for s in range(2):
        one = pair()
        for mine, theirs in ((one.network, together.network), (one.critic, together.critic)):
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.data = q.data[s].reshape(p.shape).clone()
        alone.append(one)
    gen = torch.Generator().manual_seed(4)
    real, fake = torch.randn(2, 32, 2, generator=gen), torch.randn(2, 32, 2, generator=gen)
    gan.critic_step(together.critic, together.optimizer, real, fake, drift=0.1)
    for s, one in enumerate(alone):
        gan.critic_step(one.critic, one.optimizer, real[s], fake[s], drift=0.1)
        for p, q in zip(one.critic.parameters(), together.critic.parameters(), strict=True):
            torch.testing.assert_close(p, q[s].reshape(p.shape), rtol=1e-4, atol=1e-6)


def test_generator_step_leaves_the_critic_alone_and_moves_the_average():
    run = pair(average=0.9)
    critic, first = copy.deepcopy(run.critic.state_dict()), copy.deepcopy(run.network)
    gan.generator_step(run, 64)
    assert all(torch.equal(v, critic[k]) for k, v in run.critic.state_dict().items())
    assert all(p.requires_grad for p in run.critic.parameters())
    for kept, old, new in zip(
        run.average.parameters(), first.parameters(), run.network.parameters(), strict=True
    ):
        torch.testing.assert_close(kept, 0.9 * old + 0.1 * new)


def test_training_finds_two_points():
    """Wasserstein with a penalty on two narrow modes: the mean distance to them falls severalfold."""
    gen = torch.Generator().manual_seed(5)
    data = torch.where(torch.rand(2000, 1, generator=gen) < 0.5, -1.0, 1.0) * torch.tensor([[1.0, 0.5]])
    run = pair(seed=6, rate=3e-3)

    def miss():
        with torch.no_grad():
            x = run.network(run.latents(500))
        return torch.cdist(x, torch.tensor([[1.0, 0.5], [-1.0, -0.5]])).amin(1).mean().item()

    before = miss()
    gan.train(run, data, 400, batch=64, critic_steps=3, penalty=0.1, progress=False)
    assert miss() < 0.4 * before


def test_training_restarts_exactly(tmp_path):
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    options = {
        "batch": 16, "critic_steps": 2, "penalty": 1.0, "progress": False,
        "schedule": lambda share: 1 - share,
    }  # fmt: skip
    whole = gan.train(pair(average=0.9), data, 10, **options)
    killed = pair(average=0.9)
    steps = iter(range(5))
    original = gan.generator_step

    def dying(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    saving = options | {"checkpoint": tmp_path / "run", "checkpoint_every": 4}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gan, "generator_step", dying)
        gan.train(killed, data, 10, **saving)
    assert killed.update == 5
    again = gan.train(pair(average=0.9), data, 10, **saving)
    for name in ("network", "critic", "average"):
        for p, q in zip(getattr(whole, name).parameters(), getattr(again, name).parameters(), strict=True):
            assert torch.equal(p, q), name
    assert torch.equal(whole.rng.get_state(), again.rng.get_state())
    assert torch.equal(whole.gauge("gap"), again.gauge("gap"))
    with pytest.raises(CheckpointError, match="batch=16"):
        gan.train(pair(average=0.9), data, 10, **(saving | {"batch": 8}))


def test_spectral_norm_bounds_each_layer_and_stands_still_in_eval_mode():
    rng = torch.Generator().manual_seed(0)
    critic = gan.spectrally_normalised(networks.ResidualEnergy((1, 8, 8), 4, rng))
    x = torch.randn(4, 1, 8, 8, generator=rng)
    critic.train()
    for _ in range(60):
        critic(x)
    critic.eval()
    weight = critic.head.weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=1e-3)
    state = copy.deepcopy(critic.state_dict())
    critic(x)
    assert all(torch.equal(v, state[k]) for k, v in critic.state_dict().items())


def test_errors_say_what_is_wrong():
    run = pair()
    with pytest.raises(ValueError, match="choose one of wasserstein, hinge"):
        gan.critic_loss(run.critic, torch.zeros(2, 2), torch.zeros(2, 2), loss="wasser")
    with pytest.raises(ValueError, match="differ in shape"):
        gan.critic_loss(run.critic, torch.zeros(2, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="different stacks"):
        gan.new_run(run.network, pair(stack=2).critic, rate=1e-3, rng=run.rng)
    with pytest.raises(ValueError, match="decay"):
        gan.new_run(run.network, run.critic, rate=1e-3, average=1.0, rng=run.rng)
    with torch.no_grad():
        next(run.critic.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at update 1"):
        gan.train(run, torch.zeros(10, 2), 1, batch=4, progress=False)


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_conv_generator_makes_every_side(side):
    rng = torch.Generator().manual_seed(0)
    network = networks.ConvGenerator((1, side, side), 4, 4, rng)
    assert network(torch.randn(3, 4, generator=rng)).shape == (3, 1, side, side)
