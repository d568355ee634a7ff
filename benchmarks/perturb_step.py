"""Time one step of adversarial model perturbation against plain SGD, and against public implementations.

    python benchmarks/perturb_step.py --out results/perturb-step-cpu.json \
      --official AMP-Regularizer/amp.py --sam sam/sam.py

All contenders train the same network from the same weights on the same batch, in turns of a few steps each;
ratios are formed within a turn, the table shows median and quartiles. ``--official`` is the path of
``amp.py`` in a checkout of github.com/hiyouga/AMP-Regularizer, ``--sam`` that of ``sam.py`` in one of
github.com/davda54/sam; without them their rows are left out. Before timing, the companion's SAM and theirs,
and the companion's per-tensor AMP with ``statistics="all"`` and the official one, must take the same steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.classifiers import StackedConvNet
from companion.perturb import AMP, SAM, Adversarial, Rule
from companion.record import environment, pick_device

RATE = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
Step = Callable[[Tensor, Tensor], object]


def network(device: torch.device) -> nn.Module:
    """The chapter's network, one model, from the same weights each time."""
    return StackedConvNet((1, 8, 8), 10, 1, generator=torch.Generator().manual_seed(0)).to(device)


def closure_of(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A standard closure: clears, computes, goes back, returns the loss."""

    def closure() -> Tensor:
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x)[0], y)
        loss.backward()
        return loss

    return closure


def companion_step(
    device: torch.device, rule: Rule | None, quarter: bool = False, **options: object
) -> tuple[nn.Module, Step]:
    """Plain SGD for no rule, else the wrapped one; a ``quarter`` of the batch may serve the ascent."""
    net = network(device)
    base = torch.optim.SGD(net.parameters(), **RATE)
    if rule is None:
        return net, lambda x, y: base.step(closure_of(net, x, y))
    optimizer = Adversarial(base, rule, net, **options)

    def step(x: Tensor, y: Tensor) -> object:
        few = len(x) // 4
        part = closure_of(net, x[:few], y[:few]) if quarter else None
        return optimizer.step(closure_of(net, x, y), ascent=part)

    return net, step


def official_step(device: torch.device, module: ModuleType) -> tuple[nn.Module, Step]:
    """The official optimiser, whose closure returns (outputs, loss)."""
    net = network(device)
    options = {k: v for k, v in RATE.items() if k != "lr"}
    optimizer = module.AMP(net.parameters(), lr=RATE["lr"], epsilon=0.5, inner_lr=1, inner_iter=1, **options)

    def step(x: Tensor, y: Tensor) -> object:
        inner = closure_of(net, x, y)
        return optimizer.step(lambda: (loss := inner(), loss))

    return net, step


def sam_step(device: torch.device, module: ModuleType) -> tuple[nn.Module, Step]:
    """The public SAM in its two-call form."""
    net = network(device)
    optimizer = module.SAM(net.parameters(), torch.optim.SGD, rho=0.05, **RATE)

    def step(x: Tensor, y: Tensor) -> object:
        closure = closure_of(net, x, y)
        loss = closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)
        return loss

    return net, step


def module_at(path: Path) -> ModuleType:
    """A module by the path of its file."""
    spec = importlib.util.spec_from_file_location(f"contender_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_same(
    name: str, one: tuple[nn.Module, Step], other: tuple[nn.Module, Step], x: Tensor, y: Tensor
) -> None:
    """Three steps must leave the same weights; raises ``SystemExit`` if they do not."""
    for _ in range(3):
        one[1](x, y)
        other[1](x, y)
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        if not torch.allclose(p, q, rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{name} and the companion's do not take the same step: nothing was timed")


def _short(argument: str) -> str:
    """A path without what is particular to this machine: its file and that file's folder."""
    return "/".join(Path(argument).parts[-2:]) if argument.startswith("/") else argument


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--official", type=Path, help="amp.py of the official repository")
    parser.add_argument("--sam", type=Path, help="sam.py of davda54/sam")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=41, help="turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, 1, 8, 8, generator=gen).to(device)
    y = torch.randint(10, (args.batch,), generator=gen).to(device)
    contenders = {
        "erm": companion_step(device, None),
        "amp": companion_step(device, AMP(0.5)),
        "amp, per tensor, all statistics": companion_step(
            device, AMP(0.5, 1.0, "per_tensor"), statistics="all"
        ),
        "amp, quarter of the batch": companion_step(device, AMP(0.5), quarter=True),
        "sam": companion_step(device, SAM(0.05)),
    }
    if args.official is not None:
        module = module_at(args.official)
        mine = companion_step(device, AMP(0.5, 1.0, "per_tensor"), statistics="all")
        check_same("the official optimiser", mine, official_step(device, module), x, y)
        contenders["official AMP"] = official_step(device, module)
    if args.sam is not None:
        module = module_at(args.sam)
        check_same("davda54/sam", companion_step(device, SAM(0.05)), sam_step(device, module), x, y)
        contenders["davda54/sam"] = sam_step(device, module)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.repeats + 1):
        for name, (_, step) in contenders.items():
            began = time.perf_counter()
            for _ in range(5):
                step(x, y)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - began) / 5)
    seconds = {name: torch.tensor(values, dtype=torch.double) for name, values in times.items()}
    thirds = torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)
    rows = {}
    for name, values in seconds.items():
        low, median, high = (values / seconds["erm"]).quantile(thirds).tolist()
        rows[name] = {
            "milliseconds": round(1e3 * values.median().item(), 3),
            "ratio_to_erm": {"low": round(low, 3), "median": round(median, 3), "high": round(high, 3)},
        }
        print(f"{name:34s} {rows[name]['milliseconds']:8.2f} ms  {median:.2f} x ERM [{low:.2f}, {high:.2f}]")
    if args.out is not None:
        command = ["python benchmarks/perturb_step.py", *(argv if argv is not None else sys.argv[1:])]
        record = {
            "command": " ".join(map(_short, command)),
            **environment(device),
            "threads": args.threads,
            "batch": args.batch,
            "repeats": args.repeats,
            "steps": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.out.with_suffix(".part")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
