"""Attacks against robust accuracies known in closed form, a public library, and contrived defences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.attacks import attack_defended, pgd, project, wilson_interval
from companion.energies import Gaussian
from companion.purify import Defended, Purifier

DIM = 12


def two_classes(seed=0):
    """A linear classifier of two classes, w and b of its margin w^T x + b, and images with its own labels."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(DIM, 2).double().eval()
    with torch.no_grad():
        net.weight.normal_(generator=generator)
        net.bias.normal_(generator=generator)
    w, b = (net.weight[1] - net.weight[0]).detach(), (net.bias[1] - net.bias[0]).detach()
    x = torch.rand(200, DIM, generator=generator, dtype=torch.float64) * 2 - 1
    return net, w, b, x, (x @ w + b > 0).long()


def smooth_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double().eval()


def right(net, x, y):
    return net(x).argmax(1) == y


# The deterministic attack


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("radius", [0.05, 0.3])
def test_pgd_reaches_the_exact_robust_accuracy_of_a_linear_classifier(norm, radius, random_start, rng):
    """Robust iff |w^T x + b| > radius |w|_1 in l-infinity, > radius |w|_2 in l2."""
    net, w, b, x, y = two_classes()
    adversarial = pgd(
        net, x, y, radius=radius, step_size=radius / 4, steps=40, norm=norm, generator=rng, bounds=None,
        random_start=random_start,
    )  # fmt: skip
    held = (x @ w + b).abs() > radius * w.norm(p={"linf": 1, "l2": 2}[norm])
    assert 0.1 < held.double().mean() < 0.95
    assert torch.equal(right(net, adversarial, y), held)


def test_pgd_in_a_box_reaches_the_nearest_corner_that_is_allowed(rng):
    """With bounds each pixel moves against the label by the radius or to the rim, whichever is nearer."""
    net, w, b, x, y = two_classes()
    adversarial = pgd(net, x, y, radius=0.4, step_size=0.1, steps=20, generator=rng)
    side = torch.where(y == 1, -1.0, 1.0).unsqueeze(1) * w.sign()
    worst = (x + 0.4 * side).clamp(-1, 1)
    held = ((worst @ w + b > 0) == (y == 1)) & ((x @ w + b > 0) == (y == 1))
    free = ((x + 0.4 * side) @ w + b > 0) == (y == 1)
    assert held.sum() > free.sum()  # the box matters
    assert torch.equal(right(net, adversarial, y), held)
    torch.testing.assert_close(adversarial[held], worst[held])  # the highest loss is at that corner


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    radius=st.floats(0, 3),
    step_size=st.floats(0, 5),
    seed=st.integers(0, 10**6),
    boxed=st.booleans(),
    double=st.booleans(),
)
def test_no_image_leaves_the_ball_or_the_bounds(norm, radius, step_size, seed, boxed, double):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    x = torch.empty(5, 1, 4, 4, dtype=dtype).uniform_(-1, 1, generator=generator)
    y, bounds = torch.tensor([0, 1, 2, 3, 0]), (-1.0, 1.0) if boxed else None
    out = pgd(
        smooth_net().to(dtype), x, y, radius=radius, step_size=step_size, steps=3, norm=norm,
        generator=generator, bounds=bounds,
    )  # fmt: skip
    away = project(x + step_size * torch.randn(x.shape, generator=generator), x, radius, norm, bounds)
    for z in (out, away):
        offset = (z - x).flatten(1)
        length = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
        assert (length <= radius * (1 + 1e-5) + 1e-6).all()
        assert not boxed or (z.abs() <= 1).all()
    assert out.dtype == dtype and out.shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_the_identity_inside_and_idempotent(norm, rng):
    x, z = torch.randn(2, 6, 5, dtype=torch.float64, generator=rng)
    once = project(z, x, 0.8, norm)
    torch.testing.assert_close(project(once, x, 0.8, norm), once)
    near = x + 1e-3 * z
    assert torch.equal(project(near, x, 0.8, norm), near)


def test_the_first_adversarial_is_kept_and_a_wrong_image_comes_back(rng):
    """Steps of 0.1 along a line whose border lies at 0.25: the third iterate is returned, not the last."""
    net = lambda z: torch.cat([0.25 - z, z - 0.25], 1)  # noqa: E731
    x = torch.tensor([[0.0], [0.5], [-0.9]], dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.long)
    out = pgd(net, x, y, radius=0.8, step_size=0.1, steps=8, random_start=False)
    torch.testing.assert_close(out, torch.tensor([[0.3], [0.5], [-0.1]], dtype=torch.float64))


def test_without_a_break_the_iterate_of_highest_loss_is_returned():
    """A step far too long jumps back and forth over a bump of the loss; the last iterate is not the best."""
    net = lambda z: torch.cat([1 + z.square(), torch.zeros_like(z)], 1)  # noqa: E731
    x = torch.tensor([[0.4]], dtype=torch.float64)
    for steps in (3, 4):  # iterates 0.4, 0.1, -0.2, 0.1, -0.2
        out = pgd(net, x, torch.zeros(1).long(), radius=2.0, step_size=0.3, steps=steps, random_start=False)
        assert out.item() == pytest.approx(0.1)


def test_a_break_is_kept_also_where_an_earlier_iterate_had_a_higher_loss():
    """Three classes: right by a hair against two others costs more than wrong by a hair against one."""

    def net(z):
        near = torch.cat([0.1 - 1e-3 * z, 1e-3 * z, 0 * z], 1)
        far = torch.cat([0 * z, 0.05 + z, -10 + 0 * z], 1)
        return torch.where(z < 0.25, near, far)

    x = torch.zeros(1, 1, dtype=torch.float64)
    out = pgd(net, x, torch.zeros(1).long(), radius=0.3, step_size=0.3, steps=1, random_start=False)
    assert out.item() == pytest.approx(0.3)


def test_restarts_find_what_one_start_does_not_and_only_move_those_that_hold(rng):
    """No gradient, and wrong on a tenth of the ball: k starts break a share 1 - 0.9^k of 2,000 images."""
    seen = []

    def flat(z):
        seen.append(len(z))
        wrong = (z > 0.8).double()
        return torch.cat([1 - wrong, wrong], 1) + 0 * z

    x, y = torch.zeros(2000, 1, dtype=torch.float64), torch.zeros(2000, dtype=torch.long)
    arguments = {"radius": 1.0, "step_size": 0.1, "steps": 1, "generator": rng}
    for restarts in (1, 5):
        out = pgd(flat, x, y, restarts=restarts, **arguments)
        expected = 1 - 0.9**restarts
        spread = math.sqrt(expected * (1 - expected) / 2000)
        assert (out > 0.8).double().mean().item() == pytest.approx(expected, abs=5 * spread)
    assert seen[-1] < 0.72 * 2000  # the fifth start had only the rest to move


def test_random_starts_are_uniform_in_the_ball(rng):
    """Mean |z - x|^2: r^2 D/3 in the cube, r^2 D/(D+2) in the ball; 20,000 images, within 2 %."""
    net = lambda z: torch.stack([1 + 0 * z.sum(1), 0 * z.sum(1)], 1)  # noqa: E731
    x, y = torch.zeros(20_000, 3), torch.zeros(20_000, dtype=torch.long)
    for norm, expected in (("linf", 0.5**2 * 3 / 3), ("l2", 0.5**2 * 3 / 5)):
        out = pgd(net, x, y, radius=0.5, step_size=1e-9, steps=0, norm=norm, generator=rng)
        assert out.square().sum(1).mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_confident_classifier_does_not_stall_the_attack(norm):
    """The label's logit leads by 25: in single precision its probability is 1 and the loss is flat."""
    net = lambda z: torch.cat([25 * (1 - z), 0 * z], 1)  # noqa: E731
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    out = pgd(net, x, y, radius=0.9, step_size=0.3, steps=5, norm=norm, random_start=False)
    assert out.item() == pytest.approx(0.9)


def test_parameters_and_images_are_left_alone(rng):
    net = smooth_net()
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64, generator=rng)
    before = x.clone()
    y = net(x).argmax(1)
    pgd(net, x, y, radius=0.3, step_size=0.1, steps=3, generator=rng)
    assert torch.equal(x, before)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.2), ("l2", 0.5)])
def test_pgd_is_the_one_of_foolbox(norm, radius, rng):
    """From the library's iterates without random start: the first adversarial, or that of highest loss."""
    attacks = pytest.importorskip("foolbox")
    net, steps = smooth_net(), 7
    x = torch.rand(40, 1, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    y = net(x).argmax(1)
    kind = {"linf": attacks.attacks.LinfBasicIterativeAttack, "l2": attacks.attacks.L2BasicIterativeAttack}
    model = attacks.PyTorchModel(net, bounds=(-1, 1))
    iterates = [x]
    for k in range(1, steps + 1):
        public = kind[norm](abs_stepsize=radius / 4, steps=k, random_start=False)
        iterates.append(public.run(model, x, attacks.criteria.Misclassification(y), epsilon=radius))
    iterates = torch.stack(iterates)  # (steps + 1, B, 1, 4, 4)
    wrong = torch.stack([~right(net, z, y) for z in iterates])
    loss = torch.stack([F.cross_entropy(net(z), y, reduction="none") for z in iterates])
    pick = torch.where(wrong.any(0), wrong.int().argmax(0), loss.argmax(0))
    assert 0.2 < wrong.any(0).double().mean() < 0.9 and len(pick[wrong.any(0)].unique()) > 2
    ours = pgd(net, x, y, radius=radius, step_size=radius / 4, steps=steps, norm=norm, random_start=False)
    torch.testing.assert_close(ours, iterates[pick, torch.arange(40)])


# The attack on a defence


def scaling(factor, dim=DIM, std=0.01):
    """A purifier of one step whose derivative is ``factor``, everywhere, with noise of about 2 std."""
    eps = std * math.sqrt(2 * (1 - factor))
    return Purifier(Gaussian(torch.zeros(dim), torch.full((dim,), std**2)), 1, eps)


def test_bpda_and_full_agree_where_the_chain_only_shrinks(rng):
    """A positive multiple of a gradient has its sign: the same iterates, so the same result throughout."""
    net, _, _, x, y = two_classes()
    results = [
        attack_defended(
            Defended(net, scaling(0.6)), x, y, radius=0.3, step_size=0.1, steps=6, gradient=gradient,
            attack_replicas=4, replicas=16, generator=torch.Generator().manual_seed(5),
        )
        for gradient in ("bpda", "full")
    ]  # fmt: skip
    for a, b in zip(vars(results[0]).values(), vars(results[1]).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_full_gradient_breaks_what_bpda_does_not(rng):
    """The chain turns the image over, x -> -0.9 x. BPDA climbs down, the full gradient to the known optimum.

    Robust iff the margin at -0.9 x is above 0.9 radius |w|_1; images within 5 sd of the noise's effect on the
    logits' margin (eps |w|_2 / sqrt R) of that border, or of the border of being right, are left out.
    """
    net, w, b, x, _ = two_classes()
    radius, factor, replicas = 0.3, -0.9, 16
    purifier = scaling(factor)
    margin = x @ w * factor + b
    y = (margin > 0).long()
    doubt = 5 * purifier.step_size * w.norm() / math.sqrt(8)
    edge = radius * abs(factor) * w.norm(p=1)
    clear = (margin.abs() > doubt) & ((margin.abs() - edge).abs() > doubt)
    x, y, held = x[clear], y[clear], (margin.abs() > edge)[clear]
    assert len(x) > 120 and 0.1 < held.double().mean() < 0.9
    results = {
        gradient: attack_defended(
            Defended(net, purifier), x, y, radius=radius, step_size=radius / 4, steps=20, bounds=None,
            gradient=gradient, attack_replicas=8, replicas=replicas, random_start=False, generator=rng,
        )
        for gradient in ("bpda", "full")
    }  # fmt: skip
    assert torch.equal(~results["full"].broken, held)
    assert not results["bpda"].broken.any()
    assert results["bpda"].natural_accuracy == results["full"].natural_accuracy == 1.0


class Scripted:
    """Answers class 0, except where the script of its ``attack`` or ``judge`` says wrong for (image, ask)."""

    def __init__(self, attack, judge, attack_replicas=2):
        self.scripts = {attack_replicas: attack}
        self.judge, self.asked, self.batches = judge, {}, []

    def __call__(self, x, generator, *, replicas, gradient=None):
        script = self.scripts.get(replicas, self.judge)
        self.batches.append((replicas, len(x)))
        wrong = []
        for image in x[:, 0].round().long().tolist():
            count = self.asked.get((replicas, image), 0)
            self.asked[replicas, image] = count + 1
            wrong.append(float(count in script.get(image, ())))
        wrong = torch.tensor(wrong, dtype=x.dtype)
        return torch.stack([1 - wrong, wrong], 1) + 0 * x


def test_two_stage_count():
    """Image 0 never proposed; 1 proposed and confirmed; 2 proposed thrice, confirmed at the third; 3 proposed
    but never confirmed; 4 wrong before the attack. Ask 0 of the judge is the natural one."""
    attack = {1: {2}, 2: {0, 1, 3}, 3: {1, 4}, 4: {0}}
    judge = {1: {1}, 2: {3}, 4: {0}}
    x = torch.arange(5.0).unsqueeze(1).expand(5, 2).clone()
    defended = Scripted(attack, judge)
    result = attack_defended(
        defended, x, torch.zeros(5).long(), radius=0.2, step_size=0.1, steps=4, bounds=None,
        attack_replicas=2, replicas=9, generator=torch.Generator(),
    )  # fmt: skip
    assert result.natural.tolist() == [True, True, True, True, False]
    assert result.broken.tolist() == [False, True, True, False, True]
    assert result.iterate.tolist() == [-1, 2, 3, -1, 0]
    assert result.proposals.tolist() == [0, 1, 3, 2, 0]
    assert result.natural_accuracy == pytest.approx(0.8) and result.robust_accuracy == pytest.approx(0.4)
    assert [result.robust_after(k) for k in range(5)] == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.4])
    assert result.interval == wilson_interval(2, 5)
    assert torch.equal(result.adversarial[4], x[4]) and (result.adversarial - x).abs().max() <= 0.2 + 1e-6
    looks = [size for replicas, size in defended.batches if replicas == 2]
    retests = [size for replicas, size in defended.batches if replicas == 9]
    assert looks == [4, 4, 4, 3, 2]  # broken images leave the batch
    assert retests == [5, 1, 2, 1, 1, 1]  # all at first, then only those proposed


class Coin:
    """Wrong with probability ``p`` a call, whatever the image and the number of replicas."""

    def __init__(self, p):
        self.p = p

    def __call__(self, x, generator, *, replicas, gradient=None):
        wrong = (torch.rand(len(x), generator=generator) < self.p).to(x)
        return torch.stack([1 - wrong, wrong], 1) + 0 * x[:, :1]


@pytest.mark.parametrize("arguments", [{"step_size": 0.0, "radius": 0.3}, {"step_size": 0.1, "radius": 0.0}])
def test_the_count_alone_breaks_a_random_defence_at_the_known_rate(arguments, rng):
    """A natural test and n asks, each broken with p^2: (1 - p) (1 - p^2)^n hold; 20,000 images."""
    p, steps, images = 0.2, 9, 20_000
    x = torch.zeros(images, 2)
    result = attack_defended(
        Coin(p), x, torch.zeros(images).long(), steps=steps, generator=rng, restarts=2, **arguments
    )
    expected = (1 - p) * (1 - p**2) ** (2 * (steps + 1))
    spread = math.sqrt(expected * (1 - expected) / images)
    assert result.robust_accuracy == pytest.approx(expected, abs=5 * spread)
    assert torch.equal(result.adversarial, x)  # nothing moved
    assert result.iterate.max() == 2 * (steps + 1) - 1


def test_the_control_asks_a_real_defence_without_touching_the_images(rng):
    """Margins 20 times the noise of the averaged logits: the count breaks nothing, though asked 11 times."""
    net, w, b, x, y = two_classes()
    purifier = Purifier(None, 4, 0.05)
    clear = (x @ w + b).abs() > 20 * 0.1 * w.norm() / math.sqrt(4)
    result = attack_defended(
        Defended(net, purifier), x[clear], y[clear], radius=0.5, step_size=0, steps=10, attack_replicas=4,
        replicas=8, generator=rng,
    )  # fmt: skip
    assert result.robust_accuracy == result.natural_accuracy == 1.0 and not result.proposals.any()
    assert torch.equal(result.adversarial, x[clear])


@pytest.mark.parametrize("gradient", ["bpda", "full"])
def test_the_same_generator_gives_the_same_attack(gradient):
    net, _, _, x, y = two_classes()
    defended = Defended(net, Purifier(Gaussian(torch.zeros(DIM), torch.ones(DIM)), 3, 0.4), max_batch=300)
    runs = [
        attack_defended(
            defended, x, y, radius=0.2, step_size=0.1, steps=3, norm="l2", restarts=2, gradient=gradient,
            attack_replicas=3, replicas=5, generator=torch.Generator().manual_seed(11),
        )
        for _ in range(2)
    ]  # fmt: skip
    for a, b in zip(vars(runs[0]).values(), vars(runs[1]).values(), strict=True):
        assert torch.equal(a, b)


def test_wilson_interval_is_the_textbook_one():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson_interval(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    for arguments in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="share"):
            wilson_interval(*arguments)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "norm"),
        ({"radius": -0.1}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"step_size": -1.0}, "step_size"),
        ({"steps": -1}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"x": torch.full((3, 2), 2.0)}, "bounds"),
        ({"x": torch.full((3, 2), math.nan), "bounds": None}, "finite"),
        ({"x": torch.zeros(3, 2).long()}, "floating"),
        ({"y": torch.zeros(2).long()}, "labels"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    net = nn.Linear(2, 2)
    arguments = {"x": torch.zeros(3, 2), "y": torch.zeros(3).long()}
    arguments |= {"radius": 0.1, "step_size": 0.1, "steps": 2} | change
    for attack in (
        lambda **kw: pgd(net, **kw),
        lambda **kw: attack_defended(Defended(net, Purifier(None, 1, 0.1)), **kw),
    ):
        with pytest.raises(ValueError, match=message):
            attack(**arguments)


def test_what_only_one_of_the_attacks_can_get_wrong():
    x, y, net = torch.zeros(3, 2), torch.zeros(3).long(), nn.Linear(2, 2)
    arguments = {"radius": 0.1, "step_size": 0.1, "steps": 2}
    with pytest.raises(ValueError, match="repeats"):
        pgd(net, x, y, restarts=2, random_start=False, **arguments)
    with pytest.raises(ValueError, match="logits"):
        pgd(lambda z: z.sum(1), x, y, **arguments)
    with pytest.raises(FloatingPointError, match="logits"):
        pgd(lambda z: z / 0, x, y, **arguments)
    with pytest.raises(FloatingPointError, match="gradient"):  # the root's slope at its branch point
        kink = lambda z: torch.cat([z.abs().sum(1, True).sqrt() + 1, z[:, :1]], 1)  # noqa: E731
        pgd(kink, x, y, random_start=False, **arguments)
    defended = Defended(net, Purifier(None, 1, 0.1))
    for change, message in (
        ({"gradient": "none"}, "'bpda' or 'full'"),
        ({"attack_replicas": 0}, "attack_replicas"),
        ({"replicas": 0}, "replicas"),
    ):
        with pytest.raises(ValueError, match=message):
            attack_defended(defended, x, y, **arguments, **change)
