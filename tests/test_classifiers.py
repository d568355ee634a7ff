"""Stacked convolutional classifiers: the convolution, independence of the models, the recipes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.classifiers import (
    ARMS,
    Recipe,
    StackedConvNet,
    noisy_labels,
    noisy_subsets,
    one_cycle,
    recipe,
    renew_statistics,
    train_stack,
)
from companion.perturb import AMP, Random


def single(net, s):
    """Model s of a stack in torch's own layers."""
    first, second = net.conv1.weight.shape[-1], net.conv2.weight.shape[-1]
    layers = nn.Sequential(
        nn.Conv2d(net.shape[0], first, 5, 2, 2, bias=False), nn.BatchNorm2d(first), nn.ReLU(),
        nn.Conv2d(first, second, 2, 2, bias=False), nn.BatchNorm2d(second), nn.ReLU(),
    )  # fmt: skip
    with torch.no_grad():
        layers[0].weight.copy_(net.conv1.weight[s].T.reshape(layers[0].weight.shape))
        blocks = net.conv2.weight[s].T.reshape(second, 2, 2, first)  # within a patch channels run fastest
        layers[3].weight.copy_(blocks.permute(0, 3, 1, 2))
        for norm, mine in ((layers[1], net.norm1), (layers[4], net.norm2)):
            norm.weight.copy_(mine.weight[s])
            norm.bias.copy_(mine.bias[s])

    def forward(x):
        return layers(x).permute(0, 2, 3, 1).flatten(1) @ net.head.weight[s] + net.head.bias[s]

    return layers, forward


def data(rng, stack=2, count=24, side=8):
    x = torch.randn(stack, count, 1, side, side, generator=rng)
    return x, torch.randint(10, (stack, count), generator=rng)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8)])
def test_the_stack_is_that_many_convolutional_networks(rng, shape):
    net = StackedConvNet(shape, 10, 3, (4, 6), generator=rng)
    x = torch.randn(3, 16, *shape, generator=rng)
    with torch.no_grad():
        net.norm1.weight.normal_(generator=rng)
        net.norm2.bias.normal_(generator=rng)
    together = net(x)
    for s in range(3):
        layers, forward = single(net, s)
        torch.testing.assert_close(together[s], forward(x[s]), rtol=1e-4, atol=1e-4)
        mean = net.norm1.running_mean.unflatten(0, (3, -1))[s]
        torch.testing.assert_close(mean, layers[1].running_mean, rtol=1e-4, atol=1e-5)
        layers.eval()
        torch.testing.assert_close(net.predict(x)[s], forward(x[s]).detach(), rtol=1e-4, atol=1e-4)
    assert net.training and net(x[0]).shape == (3, 16, 10)  # shared images, shown to all
    with pytest.raises(ValueError, match="4 divides|not divisible by 4"):
        StackedConvNet((1, 9, 8), 10, 1)


def test_the_size_is_that_of_the_docstring():
    net = StackedConvNet((1, 8, 8), 10, 2)
    by_hand = 25 * 32 + 2 * 32 + 4 * 32 * 128 + 2 * 128 + 4 * 128 * 10 + 10
    assert sum(p[0].numel() for p in net.parameters()) == by_hand == 22_634


@pytest.mark.parametrize("arm", ["erm", "amp", "swa", "mixup", "flooding", "smoothing", "asam", "random"])
def test_models_of_a_stack_do_not_feel_each_other(rng, arm):
    """Other images and labels for the second model leave the first one's weights as they were."""
    x, y = data(rng)
    own = {"amp": [0.3, 1.0], "swa": [0.4, 0.5], "mixup": [0.7], "flooding": [0.3], "asam": [0.5]}
    own["random"] = [0.2]
    chosen = recipe(arm, [0.1, 1e-3, *own.get(arm, [])], epochs=3, batch=8)
    ends = []
    for change in (False, True):
        gen = torch.Generator().manual_seed(3)
        net = StackedConvNet((1, 8, 8), 10, 2, (4, 6), generator=gen)
        if change:
            x, y = torch.stack([x[0], x[0].flip(0)]), torch.stack([y[0], y[1].roll(1)])
        train_stack(x, y, net, chosen, gen)
        ends.append(net.predict(x[0])[0])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


def test_recipes_count_their_gradients_and_watch(rng):
    x, y = data(rng)
    counts = {}
    own = {"erm": [], "erm_2x": [], "amp": [0.3, 1.0], "random": [0.3], "flooding": [0.5]}

    def watch(net):
        return {"weights": torch.ones(2)}

    for arm, numbers in own.items():
        net = StackedConvNet((1, 8, 8), 10, 2, (4, 6), generator=rng)
        run = train_stack(x, y, net, recipe(arm, [0.1, 0.0, *numbers], 2, 8), rng, watch)
        counts[arm] = run.evaluations
        assert run.curves["weights"].shape == (4 if arm == "erm_2x" else 2, 2)
        assert ("norm" in run.curves) == (arm in ("amp", "random"))
    assert counts == {"erm": 6, "erm_2x": 12, "amp": 12, "random": 12, "flooding": 6}
    with pytest.raises(ValueError, match="do not fill a batch of 50"):
        train_stack(x, y, net, Recipe(1), rng)
    with pytest.raises(RuntimeError, match="left the numbers"):
        train_stack(x * 1e30, y, net, Recipe(2, rate=1e30, batch=8), rng)


def test_arms_are_named_and_take_their_numbers():
    plain, moved = ["erm", "erm_2x", "smoothing", "flooding", "mixup"], ["sam", "asam", "amp"]
    assert list(ARMS) == [*plain, *moved, "amp_per_tensor", "random", "swa"]
    assert recipe("amp", [0.1, 1e-4, 0.5, 2.0], 7).rule == AMP(0.5, 2.0)
    assert recipe("random", [0.1, 1e-4, 0.5], 7).rule == Random(0.5)
    assert recipe("erm_2x", [0.1, 1e-4], 7).epochs == 14
    with pytest.raises(ValueError, match="unknown arm 'erm2x'"):
        recipe("erm2x", [0.1, 0.0], 7)
    with pytest.raises(ValueError, match="sam takes rate"):
        recipe("sam", [0.1, 0.0], 7)


def test_mixup_and_smoothing_and_flooding_are_their_formulas(rng):
    """One plain step from the same weights on the same batch, by hand."""
    x, y = data(rng, stack=1, count=8)
    changes = {"smoothing": {"smoothing": 0.1}, "flood": {"flood": 50.0}, "mixup": {"mixup": 0.4}}
    for name, change in changes.items():
        gen = torch.Generator().manual_seed(1)
        net = StackedConvNet((1, 8, 8), 10, 1, (4, 6), generator=gen)
        twin = StackedConvNet((1, 8, 8), 10, 1, (4, 6), generator=torch.Generator().manual_seed(1))
        state = gen.get_state()
        train_stack(x, y, net, Recipe(1, rate=0.1, weight_decay=0.0, batch=8, **change), gen)
        again = torch.Generator()
        again.set_state(state)
        lam = None
        if name == "mixup":
            from scipy.stats import beta

            u = torch.rand(1, 1, generator=again).double().item()
            lam = beta.ppf(u, 0.4, 0.4)
        order = torch.rand(1, 8, generator=again).argsort(1)[0]
        images, labels = x[0, order], y[0, order]
        if name == "mixup":
            logits = twin((lam * images + (1 - lam) * images.flip(0))[None])[0]
            risks = [F.cross_entropy(logits, target) for target in (labels, labels.flip(0))]
            loss = lam * risks[0] + (1 - lam) * risks[1]
        else:
            loss = F.cross_entropy(
                twin(images[None])[0], labels, label_smoothing=change.get("smoothing", 0.0)
            )
            loss = -loss if name == "flood" else loss  # far below the flood level the sign turns
        loss.backward()
        rate = 0.1 * one_cycle(0.0) * 1.9  # Nesterov's first step is 1 + momentum
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p - rate * p.grad, q, rtol=1e-4, atol=1e-5)


def test_averaging_is_the_mean_of_the_epochs_ends(rng):
    x, y = data(rng)
    seen = []

    def keep(net):
        seen.append([p.detach().clone() for p in net.parameters()])
        return {}

    net = StackedConvNet((1, 8, 8), 10, 2, (4, 6), generator=rng)
    train_stack(x, y, net, recipe("swa", [0.1, 0.0, 0.5, 0.3], 4, 8), rng, keep)
    for p, *ends in zip(net.parameters(), *seen[2:], strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(ends).mean(0), rtol=1e-4, atol=1e-5)
    statistics = net.norm1.running_mean.clone()
    renew_statistics(net, x)  # as the training left them
    torch.testing.assert_close(net.norm1.running_mean, statistics)
    assert net.norm1.momentum == 0.1


def test_labels_are_wrong_by_exactly_the_share(rng):
    y = torch.randint(10, (200,), generator=rng)
    noisy = noisy_labels(y, 10, 0.3, 4, rng)
    assert (noisy != y).sum(1).tolist() == [60] * 4
    assert noisy.min() >= 0 and noisy.max() <= 9
    x, labels = noisy_subsets(torch.randn(200, 1, 8, 8, generator=rng), y, 50, 10, 0.3, 3, rng)
    assert x.shape == (3, 50, 1, 8, 8) and labels.shape == (3, 50)
    assert not torch.equal(x[0], x[1])


def test_the_schedule_warms_up_and_ends_at_zero():
    values = [one_cycle(i / 1000) for i in range(1000)]
    assert max(values) == one_cycle(0.25) == 1
    assert values[-1] < 1e-4 and math.isclose(one_cycle(0.625), 0.5)
