"""A plain residual network for 32x32 images and its training with or without a weight perturbation.

The large study of the chapter on adversarial model perturbation: images on the device, channels-last, bf16
autocast on a GPU, padded crops and flips drawn on the device, no label smoothing but in its own arm. Weights
stay float32. The ascent may use a part of the batch: the method's worst case is that of a small batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._recorded import Steps, tensors_of
from companion.calibration import calibration_error, error_rate, hard_nll
from companion.classifiers import Recipe, one_cycle, recipe
from companion.data import Dataset
from companion.perturb import Adversarial

__all__ = ["PlainResNet", "augment", "residual_study", "train_residual"]


class PlainResNet(nn.Module):
    """Nine layers: conv, conv-pool, residual pair, conv-pool, conv-pool, residual pair, max pool, linear.

    ``(B, C, H, W)`` with H and W divisible by 8 -> logits ``(B, classes)``; widths ``width`` to 8 ``width``.
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(channels, width), _block(width, 2 * width, pool=True))
        self.first = nn.Sequential(_block(2 * width, 2 * width), _block(2 * width, 2 * width))
        self.middle = nn.Sequential(
            _block(2 * width, 4 * width, pool=True), _block(4 * width, 8 * width, pool=True)
        )
        self.second = nn.Sequential(_block(8 * width, 8 * width), _block(8 * width, 8 * width))
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: ``(B, C, H, W)`` -> ``(B, classes)``."""
        x = self.stem(x)
        x = self.middle(x + self.first(x))
        x = x + self.second(x)
        return self.head(x.amax((2, 3)))


def _block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def augment(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crops of images padded by reflection and random flips, an offset and a coin an image."""
    count, _, height, side = x.shape
    big = F.pad(x, (pad,) * 4, mode="reflect")
    draw = lambda n: torch.randint(n, (count, 1), generator=generator, device=x.device)  # noqa: E731
    rows = draw(2 * pad + 1) + torch.arange(height, device=x.device)  # (B, H)
    columns = draw(2 * pad + 1) + torch.arange(side, device=x.device)  # (B, W)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    image = torch.arange(count, device=x.device)
    return big.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def train_residual(
    x: Tensor,
    y: Tensor,
    net: PlainResNet,
    how: Recipe,
    generator: torch.Generator,
    ascent: int | None = None,
    compile: bool | None = None,
) -> PlainResNet:
    """Train ``net`` in place on ``(N, C, H, W)``, ``(N,)``; SGD, Nesterov 0.9, one cycle, as ``train_stack``.

    ``ascent``: images of the batch, the first ones, from which the perturbation is computed; None for all.
    ``compile`` as in ``train_stack``.
    Raises ``ValueError`` for flooding, MixUp and averaging, which have no arm here, and for fewer images than
    a batch; ``RuntimeError`` if a weight is not finite at the end.
    """
    if how.flood or how.mixup or how.average_from is not None:
        raise ValueError("the residual study has no flooding, MixUp or averaging")
    updates = len(x) // how.batch
    if not updates:
        raise ValueError(f"{len(x)} images do not fill a batch of {how.batch}")
    sgd = torch.optim.SGD(
        net.parameters(), lr=how.rate, momentum=0.9, nesterov=True, weight_decay=how.weight_decay
    )
    optimizer: torch.optim.Optimizer = sgd
    if how.rule is not None:
        optimizer = Adversarial(sgd, how.rule, net, steps=how.steps, generator=generator)
    low = x.device.type == "cuda"
    net.train()

    def update(rows: Tensor) -> dict[str, Tensor]:
        images, targets = augment(x[rows], generator), y[rows]
        images = images.contiguous(memory_format=torch.channels_last)

        def closure(few: int | None = None) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                loss = F.cross_entropy(net(images[:few]), targets[:few], label_smoothing=how.smoothing)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()

        if how.rule is not None and ascent is not None:
            return {"loss": optimizer.step(closure, ascent=lambda: closure(ascent))}
        return {"loss": optimizer.step(closure)}

    taking = Steps(
        [sgd], lambda: tensors_of(net), [generator], device=x.device, count=how.epochs * updates,
        compile=compile,
    )  # fmt: skip
    with taking:
        for epoch in range(how.epochs):
            order = torch.randperm(len(x), generator=generator, device=x.device)
            for i in range(updates):
                share = (epoch * updates + i) / (how.epochs * updates)
                taking.set_rate(sgd.param_groups[0], how.rate * one_cycle(share))
                taking.take("update", update, order[i * how.batch : (i + 1) * how.batch])
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        raise RuntimeError(f"the training left the numbers at rate {how.rate}: lower it, or the radius")
    return net


def residual_study(
    images: Dataset,
    arms: Mapping[str, Sequence[float]],
    *,
    seeds: int,
    epochs: int,
    batch: int,
    ascent: int | None,
    width: int,
    size: int | None,
    device: torch.device | str,
    seed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Every arm, its numbers as ``classifiers.recipe`` takes them, with every seed; judged on the test split.

    ``size``: train on that many images, others for each seed; None for all. Returns ``error``, ``nll``,
    ``ece`` and ``seconds`` of each arm, a value a seed. Seed s starts all arms alike.
    """
    x, y, x_test = (t.to(device) for t in (images.x_train, images.y_train, images.x_test))
    out: dict[str, dict[str, list[float]]] = {}
    for arm, numbers in arms.items():
        row = out.setdefault(arm, {"error": [], "nll": [], "ece": [], "seconds": []})
        for s in range(seeds):
            gen = torch.Generator(device).manual_seed(1000 * seed + s)
            rows = torch.randperm(len(x), generator=gen, device=x.device)[:size]
            with torch.random.fork_rng(devices=[]):  # torch's own initialisation takes no generator
                torch.manual_seed(1000 * seed + s)
                net = PlainResNet(images.shape[0], images.n_classes, width)
            net = net.to(device, memory_format=torch.channels_last)
            began = time.perf_counter()
            train_residual(x[rows], y[rows], net, recipe(arm, numbers, epochs, batch), gen, ascent)
            net.eval()
            with torch.no_grad():
                logits = torch.cat([net(part) for part in x_test.split(1000)]).float().cpu()
            row["seconds"].append(time.perf_counter() - began)
            for name, figure in (("error", error_rate), ("nll", hard_nll), ("ece", calibration_error)):
                row[name].append(figure(logits, images.y_test).item())
    return out
