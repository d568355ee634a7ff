"""Time one Langevin step of the same network in one process, as ratios, beside the machine's own rate.

    python benchmarks/langevin_step.py --require torchebm --out results/langevin-step-cpu.json

Three ways to take it, from the same batch, with the same step size, temperature and noise:
``companion.langevin``, a loop as one writes it without thinking of speed, and TorchEBM's
``LangevinDynamics`` (an optional extra, ``pip install "downhill-with-noise[bench]"``; without it the
column is left out); with ``--compile`` also the companion's step as one call, captured on a GPU and
compiled elsewhere, beside its plain loop. They take turns, a short chain each, so that whatever else the
machine does falls on all of them; ratios and shares are formed within a turn, then their median and
quartiles reported. Before any timing they must all make the same update; if not, the script stops.

The share of the machine's rate counts a step's multiply-adds (those of the energy and of its gradient
in x; random numbers and activations count for nothing) and divides by two rates measured in the same
turns: a large matrix product, and for convolutional energies the best of several convolutions.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from companion._compiled import NotCompilableError
from companion.energies import frozen
from companion.langevin import langevin
from companion.networks import ConvEnergy, MLPEnergy
from companion.record import describe_device, pick_device

STEP_SIZE, TEMPERATURE = 0.02, 1e-3  # the middle of what the short-run chapter's tuning tries

# A sampler made for one network: (x, steps, generator) -> the states after that many steps.
Sampler = Callable[[Tensor, int, torch.Generator], Tensor]
Maker = Callable[[nn.Module], Sampler]


@dataclass(frozen=True)
class Case:
    """A network at the size it is timed; ``steps`` a turn, so that a turn is short but not a blink."""

    make: Callable[[torch.Generator], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int


CASES = {
    "digits MLP 8x8": Case(lambda rng: MLPEnergy((1, 8, 8), generator=rng), (1, 8, 8), 128, 200),
    "conv 28x28": Case(lambda rng: ConvEnergy((1, 28, 28), generator=rng), (1, 28, 28), 64, 20),
    "conv 32x32": Case(lambda rng: ConvEnergy((3, 32, 32), generator=rng), (3, 32, 32), 64, 20),
}

# Channels in, channels out, kernel, stride, side; the layers of networks such as these and larger ones.
CONVOLUTIONS = [
    (32, 64, 4, 2, 32), (64, 128, 4, 2, 16), (128, 256, 4, 2, 8), (64, 64, 3, 1, 32), (256, 256, 3, 1, 8)
]  # fmt: skip


class DifferentUpdateError(RuntimeError):
    """A candidate does not make the update that it is timed for."""


def companion_sampler(net: nn.Module) -> Sampler:
    return lambda x, steps, rng: langevin(net, x, steps, STEP_SIZE, temperature=TEMPERATURE, generator=rng).x


def plain_sampler(net: nn.Module) -> Sampler:
    return _compiled_or_not(net, False)


def compiled_sampler(net: nn.Module) -> Sampler:
    return _compiled_or_not(net, True)


def _compiled_or_not(net: nn.Module, compile: bool) -> Sampler:
    options = {"temperature": TEMPERATURE, "compile": compile}
    return lambda x, steps, rng: langevin(net, x, steps, STEP_SIZE, generator=rng, **options).x


def naive_sampler(net: nn.Module) -> Sampler:
    """The loop of most published code: the network as training left it, its parameters wanting gradients."""

    def sample(x: Tensor, steps: int, rng: torch.Generator) -> Tensor:
        for _ in range(steps):
            x = x.detach().requires_grad_(True)
            net(x).sum().backward()
            with torch.no_grad():
                noise = torch.randn(x.shape, generator=rng, device=x.device)
                x = x - STEP_SIZE**2 / 2 * x.grad / TEMPERATURE + STEP_SIZE * noise
        return x

    return sample


def torchebm_sampler(net: nn.Module) -> Sampler:
    """TorchEBM's step is x - eta grad E + noise_scale sqrt(2 eta) z: eta = eps^2/2T, noise_scale sqrt(T)."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    eta = STEP_SIZE**2 / (2 * TEMPERATURE)
    device = next(net.parameters()).device
    sampler = LangevinDynamics(Model().to(device), eta, noise_scale=TEMPERATURE**0.5, device=device)
    return lambda x, steps, rng: sampler.sample(x=x, n_steps=steps, generator=rng)


def candidates(require: tuple[str, ...] = ()) -> dict[str, Maker]:
    """The samplers that can be timed here. Raises ``ImportError`` for a missing one that is required."""
    found: dict[str, Maker] = {"companion": companion_sampler, "naive": naive_sampler}
    try:
        import torchebm  # noqa: F401
    except ImportError as error:
        message = f'TorchEBM cannot be imported ({error}); pip install "downhill-with-noise[bench]"'
        if "torchebm" in require:
            raise ImportError(message) from error
        print(f"{message}. Its column is left out.", flush=True)
    else:
        found["torchebm"] = torchebm_sampler
    return found


def check_same_update(net: nn.Module, samplers: dict[str, Sampler], x: Tensor, steps: int = 3) -> None:
    """Every sampler against the update written out, from the same noise, to 1 % of its drift.

    The drift is the smaller part of a step, so a wrong factor in either part shows. Rounding does not: it
    moves an activation across its kink now and then, which changes a few pixels of one image.
    Raises ``DifferentUpdateError``.
    """
    rng, expected, drift = torch.Generator(x.device).manual_seed(0), x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        with frozen(net):
            y = expected.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(net(y).sum(), y)
        move = -(STEP_SIZE**2) / (2 * TEMPERATURE) * grad
        drift += move
        expected = expected + move + STEP_SIZE * torch.randn(x.shape, generator=rng, device=x.device)
    for name, sample in samplers.items():
        start = x.clone()
        result = sample(start, steps, rng.manual_seed(0))
        if not torch.equal(start, x):
            raise DifferentUpdateError(f"{name} changes the batch that it is given")
        error = ((result - expected).norm() / drift.norm()).item()
        if not error < 0.01:
            raise DifferentUpdateError(
                f"{name} makes another update: after {steps} steps it is {error:.3g} times "
                "the whole drift away from x - eps^2/2T grad E + eps z. Nothing was timed."
            )


def multiply_adds(net: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the matrix products and convolutions of E and its gradient in x, for this batch."""
    with FlopCounterMode(display=False) as counter, frozen(net):
        net(x.detach().requires_grad_(True)).sum().backward()
    return counter.get_total_flops() // 2


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, on a GPU with everything it launched."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Yardstick:
    """Work whose rate stands for the machine's; ``label`` says what it is."""

    label: str
    multiply_adds: int
    run: Callable[[], object]

    def rate(self, device: torch.device) -> float:
        """Multiply-adds a second, in one call."""
        return self.multiply_adds / seconds(self.run, device)


def matmul(device: torch.device, size: int, dtype: torch.dtype = torch.float32) -> Yardstick:
    a = torch.randn(size, size, device=device, dtype=dtype)
    return Yardstick(f"{str(dtype).removeprefix('torch.')} matmul {size}x{size}", size**3, lambda: a @ a)


def best_convolution(
    device: torch.device, batch: int, repeats: int = 10, dtype: torch.dtype = torch.float32
) -> Yardstick:
    """The fastest of several convolutions, forward and gradient in the input, in both memory formats."""
    found = []
    for inputs, outputs, kernel, stride, side in CONVOLUTIONS:
        for name, layout in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
            x = torch.randn(batch, inputs, side, side, device=device).to(dtype, memory_format=layout)
            w = torch.randn(outputs, inputs, kernel, kernel, device=device).to(dtype, memory_format=layout)
            y = F.conv2d(x, w, None, stride, padding=1)
            runs = {
                "forward": lambda x=x, w=w, s=stride: F.conv2d(x, w, None, s, padding=1),
                "input gradient": lambda x=x, w=w, y=y, s=stride: nn.grad.conv2d_input(x.shape, w, y, s, 1),
            }
            for direction, run in runs.items():
                size = f"{inputs}->{outputs} {kernel}x{kernel}/{stride} at {side}x{side}"
                label = f"conv {size}, {direction}, {name}"
                found.append(Yardstick(label, y.numel() * w[0].numel(), run))
    return max(found, key=lambda one: max(one.rate(device) for _ in range(repeats)))


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles, to ``digits`` significant digits."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    )
    return {
        name: float(f"{value:.{digits}g}")
        for name, value in zip(("median", "low", "high"), quantiles.tolist(), strict=True)
    }


def time_case(
    case: Case, makers: dict[str, Maker], repeats: int, device: torch.device, matmul_size: int = 2048
) -> dict[str, object]:
    """Check, then time: ``repeats`` turns of every sampler and every yardstick, one after the other."""
    rng = torch.Generator().manual_seed(1)
    net = case.make(rng).to(device)
    x = (torch.rand(case.batch, *case.shape, generator=rng) * 2 - 1).to(device)
    samplers = {name: make(net) for name, make in makers.items()}
    check_same_update(net, samplers, x)
    work = multiply_adds(net, x)
    yardsticks = {"matmul": matmul(device, matmul_size)}
    if isinstance(net, ConvEnergy):
        yardsticks["convolution"] = best_convolution(device, case.batch)
    noise = torch.Generator(device)
    step: dict[str, list[float]] = {name: [] for name in samplers}
    rates: dict[str, list[float]] = {name: [] for name in yardsticks}
    for turn in range(-1, repeats):  # the turn before the first warms up
        for name, sample in samplers.items():
            net.zero_grad(set_to_none=True)  # the naive loop's sum of gradients, which nobody uses
            noise.manual_seed(2)
            elapsed = seconds(lambda run=sample: run(x, case.steps, noise), device)
            if turn >= 0:
                step[name].append(elapsed / case.steps)
        for name, yardstick in yardsticks.items():
            rate = yardstick.rate(device)
            if turn >= 0:
                rates[name].append(rate)
    ours = step["companion"]
    return {
        "shape": case.shape, "batch": case.batch, "steps": case.steps, "repeats": repeats,
        "multiply_adds": work,
        "microseconds": {name: spread([1e6 * t for t in times], 4) for name, times in step.items()},
        "ratio_to_companion": {
            name: spread([t / own for t, own in zip(times, ours, strict=True)])
            for name, times in step.items() if name != "companion"
        },
        "machine": {
            name: {"what": yardsticks[name].label, "rate_giga": spread([rate / 1e9 for rate in values])}
            for name, values in rates.items()
        },
        "share_of_machine": {
            name: spread([work / own / rate for own, rate in zip(ours, values, strict=True)])
            for name, values in rates.items()
        },
    }  # fmt: skip


def table(cases: dict[str, dict]) -> str:
    """The figures to read: microseconds a step, ratios to the companion and shares of the machine."""

    def cell(value: dict[str, float] | None, scale: float = 1, unit: str = "") -> str:
        if value is None:
            return "-"
        median, low, high = (scale * value[key] for key in ("median", "low", "high"))
        digits = 0 if scale != 1 or median >= 100 else 2
        return f"{median:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"

    names = list(next(iter(cases.values()))["microseconds"])
    times, ratios = [f"{name}, us" for name in names], [f"{name}/companion" for name in names[1:]]
    rows = [["network", *times, *ratios, "of matmul", "of convolution"]]
    for case, row in cases.items():
        times = [cell(row["microseconds"][name]) for name in names]
        ratios = [cell(row["ratio_to_companion"][name]) for name in names[1:]]
        shares = [cell(row["share_of_machine"].get(name), 100, " %") for name in ("matmul", "convolution")]
        rows.append([case, *times, *ratios, *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def write(path: Path, record: dict[str, object]) -> None:
    """Write JSON under a temporary name, then rename: an interrupted run leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="turns a network")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, help="torch's threads on a CPU; its own choice by default")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="these networks")
    parser.add_argument("--require", choices=["torchebm"], nargs="+", default=[], help="an error if missing")
    parser.add_argument("--compile", action="store_true", help="also companion's step captured or compiled")
    parser.add_argument("--matmul-size", type=int, help="side of the matrices; 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    size = args.matmul_size or (8192 if device.type == "cuda" else 2048)
    try:
        makers = candidates(tuple(args.require))
        if args.compile:  # left to itself langevin captures on a GPU: the plain loop has to be asked for
            both = {"companion": plain_sampler, "companion compiled": compiled_sampler}
            makers = both | makers | both  # first in the table, and over the one already there
        cases = {}
        for name in args.only:
            cases[name] = case = time_case(CASES[name], makers, args.repeats, device, size)
            print(f"{name}: {case['multiply_adds'] / 1e6:.1f} million multiply-adds a step; the machine:")
            for machine in case["machine"].values():
                median, low, high = machine["rate_giga"].values()
                print(f"  {median:.4g} ({low:.4g}-{high:.4g}) G/s: {machine['what']}", flush=True)
    except (ImportError, DifferentUpdateError, NotCompilableError) as error:
        raise SystemExit(f"langevin_step.py: {error}") from error
    versions = {"torch": torch.__version__}
    if "torchebm" in makers:
        versions["torchebm"] = metadata.version("torchebm")
    record = {
        "command": shlex.join(["python", "benchmarks/langevin_step.py", *arguments]),
        "device": describe_device(device), "threads": torch.get_num_threads(), "versions": versions,
        # By default a GPU's convolutions may round to TF32, its matrix products not.
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
        "step_size": STEP_SIZE, "temperature": TEMPERATURE, "cases": cases,
    }  # fmt: skip
    print(f"\n{record['device']}, {', '.join(map(' '.join, versions.items()))}; median (quartiles) of "
          f"{args.repeats} turns\n\n{table(cases)}")  # fmt: skip
    if args.out:
        write(args.out, record)


if __name__ == "__main__":
    main()
