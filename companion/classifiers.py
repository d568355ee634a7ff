"""Small convolutional classifiers, S side by side in stacked weights, and their training on bad labels.

Every parameter has a leading dimension S. A convolution is a matrix product over patches, batched over the
models: forward and backward of the book's network, five models of 50 images, took 6 ms of one core so and 16
as a grouped convolution. Models share images and nothing else: subset, labels, order, mixing weights and
initial values are each one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._recorded import Steps, tensors_of
from companion.networks import StackedLinear
from companion.perturb import AMP, ASAM, SAM, Adversarial, Random, Rule

__all__ = [
    "ARMS",
    "Recipe",
    "StackedConvNet",
    "Training",
    "noisy_labels",
    "noisy_subsets",
    "one_cycle",
    "recipe",
    "renew_statistics",
    "train_stack",
]


class StackedNorm(nn.BatchNorm1d):
    """Batch normalisation, a model and channel at a time, of ``(S, N, C)``; weight and bias: ``(S, C)``."""

    def __init__(self, channels: int, stack: int) -> None:
        super().__init__(stack * channels)
        self.weight = nn.Parameter(torch.ones(stack, channels))
        self.bias = nn.Parameter(torch.zeros(stack, channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(1)  # (N, S*C)
        tracked = not self.training or self.track_running_stats
        if self.training and tracked:
            self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the plain average over batches, with which statistics are recomputed
            momentum = 1 / float(max(self.num_batches_tracked, 1))
        flat = F.batch_norm(
            flat, self.running_mean if tracked else None, self.running_var if tracked else None,
            self.weight.flatten(), self.bias.flatten(), self.training, momentum, self.eps,
        )  # fmt: skip
        return flat.unflatten(1, self.weight.shape).transpose(0, 1)


class StackedConvNet(nn.Module):
    """conv 5x5 of stride 2, conv 2x2 of stride 2, each batch-normalised with ReLU, and a linear layer.

    ``(S, B, C, H, W)`` -> logits ``(S, B, classes)``; images ``(B, C, H, W)`` are shown to all S models. With
    8x8 images and widths (32, 128) a model has 22,634 weights. ``ValueError`` unless 4 divides H and W.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        stack: int,
        widths: tuple[int, int] = (32, 128),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, height, side = shape
        if height % 4 or side % 4:
            raise ValueError(f"StackedConvNet halves the image twice: {height}x{side} is not divisible by 4")
        self.shape, self.stack = tuple(shape), stack
        first, second = widths
        make = lambda a, b, bias: StackedLinear(a, b, stack, bias=bias, generator=generator)  # noqa: E731
        self.conv1, self.norm1 = make(25 * channels, first, False), StackedNorm(first, stack)
        self.conv2, self.norm2 = make(4 * first, second, False), StackedNorm(second, stack)
        self.head = make(second * (height // 4) * (side // 4), classes, True)
        with torch.no_grad():  # He: the official code's, for layers that ReLU follows
            for conv in (self.conv1, self.conv2):
                conv.weight.mul_(math.sqrt(6))  # from a standard deviation of 1/sqrt(3 in) to sqrt(2/in)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: ``(S, B, C, H, W)``, or ``(B, C, H, W)`` shown to all S models -> ``(S, B, classes)``."""
        channels, height, side = self.shape
        lead = (self.stack, x.shape[-4])
        x = x.expand(*lead, *x.shape[-3:])
        x = F.pad(x, (2, 2, 2, 2)).unfold(3, 5, 2).unfold(4, 5, 2)  # (S, B, C, H/2, W/2, 5, 5)
        x = x.permute(0, 1, 3, 4, 2, 5, 6).reshape(self.stack, -1, 25 * channels)
        h = F.relu(self.norm1(self.conv1(x)))  # (S, B*H/2*W/2, first)
        h = h.reshape(*lead, height // 4, 2, side // 4, 2, -1).transpose(3, 4)  # 2x2 blocks: nothing overlaps
        h = F.relu(self.norm2(self.conv2(h.reshape(self.stack, -1, self.conv2.weight.shape[1]))))
        return self.head(h.reshape(*lead, -1))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits ``(S, N, classes)`` in eval mode; the mode is put back."""
        training = self.training
        logits = torch.cat([self.eval()(part) for part in x.split(1000, dim=-4)], dim=1)
        self.train(training)
        return logits


@dataclass(frozen=True)
class Recipe:
    """How a stack is trained; what is not set is plain ERM.

    ``rate``: the peak of the learning rate; ``smoothing``: of the labels; ``flood``: the level b of
    ``|L - b| + b`` (Ishida et al. 2020); ``mixup``: alpha of Beta(alpha, alpha) (Zhang et al. 2018);
    ``rule``: a weight perturbation with ``steps`` ascent steps; ``average_from``: the share of the training
    from which on the rate stays at ``average_rate`` times its peak and weights are averaged, once an epoch
    (SWA; Izmailov et al. 2018; batch-norm statistics are recomputed at the end).
    """

    epochs: int
    rate: float = 0.1
    weight_decay: float = 1e-4
    batch: int = 50
    smoothing: float = 0.0
    flood: float = 0.0
    mixup: float = 0.0
    rule: Rule | None = None
    steps: int = 1
    average_from: float | None = None
    average_rate: float = 0.5


#: arm -> what its own numbers, behind rate and weight decay, mean: all that tells the arms apart.
ARMS: dict[str, Callable[..., dict]] = {
    "erm": lambda: {},
    "erm_2x": lambda: {"repeats": 2},  # as many gradient evaluations as the perturbed arms
    "smoothing": lambda: {"smoothing": 0.1},
    "flooding": lambda level: {"flood": level},
    "mixup": lambda alpha: {"mixup": alpha},
    "sam": lambda rho: {"rule": SAM(rho)},
    "asam": lambda rho: {"rule": ASAM(rho)},
    "amp": lambda eps, zeta: {"rule": AMP(eps, zeta)},
    "amp_per_tensor": lambda eps, zeta: {"rule": AMP(eps, zeta, "per_tensor")},
    "random": lambda eps: {"rule": Random(eps)},
    "swa": lambda start, rate: {"average_from": start, "average_rate": rate},
}


def recipe(arm: str, numbers: Sequence[float], epochs: int, batch: int = 50) -> Recipe:
    """The recipe of one of ``ARMS`` from its numbers: rate, weight decay, then the arm's own.

    Raises ``ValueError`` for an unknown arm or a wrong count of numbers.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    rate, weight_decay, *own = numbers
    try:
        chosen = ARMS[arm](*own)
    except TypeError as error:
        raise ValueError(f"{arm} takes rate, decay and its own numbers, got {list(numbers)}") from error
    epochs *= chosen.pop("repeats", 1)
    return Recipe(epochs=epochs, rate=rate, weight_decay=weight_decay, batch=batch, **chosen)


@dataclass
class Training:
    """A trained stack. ``curves``: ``(epochs, S)`` a gauge; ``evaluations``: gradients taken, a model."""

    net: StackedConvNet
    curves: dict[str, Tensor] = field(default_factory=dict)
    evaluations: int = 0


def noisy_labels(y: Tensor, classes: int, share: float, stack: int, generator: torch.Generator) -> Tensor:
    """``(N,)`` -> ``(S, N)``: in each copy that share of labels, rounded, is replaced by another class."""
    out = y.expand(stack, -1).clone()
    wrong = torch.rand(out.shape, generator=generator, device=y.device).argsort(1)[:, : round(share * len(y))]
    shift = torch.randint(1, classes, wrong.shape, generator=generator, device=y.device)
    return out.scatter(1, wrong, (out.gather(1, wrong) + shift) % classes)


def noisy_subsets(
    x: Tensor, y: Tensor, count: int, classes: int, share: float, stack: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each of S models ``count`` images of its own, ``(S, count, C, H, W)``, and labels with noise."""
    rows = torch.rand(stack, len(x), generator=generator, device=x.device).argsort(1)[:, :count]
    labels = [noisy_labels(y[r], classes, share, 1, generator) for r in rows]
    return x[rows], torch.cat(labels)


def one_cycle(share: float, warm: float = 0.25) -> float:
    """The rate's factor at a share of the training in [0, 1): up linearly to 1, then down along a cosine."""
    if share < warm:
        return 0.04 + 0.96 * share / warm
    return (1 + math.cos(math.pi * (share - warm) / (1 - warm))) / 2


def train_stack(
    x: Tensor,
    y: Tensor,
    net: StackedConvNet,
    recipe: Recipe,
    generator: torch.Generator,
    monitor: Callable[[StackedConvNet], dict[str, Tensor]] | None = None,
    skip: Iterable[Tensor] = (),
    compile: bool | None = None,
) -> Training:
    """Train ``net`` in place on images ``(S, N, C, H, W)`` and labels ``(S, N)``; SGD, Nesterov momentum 0.9.

    Batches are drawn without replacement, each model in an order of its own; the last, incomplete batch of an
    epoch is left out. ``monitor`` is called after each epoch and returns ``(S,)`` gauges; with a rule,
    ``norm`` and ``clipped`` of the epoch's last perturbation stand beside them. ``skip``: parameters that the
    rule leaves unmoved. ``compile``: None takes an update, both passes of a rule included, as one recorded
    call on a GPU, with the plain loop's numbers up to rounding; False never; True raises
    ``NotCompilableError`` where that cannot be. Raises ``ValueError`` for fewer images than a batch and
    ``RuntimeError`` if a weight is not finite at the end.
    """
    stack, count = y.shape
    updates = count // recipe.batch
    if not updates:
        raise ValueError(f"{count} images do not fill a batch of {recipe.batch}")
    sgd = torch.optim.SGD(
        net.parameters(), lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    optimizer: torch.optim.Optimizer = sgd
    if recipe.rule is not None:
        optimizer = Adversarial(
            sgd, recipe.rule, net, steps=recipe.steps, skip=skip, stacked=True, generator=generator
        )
    models = torch.arange(stack, device=x.device)[:, None]
    curves: dict[str, list[Tensor]] = {}
    mean, averaged = [], 0
    total, passes = recipe.epochs * updates, 0
    weights = _mixing_weights(recipe.mixup, total, stack, generator).to(x.device) if recipe.mixup else None
    net.train()

    def update(rows: Tensor, *mixing: Tensor) -> dict[str, Tensor]:
        nonlocal passes
        images, labels = x[models, rows], y[models, rows]
        for lam in mixing:
            mix = lam.view(-1, 1, 1, 1, 1)
            images = mix * images + (1 - mix) * images.flip(1)
        passes = 0

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            logits = net(images)
            risk = _risk(logits, labels, recipe.smoothing)
            for lam in mixing:
                risk = lam * risk + (1 - lam) * _risk(logits, labels.flip(1), recipe.smoothing)
            if recipe.flood:
                risk = (risk - recipe.flood).abs() + recipe.flood
            sgd.zero_grad(set_to_none=True)
            risk.sum().backward()  # the models are independent: the sum's gradient is each one's own
            return risk.detach()

        risk = optimizer.step(closure)
        # Within a recording every time, for afterwards there is nobody to ask; else once an epoch.
        return {"risk": risk} | (gauges_of_rule() if taking.recording else {})

    def gauges_of_rule() -> dict[str, Tensor]:
        return optimizer.gauges() if recipe.rule is not None else {}

    taking = Steps([sgd], lambda: tensors_of(net), [generator], device=x.device, count=total, compile=compile)
    with taking:
        for epoch in range(recipe.epochs):
            order = torch.rand(stack, count, generator=generator, device=x.device).argsort(1)
            for i in range(updates):
                number = epoch * updates + i
                late = recipe.average_from is not None and number / total >= recipe.average_from
                factor = one_cycle(number / total) if not late else recipe.average_rate
                taking.set_rate(sgd.param_groups[0], recipe.rate * factor)
                rows = order[:, i * recipe.batch : (i + 1) * recipe.batch]
                done = taking.take("update", update, rows, *([] if weights is None else [weights[number]]))
            if recipe.average_from is not None and (epoch + 1) / recipe.epochs > recipe.average_from:
                averaged += 1
                now = [p.detach() for p in net.parameters()]
                mean = [p.clone() for p in now] if averaged == 1 else mean
                torch._foreach_lerp_(mean, now, 1 / averaged)
            gauges = {} if monitor is None else monitor(net)
            done.pop("risk")
            for name, value in (gauges | (done or gauges_of_rule())).items():
                curves.setdefault(name, []).append(value)
    if averaged:
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), mean)
        renew_statistics(net, x)
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        raise RuntimeError(f"the training left the numbers at rate {recipe.rate}: lower it, or the radius")
    # Counted in one update: a recorded one does not come by here again.
    return Training(net, {k: torch.stack(v) for k, v in curves.items()}, passes * total)


@torch.no_grad()
def renew_statistics(net: StackedConvNet, x: Tensor, parts: int = 4) -> None:
    """Batch-norm statistics of the present weights on images ``(S, N, ...)``: averaged weights need it."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    training = net.training
    net.train()
    for part in x.chunk(parts, dim=1):
        net(part)
    net.train(training)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def _risk(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    )
    return loss.unflatten(0, labels.shape).mean(1)  # (S,)


def _mixing_weights(alpha: float, updates: int, stack: int, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha) by its quantiles, ``(updates, S)``: torch's own draws take no generator."""
    from scipy.stats import beta

    u = torch.rand(updates, stack, generator=generator, device=generator.device).double().cpu()
    return torch.from_numpy(beta.ppf(u.numpy(), alpha, alpha)).float()
