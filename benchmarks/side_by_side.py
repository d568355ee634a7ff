"""Time the companion beside the authors' own code: same network, same batch, same precision, in turns.

    python benchmarks/side_by_side.py --lsd LSD --edp GraphScoreMatching --dgflow DGflow \
      --dcd Discriminator-Contrastive-Divergence --out results/side-by-side-cpu.json

Each option is a checkout of the repository that the paper names (github.com/wgrathwohl/LSD,
ermongroup/GraphScoreMatching, clear-nus/DGflow, MinkaiXu/Discriminator-Contrastive-Divergence); what is not
given is left out. Nothing of them is part of this project. Their functions are called as they are; the
networks are this package's, so that only the method's own code differs. Before anything is timed, both must
do the same: the same loss, or without noise the same states after all steps; otherwise the script stops.

Where theirs needs a GPU or a package that only its evaluation uses, that is said beside the figure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from langevin_step import write
from torch import Tensor, nn

from companion import gan, graphs, langevin, networks, refine, stein
from companion.graphs.network import mirror
from companion.record import environment, pick_device

Work = Callable[[], object]


@dataclass
class Case:
    """One method: ``theirs`` and ``ours`` do ``unit`` each time; ``stacked`` does it for ``seeds`` models."""

    unit: str
    theirs: Work
    ours: Work
    note: str = ""
    stacked: Work | None = None
    seeds: int = 1


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> type:  # whatever is imported from it by name
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@contextlib.contextmanager
def checkout(folder: Path, *stubs: str) -> Iterator[None]:
    """Import from ``folder``, with empty modules for ``stubs``; its modules do not stay behind."""
    before = dict(sys.modules)
    sys.path.insert(0, str(folder))
    for name in stubs:
        sys.modules[name] = _Stub(name)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - set(before):
            if (getattr(sys.modules[name], "__file__", None) or str(folder)).startswith(str(folder)):
                del sys.modules[name]


def same(name: str, theirs: Tensor, ours: Tensor, tolerance: float = 1e-3) -> None:
    """Stop unless the two agree to ``tolerance`` of the larger one's size."""
    off = (theirs - ours).norm() / theirs.norm().clamp(min=1e-12)
    if not off < tolerance:
        raise SystemExit(f"{name}: theirs and the companion's differ by {off:.2g}: nothing was timed")


def lsd(folder: Path, device: torch.device) -> Case:
    """Six steps of LSD, five of the critic and one of the model, on the plane: the authors' lsd_toy.py."""
    with checkout(folder, "visualize_flow"):
        official = importlib.import_module("lsd_toy")
    width, batch, lam = (300, 300), 100, 10.0
    data = torch.randn(5000, 2, device=device)

    def pair(stack: int | None) -> stein.SteinRun:
        rng = torch.Generator(device).manual_seed(0)
        energy = networks.MLPEnergy((2,), width, stack=stack, generator=rng)
        critic = networks.MLP((2, *width, 2), stack, generator=rng)
        adams = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999)) for net in (energy, critic)]
        return stein.SteinRun(energy, adams[0], rng, critic, adams[1])

    run, one, five = pair(None), pair(None), pair(5)
    ebm = official.EBM(nn.Sequential(run.energy, _Negative()))  # theirs is a log density

    def stats(x: Tensor, trace: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        sq = official.keep_grad(ebm(x).sum(), x)
        fx = run.critic(x)
        return ((sq * fx).sum(-1) + trace(fx, x)).mean(), (fx * fx).sum(1).mean() * lam

    def theirs() -> None:  # the body of the authors' loop; all of it is in their main()
        for i in range(6):
            run.optimizer.zero_grad()
            run.critic_optimizer.zero_grad()
            x = data[torch.randint(len(data), (batch,), device=device)].requires_grad_()
            loss, penalty = stats(x, official.approx_jacobian_trace)
            if i < 5:
                (-loss + penalty).backward()
                run.critic_optimizer.step()
            else:
                loss.backward()
                run.optimizer.step()

    x = data[:batch].clone().requires_grad_()
    loss, penalty = stats(x, official.exact_jacobian_trace)
    mine, _ = stein.critic_loss(run.energy, run.critic, x, lam=lam, trace="exact")
    same("LSD", (penalty - loss).detach(), mine.detach())

    def ours(run: stein.SteinRun) -> Work:
        return lambda: stein.train(run, data, run.step + 6, batch=batch, lam=lam, critic_steps=5)

    return Case(
        "six LSD steps, 2-300-300, batch 100", theirs, ours(one), "Hutchinson trace in both",
        ours(five), 5,
    )  # fmt: skip


class _Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def plane_pair(device: torch.device, stack: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A generator and a critic of the plane, 128 wide as in the official toys, critic trained a little."""
    rng = torch.Generator(device).manual_seed(0)
    network = networks.PointGenerator(2, 2, (128, 128, 128), stack=stack, generator=rng)
    critic = networks.MLPEnergy((2,), (128, 128, 128), stack=stack, activation=nn.ReLU, generator=rng)
    run = gan.new_run(network, critic, rate=1e-3, rng=rng)
    gan.train(run, torch.randn(2000, 2, device=device), 20, batch=128, penalty=0.1, progress=False)
    return network.eval(), critic.eval()


def dgflow(folder: Path, device: torch.device) -> Case:
    """Twenty-five latent steps of DGflow, KL, the published eta and gamma: the authors' dgflow.py."""
    with checkout(folder, "chainer", "evaluation", "util", "inception_score"):
        official = importlib.import_module("dgflow")
    official.tqdm = lambda steps, **_: steps
    network, critic = plane_pair(device)
    five_network, five_critic = plane_pair(device, 5)
    z = torch.randn(256, 2, device=device)
    five_z = torch.randn(5, 256, 2, device=device)

    def generator(z: Tensor, resize: bool = True) -> Tensor:
        return network(z)

    def discriminator(x: Tensor) -> Tensor:
        return critic(x).unsqueeze(-1)

    folder_of_samples = tempfile.TemporaryDirectory()
    os.makedirs(os.path.join(folder_of_samples.name, "samples"))
    kept: list[Tensor] = []

    def refined(eta: float, gamma: float) -> Tensor:
        config = {"eta": eta, "gamma": gamma, "f_div": "KL", "steps": 25, "save_interval": 25}
        kept.clear()
        official._refine_batch(
            z, discriminator, generator, None, config | {"exp_dir": folder_of_samples.name}
        )
        return kept[-1]

    class Keep:  # theirs writes its samples to disk; this keeps the last in memory, which is quicker
        def __getattr__(self, name: str) -> object:
            import numpy

            return getattr(numpy, name)

        def save(self, path: str, images: object) -> None:
            kept.append(torch.as_tensor(images))

    official.np = Keep()
    field, eta, gamma = refine.Field(critic, network), 0.1, 0.01
    eps = 1e-5
    quiet = refine.dgflow(z, field, 25, eps, 2 * eta / eps**2)
    same("DGflow", refined(eta, 0.0), quiet.x.cpu(), 1e-2)  # ReLU: rounding may choose another side of a kink
    rng = torch.Generator(device).manual_seed(1)
    walk = (25, (2 * eta * gamma) ** 0.5, 1 / gamma)
    five = refine.Field(five_critic, five_network)
    return Case(
        "25 latent steps, batch 256, networks 128 wide", lambda: refined(eta, gamma),
        lambda: refine.dgflow(z, field, *walk, generator=rng),
        "without its writing of samples to disk",
        lambda: refine.dgflow(five_z, five, *walk, generator=rng), 5,
    )  # fmt: skip


def dcd(folder: Path, device: torch.device) -> Case:
    """Sixty steps of DCD's chain on samples: the authors' synthetic_exp/mcmc_sampler.py."""
    with checkout(folder / "synthetic_exp"):
        official = importlib.import_module("mcmc_sampler")
    network, critic = plane_pair(device)
    five_network, five_critic = plane_pair(device, 5)
    x = network(torch.randn(256, 2, device=device)).detach()
    five_x = five_network(torch.randn(5, 256, 2, device=device)).detach()

    def theirs(noise: float) -> Tensor:
        with _anywhere(device):
            return official.Langevin_dynamics(x.clone(), critic, 60, 0.02, noise).detach().cpu()

    eps = 1e-5
    quiet = refine.data_space(x, refine.Field(critic), 60, eps, 2 * 0.02 / eps**2)
    same("DCD", theirs(0.0), quiet.x.cpu(), 1e-2)
    rng = torch.Generator(device).manual_seed(1)
    walk = (60, 0.02, 100.0)
    return Case(
        "60 steps on samples, batch 256, critic 128 wide", lambda: theirs(0.2),
        lambda: refine.data_space(x, refine.Field(critic), *walk, generator=rng),
        "" if device.type == "cuda" else "its noise, fixed to a GPU, drawn on the CPU instead",
        lambda: refine.data_space(five_x, refine.Field(five_critic), *walk, generator=rng), 5,
    )  # fmt: skip


@contextlib.contextmanager
def _anywhere(device: torch.device) -> Iterator[None]:
    """Let ``randn_like(..., device="cuda")`` draw where the tensors are."""
    original = torch.randn_like
    torch.randn_like = lambda x, device=None: original(x)
    try:
        yield
    finally:
        torch.randn_like = original


def edp(folder: Path, device: torch.device) -> Case:
    """A hundred Langevin steps on graphs: the authors' model/langevin_mc.py, with one energy's score."""
    with checkout(folder):
        official = importlib.import_module("model.langevin_mc")
        utils = importlib.import_module("utils.graph_utils")
    official.check_adjs_symmetry = utils.check_adjs_symmetry
    nodes, count, step = 16, 32, 1e-3
    rng = torch.Generator(device).manual_seed(0)
    energy = graphs.GraphEnergy(20, channels=8, hidden=16, generator=rng).to(device).requires_grad_(False)
    sigma = torch.full((count,), 0.2, device=device)
    i, j = torch.triu_indices(nodes, nodes, 1, device=device)
    flags = torch.ones(count, nodes, device=device)
    a = torch.empty(count, len(i), device=device).normal_(generator=rng).mul_(0.3).add_(0.5)

    def score(adjacency: Tensor, flags: Tensor) -> Tensor:
        coordinates = adjacency[:, i, j].detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(coordinates, sigma).sum(), coordinates)
        return mirror(-grad)

    def theirs(noise: float) -> Tensor:
        sampler = official.LangevinMCSampler(device, eps=noise, grad_step_size=step, step_num=100)
        end, _ = sampler.sample(
            count, score, max_node_num=nodes, init_adjs=mirror(a), init_flags=flags, is_final=False
        )
        return end[:, i, j]

    def ours(temperature: float, steps: int = 100) -> Tensor:
        eps = (2 * step * temperature) ** 0.5
        return langevin.langevin(
            lambda x: energy(x, sigma), a, steps, eps, temperature=temperature, generator=rng
        ).x

    same("EDP-GNN's sampler", theirs(0.0), ours(1e-12))
    return Case(
        "100 Langevin steps, 32 graphs of 16 nodes", lambda: theirs(1.0), lambda: ours(1.0),
        "theirs takes the score a second time for its log",
    )  # fmt: skip


CASES: dict[str, Callable[[Path, torch.device], Case]] = {
    "lsd": lsd, "edp": edp, "dgflow": dgflow, "dcd": dcd,
}  # fmt: skip


def timed(case: Case, repeats: int, device: torch.device) -> dict[str, object]:
    """Turns of theirs, ours and the stack; ratios are formed within a turn."""
    works = {"theirs": case.theirs, "ours": case.ours}
    works |= {} if case.stacked is None else {"stacked": case.stacked}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 2):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 1:  # the first two warm up
                times[name].append(time.perf_counter() - began)
    seconds = {name: torch.tensor(values, dtype=torch.double) for name, values in times.items()}
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)

    def spread(values: Tensor) -> dict[str, float]:
        return dict(zip(("low", "median", "high"), (round(v, 3) for v in values.quantile(quarters).tolist()),
                        strict=True))  # fmt: skip

    row: dict[str, object] = {"unit": case.unit, "note": case.note}
    row["milliseconds"] = {name: spread(1e3 * values) for name, values in seconds.items()}
    row["times_faster"] = spread(seconds["theirs"] / seconds["ours"])
    if case.stacked is not None:
        row["seeds"] = case.seeds
        row["times_faster_stacked"] = spread(case.seeds * seconds["theirs"] / seconds["stacked"])
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in CASES:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT")
    parser.add_argument("--repeats", type=int, default=25, help="turns")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    folders = {name: getattr(args, name) for name in CASES if getattr(args, name) is not None}
    if not folders:
        parser.error(f"give at least one checkout: {', '.join(f'--{name}' for name in CASES)}")
    for name, folder in folders.items():
        if not folder.is_dir():
            parser.error(f"--{name}: there is no folder {folder}")
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = {}
    for name, folder in folders.items():
        rows[name] = timed(CASES[name](folder.resolve(), device), args.repeats, device)
        fast = rows[name]["times_faster"]
        stacked = rows[name].get("times_faster_stacked")
        told = (
            f"{name:8s} {rows[name]['unit']}: {fast['median']:.2f} x as fast [{fast['low']}, {fast['high']}]"
        )
        if stacked is not None:
            told += f"; {rows[name]['seeds']} seeds side by side {stacked['median']:.2f} x"
        print(told, flush=True)
    if args.out is not None:
        command = "python benchmarks/side_by_side.py " + " ".join(
            f"--{n} {f.name}" for n, f in folders.items()
        )
        record = {
            "kind": "side-by-side", "command": command, **environment(device),
            "threads": torch.get_num_threads(), "repeats": args.repeats, "methods": rows,
        }  # fmt: skip
        write(args.out, record)


if __name__ == "__main__":
    main()
