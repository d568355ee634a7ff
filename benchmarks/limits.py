"""How near each hot loop comes to what the device can do: operations, bytes, ceilings, shares.

    python benchmarks/limits.py --out results/limits-cpu.json

Every loop that takes the book's time is run for a few steps, as the chapters run it. Its operations are
those of the matrix products and convolutions it calls (two for a multiply-add); its bytes are what all its
calls read and write, as if nothing stayed in a cache; its calls are what a GPU would have to launch. Beside
them stand the device's own ceilings, measured in the same turns: a large matrix product, the best of several
convolutions, a large copy. From these come the two shares: of the arithmetic rate of its kind, products or
convolutions, and of the copy rate, which passes 100 % where the data never leave the cache. A loop far from
both is made of calls too small to fill the device.

``--device cuda`` runs the same on a GPU, where loops are recorded and replayed. Each is timed by the
difference between a long and a short run, which leaves out what recording costs, and beside itself as the
plain loop, one operation after the other: how many times faster it is for being recorded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from langevin_step import best_convolution, matmul, seconds, spread, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from companion import chains, gan, graphs, langevin, lifecycle, likelihood, networks, stein
from companion.classifiers import Recipe, StackedConvNet, train_stack
from companion.perturb import AMP
from companion.record import environment, pick_device

Work = Callable[[], object]
SHORT, MORE = 60, 200  # steps of a short run on a GPU, with the recording in it, and those that are timed
CONVOLUTION = "convolution float32"


@dataclass
class Loop:
    """``work(n, compile)`` does n steps of the loop that ``what`` names, as ``chapter`` runs it.

    ``steps``: how many are timed on a CPU. n is a multiple of ``unit``.
    """

    what: str
    chapter: str
    steps: int
    work: Callable[[int, bool | None], object]
    ceiling: str = "matmul float32"  # that of the calls which do most of its arithmetic
    unit: int = 1


class Count(TorchDispatchMode):
    """Counts calls, their bytes, and operations (two a multiply-add) of products and convolutions.

    torch's own counter of operations does the former, but hooks into modules, which a gradient penalty's
    ``autograd.grad`` does not bear. A view moves no bytes and is no call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        if not func.is_view and func.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.empty):
            self.calls += 1
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def loops(device: torch.device) -> list[Loop]:
    """The hot loops, at the sizes of the ``cpu`` profile's chapters and of the convolutional energies."""
    rng = torch.Generator(device).manual_seed(0)
    found = []

    def sampler(what: str, chapter: str, energy: nn.Module, x: Tensor, steps: int, *ceiling: str) -> None:
        found.append(Loop(what, chapter, steps, lambda n, compile: langevin.langevin(
            energy, x, n, 0.01, temperature=1e-3, generator=rng, compile=compile), *ceiling))  # fmt: skip

    digits = (1, 8, 8)
    image = torch.rand(1500, *digits, device=device) * 2 - 1
    mlp = networks.MLPEnergy(digits, stack=4, generator=rng).to(device)
    sampler(
        "Langevin, 4 digit MLPs, 128 chains each", "short-run", mlp, image[:512].unflatten(0, (4, 128)), 20
    )
    for side, channels in ((28, 1), (32, 3)):
        conv = networks.ConvEnergy((channels, side, side), 32, rng).to(device)
        x = torch.rand(128, channels, side, side, device=device) * 2 - 1
        sampler(f"Langevin, conv energy {side}x{side}, 128 chains", "short-run", conv, x, 2, CONVOLUTION)
        rough = networks.ConvEnergy((channels, side, side), 32, rng, torch.bfloat16).to(device)
        what = f"Langevin, conv energy {side}x{side}, 128 chains, bfloat16"
        sampler(what, "short-run", rough, x, 2, "convolution bfloat16")
    run = lifecycle.short_run("bank", digits, rate=1e-4, network_rate=1e-4, rng=rng, stack=4, device=device)
    what = "maximum likelihood, 4 models, K = 20"
    found.append(Loop(what, "short-run", 3, lambda n, compile: likelihood.train(
        run, image, run.update + n, batch=128, steps=20, step_size=0.01, temperature=1e-3, data_noise=0.02,
        progress=False, compile=compile)))  # fmt: skip
    plane = torch.randn(5000, 2, device=device)
    energy = networks.MLPEnergy((2,), (64, 64, 64), stack=3, gain=3.0, generator=rng).to(device)
    bank = chains.Bank(
        5000, chains.born_from_noise((2,), 2.0, device), rejuvenation=0.0, stack=3, generator=rng
    )
    long = likelihood.Run(energy, torch.optim.Adam(energy.parameters(), 1e-4), bank, rng)
    what = "maximum likelihood in the plane, 3 models, K = 50"
    found.append(Loop(what, "long-run", 2, lambda n, compile: likelihood.train(
        long, plane, long.update + n, batch=512, steps=50, step_size=0.05, temperature=1.0, data_noise=0.0,
        base_std=2.0, progress=False, compile=compile)))  # fmt: skip
    critic = networks.ConvEnergy(digits, 8, rng).to(device)
    pair = gan.new_run(networks.ConvGenerator(digits, 16, 16, rng).to(device), critic, rate=1e-5, rng=rng)
    found.append(Loop("WGAN-GP update, conv pair", "discriminator-langevin", 3, lambda n, compile: gan.train(
        pair, image, pair.update + n, batch=64, critic_steps=2, penalty=1.0, penalty_batch=16,
        progress=False, compile=compile), CONVOLUTION))  # fmt: skip
    model = networks.MLPEnergy((2,), (100, 100), stack=5, generator=rng).to(device)
    f = networks.MLP((2, 100, 100, 2), 5, generator=rng).to(device)
    adams = [torch.optim.Adam(net.parameters(), 1e-5) for net in (model, f)]
    lsd = stein.SteinRun(model, adams[0], rng, f, adams[1])
    found.append(Loop("LSD step, 5 models", "stein-discrepancy", 12, lambda n, compile: stein.train(
        lsd, plane, lsd.step + n, batch=256, compile=compile), unit=6))  # fmt: skip
    ring = graphs.GraphBatch.from_edges([[(i, (i + 1) % 16) for i in range(16)]] * 64, [16] * 64)
    graph = graphs.graph_run(ring.to(device), (0.5, 0.2), rng)
    what = "Stein step on graphs of 16 nodes, batch 16"
    found.append(Loop(what, "stein-graphs", 3, lambda n, compile: graphs.train(
        graph, graph.step + n, progress=False, compile=compile)))  # fmt: skip
    labels = torch.randint(10, (5, 200), device=device)
    net = StackedConvNet(digits, 10, 5, generator=torch.Generator().manual_seed(0)).to(device)
    few = image[:1000].unflatten(0, (5, 200))
    recipe = lambda n: Recipe(epochs=n // 4, rate=1e-3, rule=AMP(0.5))  # noqa: E731
    chapter = "adversarial-model-perturbation"
    found.append(Loop("AMP step, 5 models", chapter, 4, lambda n, compile: train_stack(
        few, labels, net, recipe(n), rng, compile=compile), unit=4))  # fmt: skip
    return found


def counted(loop: Loop) -> tuple[float, float, float]:
    """Operations, bytes and calls of one step."""
    loop.work(loop.steps, False)
    with Count() as count:
        loop.work(loop.steps, False)
    return tuple(v / loop.steps for v in (count.operations, count.bytes, count.calls))


def step_time(loop: Loop, device: torch.device, compile: bool | None) -> float:
    """Seconds a step; on a GPU between the 60th and the 260th, or multiples of ``unit`` near them."""
    if device.type == "cpu":
        return seconds(lambda: loop.work(loop.steps, compile), device) / loop.steps
    short, more = (n // loop.unit * loop.unit for n in (SHORT, MORE))
    brief = seconds(lambda: loop.work(short, compile), device)
    return (seconds(lambda: loop.work(short + more, compile), device) - brief) / more


def measure(device: torch.device, repeats: int, size: int) -> dict[str, object]:
    """All loops and ceilings, in turns; rates in 10^9 a second."""
    todo = loops(device)
    numbers = [counted(loop) for loop in todo]
    yardsticks = {}
    for kind in (torch.float32, torch.bfloat16):
        name = str(kind).removeprefix("torch.")
        yardsticks[f"matmul {name}"] = matmul(device, size, kind)
        yardsticks[f"convolution {name}"] = best_convolution(device, 64, dtype=kind)
    block = torch.empty(2**26, device=device)  # 256 MB: larger than any cache
    target = torch.empty_like(block)
    copied = 2 * block.numel() * block.element_size()
    rates: dict[str, list[float]] = {name: [] for name in [*yardsticks, "copy"]}
    times: list[list[float]] = [[] for _ in todo]
    plain: list[list[float]] = [[] for _ in todo]  # on a GPU, one operation after the other
    for turn in range(-1, repeats):
        for loop, own, unrecorded in zip(todo, times, plain, strict=True):
            own.append(step_time(loop, device, None))
            if device.type != "cpu":
                unrecorded.append(step_time(loop, device, False))
        for name, one in yardsticks.items():
            rates[name].append(2 * one.rate(device) / 1e9)
        rates["copy"].append(copied / seconds(lambda: target.copy_(block), device) / 1e9)
        if turn < 0:  # the turn before the first warms up
            for values in [*times, *plain, *rates.values()]:
                values.clear()
    rows = []
    for loop, (operations, moved, calls), own, unrecorded in zip(todo, numbers, times, plain, strict=True):
        of_rate = [operations / t / 1e9 / rate for t, rate in zip(own, rates[loop.ceiling], strict=True)]
        of_copy = [moved / t / 1e9 / rate for t, rate in zip(own, rates["copy"], strict=True)]
        rows.append({
            "loop": loop.what, "chapter": loop.chapter, "operations": round(operations),
            "bytes": round(moved), "calls": round(calls), "milliseconds": spread([1e3 * t for t in own]),
            "ceiling": loop.ceiling, "of_arithmetic": spread(of_rate), "of_copy": spread(of_copy),
        })  # fmt: skip
        if unrecorded:
            ratios = [slow / fast for slow, fast in zip(unrecorded, own, strict=True)]
            rows[-1]["times_the_plain_loop"] = spread(ratios)
    return {"ceilings": {name: spread(values) for name, values in rates.items()}, "loops": rows}


def published(device: torch.device) -> list[dict[str, object]]:
    """What one update of the ``paper`` profile takes: operations counted on a few images, times the batch.

    The networks, K, batch and updates are those of the published CIFAR-10 settings (Hill et al. 2022), as in
    ``book/profiles/paper.yml``: 128 chains, and data and negatives in one pass.
    """
    few, batch = 2, 128
    rng = torch.Generator(device).manual_seed(0)
    energy = networks.ResidualEnergy((3, 32, 32), 256, rng).to(device)
    x = torch.rand(few, 3, 32, 32, device=device)

    def operations(work: Work) -> float:
        with Count() as count:
            work()
        return count.operations / few

    step = operations(lambda: langevin.langevin(energy, x, 1, 0.01, generator=rng)) * batch
    learn = operations(lambda: likelihood.ml_loss(energy, x, x, 1e-4).backward()) * batch
    rows = []
    for name, steps, chains_moved, updates in (
        ("short-run", 100, 1, 150_000), ("mid-run", 100, 1, 150_000),
        ("long-run, correction", 100, 4, 250_000),
    ):  # fmt: skip
        rows.append({
            "training": name, "steps": steps, "updates": updates,
            "operations": round(steps * step * chains_moved + learn),
            "parameters": sum(p.numel() for p in energy.parameters()),
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=None, help="turns; 15 on a CPU, 5 on a GPU")
    parser.add_argument("--size", type=int, help="side of the large matrices; 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    size = args.size or (8192 if device.type == "cuda" else 2048)
    repeats = args.repeats or (5 if device.type == "cuda" else 15)
    found = measure(device, repeats, size)
    print(json.dumps(found["ceilings"]))
    beside = "times_the_plain_loop"
    for row in found["loops"]:
        ops, moved = row["operations"] / 1e6, row["bytes"] / 1e6
        shares = [row[name]["median"] for name in ("of_arithmetic", "of_copy")]
        print(
            f"{row['loop']:52s} {ops:9.1f} Mop {moved:8.1f} MB {row['milliseconds']['median']:8.3f} ms  "
            f"{shares[0]:6.1%} of {row['ceiling']}, {shares[1]:6.1%} of copy"
            + (f", {row[beside]['median']:.1f} x the plain loop" if beside in row else "")
        )
    if args.out is not None:
        command = f"python benchmarks/limits.py --device {args.device}"
        head = {"kind": "limits", "command": command, **environment(device), "repeats": repeats}
        write(
            args.out, head | {"threads": torch.get_num_threads()} | found | {"published": published(device)}
        )


if __name__ == "__main__":
    main()
