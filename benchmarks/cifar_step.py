"""How fast do the chapter's arms train on images of CIFAR-10's size, beside the fastest public trainer?

    python benchmarks/cifar_step.py --airbench cifar10-airbench --batch 256 --batches 2 \
      --out results/cifar-step-cpu.json

``--airbench`` is a checkout of github.com/KellerJordan/cifar10-airbench, of which the network is taken
(``CifarNet`` of ``airbench94_muon.py``) and nothing else; without it only the chapter's own network is timed.
That network is trained in two ways on the same batch:

- as its trainer does: in half precision on a GPU (in float32 on a CPU), channels-last, images that lie ready
  on the device, label smoothing, SGD with Nesterov momentum, nothing else in the loop; with ``--compile``
  also compiled, as the trainer compiles it (minutes);
- by ``companion.residual.train_residual``, the code of the chapter's large study, as ERM, as AMP, and as AMP
  whose ascent takes a quarter of the batch: crops and flips drawn in every step, bf16 autocast on a GPU.

The trainer's optimiser for its filters, Muon, is left out on both sides: it is SGD's turn everywhere. An
AMP step goes through its batch twice, and the batch is counted once. On a GPU a rate is that between a short
and a long run, without what recording a step costs. The images are random: they only have to be moved.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from langevin_step import seconds, spread, write
from side_by_side import checkout
from torch import Tensor, nn

from companion.classifiers import Recipe
from companion.perturb import AMP
from companion.record import environment, pick_device
from companion.residual import PlainResNet, train_residual

Train = Callable[[int], object]  # so many steps
RATE = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
ARMS: dict[str, tuple[AMP | None, int]] = {  # the rule, and into how many parts the ascent's batch is cut
    "erm": (None, 1),
    "amp": (AMP(0.5), 1),
    "amp, quarter of the batch": (AMP(0.5), 4),
}


def their_network(folder: Path) -> type[nn.Module]:
    """``CifarNet`` of a checkout; ``SystemExit`` if it is not there, or something else than expected."""
    name = "airbench94_muon"
    if not (folder / f"{name}.py").is_file():
        raise SystemExit(f"--airbench: {folder} holds no {name}.py; give a checkout of cifar10-airbench")
    with checkout(folder, "torchvision", "torchvision.transforms"):
        module = importlib.import_module(name)
    if not hasattr(module, "CifarNet"):
        raise SystemExit(f"--airbench: {name}.py has no CifarNet; its authors have renamed it")
    return module.CifarNet


def their_way(net: nn.Module, x: Tensor, y: Tensor, batch: int, compiled: bool) -> Train:
    """The trainer's loop around its network, on images that lie ready."""
    net = net.to(x.device, memory_format=torch.channels_last)
    kind = next(p for p in net.parameters() if p.ndim == 4).dtype
    ready = x.to(kind).contiguous(memory_format=torch.channels_last)
    sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], fused=True, **RATE)
    call = torch.compile(net, mode="max-autotune") if compiled else net
    parts = [(ready[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)]

    def train(steps: int) -> None:
        net.train()
        for i in range(steps):
            images, labels = parts[i % len(parts)]
            F.cross_entropy(call(images).float(), labels, label_smoothing=0.2).backward()
            sgd.step()
            sgd.zero_grad(set_to_none=True)

    return train


def our_way(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, batch: int, rule: AMP | None, parts: int
) -> Train:
    """``train_residual`` on a network of its own; steps in whole rounds through x."""
    net = make().to(x.device, memory_format=torch.channels_last)
    rng = torch.Generator(x.device).manual_seed(0)
    ascent = None if parts == 1 else batch // parts

    def train(steps: int) -> None:
        epochs = max(1, steps * batch // len(x))
        train_residual(x, y, net, Recipe(epochs, rate=1e-3, batch=batch, rule=rule), rng, ascent)

    return train


def contenders(
    theirs: type[nn.Module] | None, x: Tensor, y: Tensor, batch: int, width: int, compiled: bool
) -> tuple[dict[str, Train], dict[str, int]]:
    """Every way to train, by name, and the networks' parameters; the trainer's own way stands first."""
    ways: dict[str, Train] = {}
    made: dict[str, Callable[[], nn.Module]] = {}
    if theirs is not None:
        half = x.device.type == "cuda"
        plain = lambda: theirs().float()  # noqa: E731
        for name, also in (("airbench", False), ("airbench, compiled", True)):
            if also <= compiled:
                ways[name] = their_way(theirs() if half else plain(), x, y, batch, also)
        made["airbench's network"] = plain
    made["residual network"] = lambda: PlainResNet(3, 10, width)
    counts = {}
    for network, make in made.items():
        one = make().to(x.device)
        with torch.no_grad():
            logits = one(x[:batch])
        if logits.shape != (batch, 10):
            raise SystemExit(
                f"{network} maps {tuple(x[:batch].shape)} to {tuple(logits.shape)}, not to 10 classes"
            )
        counts[network] = sum(p.numel() for p in one.parameters())
        for arm, (rule, parts) in ARMS.items():
            ways[f"{arm}, {network}"] = our_way(make, x, y, batch, rule, parts)
    return ways, counts


def rate(train: Train, round_: int, batch: int, device: torch.device) -> float:
    """Examples a second; steps in multiples of ``round_``, on a GPU behind a short run's."""
    if device.type == "cpu":
        return round_ * batch / seconds(lambda: train(round_), device)
    short, more = round_ * -(-60 // round_), round_ * -(-100 // round_)
    brief = seconds(lambda: train(short), device)
    return more * batch / (seconds(lambda: train(short + more), device) - brief)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT")
    parser.add_argument("--compile", action="store_true", help="time the trainer's network compiled, too")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=5, help="that lie on the device")
    parser.add_argument("--width", type=int, default=64, help="of the chapter's residual network")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.batch < 8 or args.batches < 1 or args.repeats < 1:
        parser.error("--batch takes 8 at least, --batches and --repeats 1")
    device = pick_device(args.device)
    rng = torch.Generator(device).manual_seed(0)
    count = args.batch * args.batches
    x = torch.rand(count, 3, 32, 32, generator=rng, device=device) * 2 - 1
    y = torch.randint(10, (count,), generator=rng, device=device)
    theirs = None if args.airbench is None else their_network(args.airbench.resolve())
    torch.manual_seed(0)
    ways, counts = contenders(theirs, x, y, args.batch, args.width, args.compile)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, args.repeats):
        for name, train in ways.items():
            measured = rate(train, args.batches, args.batch, device)
            if turn >= 0:  # the turn before the first warms up
                rates[name].append(measured)
    rows = {}
    for name, own in rates.items():
        rows[name] = {"examples_a_second": spread(own)}
        told = f"{name:50s} {rows[name]['examples_a_second']['median']:10.0f} examples a second"
        if theirs is not None:
            ratios = [one / other for one, other in zip(own, rates["airbench"], strict=True)]
            rows[name]["of_the_trainer"] = spread(ratios)
            told += f", {rows[name]['of_the_trainer']['median']:.2f} of the trainer's"
        print(told, flush=True)
    if args.out is not None:
        # A checkout by its name: where it lies is nobody's business.
        given = sys.argv[1:] if argv is None else argv
        words = [Path(word).name if word == str(args.airbench) else word for word in given]
        if "--out" in words:
            del words[words.index("--out") : words.index("--out") + 2]
        record = {
            "kind": "cifar-step",
            "command": " ".join(["python benchmarks/cifar_step.py", *words]),
            **environment(device),
            "threads": torch.get_num_threads(),
            "batch": args.batch,
            "repeats": args.repeats,
            "parameters": counts,
            "trainer": None if theirs is None else "airbench94_muon.CifarNet",
            "rows": rows,
        }
        write(args.out, record)


if __name__ == "__main__":
    main()
