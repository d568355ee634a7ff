"""Worst-case weight perturbation: the formulas, exact restoration, the step, its state, and its errors."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.perturb import AMP, ASAM, SAM, Adversarial, Random, WeightPerturbation, norms_and_biases

RULES = [
    AMP(0.3),
    AMP(0.3, 2.0, "per_tensor"),
    AMP(1e3, 0.5),
    SAM(0.3),
    ASAM(0.5),
    Random(0.2),
    Random(0.2, 0.1),
]


def network(seed=0, norm=True):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def batches(seed=0, count=10, size=16):
    gen = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 5, generator=gen), torch.randint(3, (size,), generator=gen)) for _ in range(count)
    ]


def closure_of(net, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def train(net, optimizer, data, schedule=None):
    for x, y in data:
        optimizer.step(closure_of(net, optimizer, x, y))
        if schedule is not None:
            schedule.step()
    return net


def sgd(net, **options):
    return torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, **options
    )


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


def tensors(rng, scale=1.0):
    return [scale * torch.randn(shape, generator=rng) for shape in ((4, 3), (3,), (2, 2, 2))]


def length(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, 5.0])
def test_amp_is_a_clipped_gradient_step(rng, lr):
    grads = tensors(rng)
    free = AMP(1e6, lr)(grads)
    assert all(torch.equal(d, lr * g) for d, g in zip(free, grads, strict=True))
    inside = AMP(0.5, lr)(grads)
    torch.testing.assert_close(length(inside), torch.minimum(torch.tensor(0.5), lr * length(grads)))
    each = AMP(0.5, lr, "per_tensor")(grads)
    for d, g in zip(each, grads, strict=True):
        torch.testing.assert_close(d, lr * g * min(1.0, 0.5 / (lr * g.norm()).item()))


def test_amp_accumulates_and_clips_over_the_ascent(rng):
    first, second = tensors(rng), tensors(rng)
    rule = AMP(2.0, 0.3)
    delta = rule(second, delta=rule(first))
    inside = min(1.0, 2.0 / (0.3 * length(first)).item())
    by_hand = [0.3 * (inside * a + b) for a, b in zip(first, second, strict=True)]
    by_hand = [d * min(1.0, 2.0 / length(by_hand).item()) for d in by_hand]
    for a, b in zip(delta, by_hand, strict=True):
        torch.testing.assert_close(a, b)


def test_clipped_global_amp_is_sam(rng):
    for scale, radius in itertools.product((1e-3, 1.0, 1e3), (0.05, 0.5)):
        grads = tensors(rng, scale)
        clipped = AMP(radius, 10 * radius / length(grads).item())(grads)
        for a, b in zip(clipped, SAM(radius)(grads), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


def test_asam_is_sam_in_scaled_weights(rng):
    """With theta = T phi the gradient in phi is T g: SAM's step there, mapped back, is ASAM's."""
    weights, grads = tensors(rng), tensors(rng)
    scale = [w.abs() + 0.01 for w in weights]
    there = SAM(0.7)([t * g for t, g in zip(scale, grads, strict=True)])
    for a, t, b in zip(ASAM(0.7)(grads, weights), scale, there, strict=True):
        torch.testing.assert_close(a, t * b)
    with pytest.raises(ValueError, match="pass them"):
        ASAM(0.7)(grads)


def test_random_has_the_length_of_amp_and_no_direction(rng):
    grads = tensors(rng, 0.1)
    assert length(Random(0.3)(grads, generator=rng)).item() == pytest.approx(0.3, rel=1e-5)
    as_amp = length(Random(0.3, 0.2)(grads, generator=rng))
    torch.testing.assert_close(as_amp, length(AMP(0.3, 0.2)(grads)))
    cosines = []
    for _ in range(400):
        delta = Random(1.0)(grads, generator=rng)
        cosines.append(sum((d * g).sum() for d, g in zip(delta, grads, strict=True)) / length(grads))
    cosines = torch.stack(cosines)
    # In 23 dimensions a cosine has mean 0 and variance 1/23; the error bar of the mean over 400 is 0.0104.
    assert abs(cosines.mean()) < 4 * 0.0104
    assert cosines.var().item() == pytest.approx(1 / 23, rel=0.3)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_stacked_models_get_a_ball_each(rng, rule):
    """Two models in one stack are perturbed as each by itself; the control draws its own noise."""
    grads = [torch.randn(2, *shape, generator=rng) * torch.tensor([1.0, 9.0]).view(2, *[1] * len(shape))
             for shape in ((4, 3), (3,))]  # fmt: skip
    weights = [torch.randn_like(g) for g in grads]
    delta = rule(grads, weights, stacked=True, generator=rng)
    for s in range(2):
        alone = rule([g[s] for g in grads], [w[s] for w in weights], generator=rng)
        if isinstance(rule, Random):
            torch.testing.assert_close(length([d[s] for d in delta]), length(alone))
        else:
            for a, b in zip(delta, alone, strict=True):
                torch.testing.assert_close(a[s], b)


def test_stacked_models_may_have_a_radius_each(rng):
    grads = [torch.randn(3, 4, generator=rng), torch.randn(3, generator=rng)]
    delta = SAM(torch.tensor([0.0, 0.1, 0.2]))(grads, stacked=True)
    assert length([d[0] for d in delta]) == 0
    assert length([d[2] for d in delta]).item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: AMP(-0.1), lambda: AMP(0.1, -1.0), lambda: SAM(-1e-9), lambda: ASAM(-1.0),
             lambda: Random(-1.0), lambda: SAM(torch.tensor([0.1, -0.1]))]
)  # fmt: skip
def test_numbers_below_zero_are_refused(make):
    with pytest.raises(ValueError, match="must not be below zero"):
        make()


def test_an_unknown_ball_is_refused():
    with pytest.raises(ValueError, match="unknown ball 'globe': choose one of global, per_tensor"):
        AMP(0.1, ball="globe")


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_weights_come_back_bit_for_bit_also_after_an_exception(rule, dtype, rng):
    net = network(norm=False).to(dtype)
    x, y = batches(count=1)[0]
    before = copy.deepcopy(net)
    F.cross_entropy(net(x.to(dtype)), y).backward()
    with WeightPerturbation(net.parameters(), rule, generator=rng) as perturbation:
        assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
        assert all(p.dtype == dtype for p in [*net.parameters(), *perturbation.delta])
    assert same(net, before)
    with pytest.raises(KeyError), WeightPerturbation(net.parameters(), rule, generator=rng):
        raise KeyError
    assert same(net, before)


def test_delta_comes_from_given_gradients_and_skips_what_is_named():
    net = network()
    grads = [torch.ones_like(p) for p in net.parameters()]
    skip = norms_and_biases(net)
    assert [tuple(p.shape) for p in skip] == [(8,), (8,), (8,), (3,)]  # bias, norm weight and bias, bias
    before = copy.deepcopy(net)
    with WeightPerturbation(net.parameters(), SAM(0.5), grads=grads, skip=skip) as perturbation:
        moved = [not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)]
        assert moved == [p.ndim == 2 for p in net.parameters()]
        assert perturbation.gauges()["norm"].item() == pytest.approx(0.5, rel=1e-5)
    assert same(net, before)
    frozen = network()
    frozen[0].requires_grad_(False)
    with WeightPerturbation(frozen.parameters(), SAM(0.5), grads=grads) as perturbation:
        assert len(perturbation.delta) == 4


def test_groups_may_have_a_radius_of_their_own():
    net = network()
    groups = [{"params": [p]} for p in net.parameters()]
    groups[0]["radius"], groups[1]["radius"] = 0.1, 0
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with WeightPerturbation(groups, AMP(0.5)) as perturbation:
        own, *shared = perturbation.delta
        assert len(shared) == 4
        assert own.norm().item() == pytest.approx(0.1, rel=1e-5)
        assert length(shared).item() == pytest.approx(0.5, rel=1e-5)
        assert perturbation.gauges()["clipped"] == 1
    with pytest.raises(ValueError, match="eps must not be below zero"):
        Adversarial(torch.optim.SGD([{"params": [*net.parameters()], "radius": -1.0}], 0.1), AMP(0.5), net)


def test_gradients_that_lack_are_an_error_or_left_alone():
    net, spare = network(), nn.Linear(2, 2)
    params = [*net.parameters(), *spare.parameters()]
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        WeightPerturbation(params, AMP(0.5)).__enter__()
    x, y = batches(count=1)[0]
    F.cross_entropy(net(x), y).backward()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"2 of 8 parameters have no gradient \(shapes \(2, 2\), \(2,\)\)"):
        WeightPerturbation(params, AMP(0.5)).__enter__()
    assert same(net, before)
    with WeightPerturbation(params, AMP(0.5), missing="skip") as perturbation:
        assert all(d.count_nonzero() == 0 for d in perturbation.delta[-2:])
        net.zero_grad()  # who has a gradient now does not matter
    assert same(net, before)
    with pytest.raises(RuntimeError, match="belongs inside"):
        perturbation.ascend()


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        WeightPerturbation(table.parameters(), AMP(0.5)).__enter__()


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda net: torch.optim.AdamW(net.parameters(), 1e-2)])
@pytest.mark.parametrize("options", [{"rule": AMP(0.5), "steps": 0}, {"rule": AMP(0.0)}, {"rule": SAM(0.0)}])
def test_no_perturbation_is_plain_training_bit_for_bit(make, options):
    plain, wrapped = network(), network()
    base = make(plain)
    train(plain, base, batches())
    train(wrapped, Adversarial(make(wrapped), module=wrapped, **options), batches())
    assert same(plain, wrapped)  # the batch-norm statistics are part of it


def test_clipped_amp_and_sam_train_alike():
    nets = [network(), network()]
    for net, rule in zip(nets, (AMP(0.05, 1e3), SAM(0.05)), strict=True):
        train(net, Adversarial(sgd(net), rule, net), batches())
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_quadratic_identity(steps, rng):
    """L = theta' H theta / 2: N free ascent steps and a descent give theta - eta H (I + zeta H)^N theta."""
    a = torch.randn(4, 4, generator=rng, dtype=torch.double)
    H, eta, zeta = a @ a.T, 0.05, 0.2
    theta = nn.Parameter(torch.randn(4, generator=rng, dtype=torch.double))
    start = theta.detach().clone()
    optimizer = Adversarial(torch.optim.SGD([theta], eta), AMP(1e6, zeta), None, steps=steps)

    def closure():
        loss = theta @ H @ theta / 2
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    up = torch.linalg.matrix_power(torch.eye(4) + zeta * H, steps)
    torch.testing.assert_close(theta.detach(), start - eta * H @ up @ start)
    torch.testing.assert_close(loss.detach(), start @ H @ start / 2)  # the loss at theta


def test_the_gradient_gains_the_norm_s_gradient_to_first_order(rng):
    """g(theta + zeta g) = grad (L + zeta/2 |g|^2) + O(zeta^2): half of the paper's Omega."""
    theta = torch.randn(6, generator=rng, dtype=torch.double, requires_grad=True)

    def risk(t):
        return (t.cos() * t.roll(1)).sum() + t.pow(4).sum() / 10

    (g,) = torch.autograd.grad(risk(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum() / 2, theta)
    errors = []
    for zeta in (1e-2, 5e-3):
        up = (theta + zeta * g).detach().requires_grad_(True)
        (moved,) = torch.autograd.grad(risk(up), up)
        errors.append((moved - g - zeta * second).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_saved_and_loaded_in_the_middle_is_as_if_never_stopped(rule):
    def build(seed=0):
        net = network(seed)
        gen = torch.Generator().manual_seed(seed + 1)
        optimizer = Adversarial(sgd(net), rule, net, generator=gen)
        return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    whole, optimizer, schedule = build()
    train(whole, optimizer, batches(), schedule)
    first, optimizer, schedule = build()
    train(first, optimizer, batches()[:5], schedule)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    again, optimizer, schedule = build(seed=7)
    parts = torch.load(file, weights_only=True)
    for part, state in zip((again, optimizer, schedule), parts, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, batches()[5:], schedule)
    assert same(whole, again)
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


@pytest.mark.parametrize("on", ["base", "wrapper"])
def test_schedulers_reach_the_base_before_and_after_a_load(on):
    net = network()
    optimizer = Adversarial(sgd(net), AMP(0.1), net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.base if on == "base" else optimizer, 0.5)
    train(net, optimizer, batches(count=2), schedule)
    assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025
    optimizer.load_state_dict(optimizer.state_dict())
    train(net, optimizer, batches(count=1), schedule)
    assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.0125


def test_states_of_another_rule_are_refused_and_of_a_bare_base_welcome():
    net = network()
    optimizer, bare = Adversarial(sgd(net), AMP(0.1), net), sgd(network())
    with pytest.raises(ValueError, match=r"this state is of SAM\(rho=0.1\) with 1 steps, not of AMP"):
        optimizer.load_state_dict(Adversarial(sgd(net), SAM(0.1), net).state_dict())
    bare.param_groups[0]["lr"] = 0.3
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups is not optimizer.param_groups and copied.rule == optimizer.rule


def test_statistics_come_from_the_clean_pass_alone_unless_asked_otherwise():
    x, y = batches(count=1)[0]
    expected = network()
    expected(x)  # one pass in training mode at theta
    for statistics, passes in (("clean", 1), ("all", 3)):
        net = network()
        optimizer = Adversarial(sgd(net), AMP(0.5), net, steps=2, statistics=statistics)
        optimizer.step(closure_of(net, optimizer, x, y))
        assert net[1].num_batches_tracked == passes
        assert torch.equal(net[1].running_var, expected[1].running_var) == (statistics == "clean")
        assert net[1].track_running_stats
    net.eval()  # frozen batch norm stays so
    optimizer.step(closure_of(net, optimizer, x, y))
    assert net[1].num_batches_tracked == 3


def test_delta_from_a_part_of_the_batch():
    x, y = batches(count=1)[0]
    nets, calls = [network(norm=False), network(norm=False)], []
    optimizer = Adversarial(sgd(nets[0]), AMP(0.5), nets[0])
    part = closure_of(nets[0], optimizer, x[:4], y[:4])
    optimizer.step(closure_of(nets[0], optimizer, x, y), ascent=lambda: calls.append(1) or part())
    assert calls == [1]
    base = sgd(nets[1])
    F.cross_entropy(nets[1](x[:4]), y[:4]).backward()
    with WeightPerturbation(nets[1].parameters(), AMP(0.5)):
        base.zero_grad()
        F.cross_entropy(nets[1](x), y).backward()
    base.step()
    assert same(*nets)


def test_micro_batches_accumulate_inside_the_closure():
    x, y = batches(count=1)[0]
    nets = [network(norm=False).double(), network(norm=False).double()]
    for net, parts in zip(nets, (1, 4), strict=True):
        optimizer = Adversarial(sgd(net), AMP(0.5), net)

        def closure(net=net, parts=parts):
            total = 0.0
            for a, b in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(net(a), b) / parts
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(closure)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_in_bf16_and_a_compiled_network_take_the_same_step():
    x, y = batches(count=1)[0]
    nets = [network(norm=False) for _ in range(3)]
    runs = [nets[0], torch.compile(nets[1], backend="eager"), nets[2]]
    for net, run, low in zip(nets, runs, (False, False, True), strict=True):
        optimizer = Adversarial(sgd(net), SAM(0.5), net)

        def closure(run=run, low=low):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = F.cross_entropy(run(x), y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    assert same(nets[0], nets[1])
    for a, b in zip(nets[0].parameters(), nets[2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)  # bf16 keeps 8 bits


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_closure_that_fails_leaves_theta(fails_at):
    net = network()
    optimizer = Adversarial(sgd(net), AMP(0.5), net, steps=2)
    x, y = batches(count=1)[0]
    inner, calls = closure_of(net, optimizer, x, y), []
    before = copy.deepcopy(dict(net.named_parameters()))

    def closure():
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("a batch")
        return inner()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert net[1].track_running_stats


def test_wrong_calls_say_what_to_do():
    net = network()
    optimizer = Adversarial(sgd(net), AMP(0.5), net)
    with pytest.raises(TypeError, match="needs a closure.*GradScaler"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    x, y = batches(count=1)[0]
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    with pytest.raises(TypeError, match="use bf16 autocast"):
        scaler.step(optimizer)
    with pytest.raises(ValueError, match=r"has to call loss.backward\(\)"):
        optimizer.step(lambda: F.cross_entropy(net(x), y))
    with pytest.raises(TypeError, match="LBFGS"):
        Adversarial(torch.optim.LBFGS(net.parameters()), AMP(0.5), net)
    with pytest.raises(ValueError, match="steps must not be below zero"):
        Adversarial(sgd(net), AMP(0.5), net, steps=-1)
    with pytest.raises(ValueError, match='"clean" or "all"'):
        Adversarial(sgd(net), AMP(0.5), net, statistics="both")
    with pytest.raises(ValueError, match='"error" or "skip"'):
        Adversarial(sgd(net), AMP(0.5), net, missing="ignore")


def test_the_gauges_tell_length_and_clip_rate():
    net = network()
    optimizer = Adversarial(sgd(net), AMP(0.01, 10.0, "per_tensor"), net)
    assert optimizer.gauges() == {}
    train(net, optimizer, batches(count=1))
    # The first layer's bias stands before a batch norm: no gradient but rounding, a ball that stays empty.
    assert optimizer.gauges()["clipped"].item() == pytest.approx(5 / 6)
    assert optimizer.gauges()["norm"].item() == pytest.approx(0.01 * 5**0.5, rel=1e-3)


def test_amp_does_not_stay_in_the_narrow_one_of_two_bowls():
    """Risk 1 - sum_k A_k exp(-(t - m_k)^2 / 2 s_k^2): ERM stays in the narrow, deeper bowl, AMP leaves it for
    the ridge, and in the wide bowl AMP stays."""

    def risk(t):
        return 1 - (-((t + 1) ** 2) / (2 * 0.15**2)).exp() - 0.95 * (-((t - 1) ** 2) / (2 * 0.8**2)).exp()

    ends = []
    for start, eps in ((-0.95, 0.0), (-0.95, 0.5), (0.3, 0.5)):
        t = nn.Parameter(torch.tensor(start))
        optimizer = Adversarial(torch.optim.SGD([t], 0.05), AMP(eps, 10.0), None)

        def closure(t=t):
            loss = risk(t)
            loss.backward()
            return loss

        for _ in range(200):
            optimizer.step(closure)
        ends.append(t.item())
    assert ends[0] == pytest.approx(-1, abs=0.1)
    assert ends[1] > -0.6  # more than two widths off
    assert ends[2] == pytest.approx(1, abs=0.1)
