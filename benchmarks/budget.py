"""Does the ``gpu`` profile fit a Colab T4? Operations and calls of its long loops, counted on any machine.

    python benchmarks/budget.py --out results/budget-gpu.json

The sizes are read from ``book/profiles/gpu.yml`` and the chapters' parameters. Of each long loop one unit (a
chain's step, an update, a pass over an image) is run on the CPU with the profile's networks and counted, and
multiplied by how often the profile does it. Minutes are an estimate, for nothing of this was run on a T4: a
loop takes the longer of its operations at ``SHARE`` of the float32 rate in NVIDIA's data sheet and its calls
at ``CALL`` each, as replayed by a CUDA graph. A T4 has no bfloat16 units; a GPU that has is far below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from langevin_step import write
from limits import Count
from torch import Tensor, nn

from companion import gan, graphs, langevin, likelihood, networks, stein
from companion.classifiers import recipe
from companion.residual import PlainResNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

from plan import load_chapters, load_profile, resolve  # noqa: E402

RATE = 8.1e12  # float32 operations a second of a T4: NVIDIA's data sheet
SHARE = 0.3  # of it that is assumed to be reached; the CPU's loops reach 0.2 to 0.9 of theirs
CALL = 3e-6  # seconds a small call takes in a replayed graph, assumed
LIMIT = 12.0  # minutes a chapter

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
TRAIN = {"digits": 1000, "mnist": 55_000, "cifar10": 45_000}
Work = Callable[[], object]


@dataclass
class Loop:
    """``times`` units of ``operations`` and ``calls``."""

    chapter: str
    what: str
    times: float
    operations: float
    calls: float

    @property
    def minutes(self) -> float:
        """On a T4, by the assumptions above."""
        return self.times * max(self.operations / (SHARE * RATE), self.calls * CALL) / 60


def counted(work: Work) -> tuple[float, float]:
    work()
    with Count() as count:
        work()
    return count.operations, count.calls


def an_energy(values: dict[str, Any], name: str, rng: torch.Generator) -> nn.Module:
    shape = SHAPES[name]
    if values["network"] == "conv":
        return networks.ConvEnergy(shape, values["width"], rng)
    hidden = tuple(values.get("hidden", (256, 256)))
    return networks.MLPEnergy(shape, hidden, stack=values["n_seeds"], generator=rng)


def a_chain(energy: nn.Module, batch: int, steps: int, learns: float = 1) -> tuple[float, float]:
    """Operations and calls of one update of maximum likelihood: K steps of the chains, one of theta."""
    stack, few = getattr(energy, "stack", None), 2
    x = torch.rand(*(() if stack is None else (stack,)), few, *energy.shape)
    step = counted(lambda: langevin.langevin(energy, x, 1, 0.01))
    learn = counted(lambda: likelihood.ml_loss(energy, x, x, 1.0).sum().backward())
    scale = batch / few
    # Bank, gauges and optimiser are some hundred calls an update, whatever the batch.
    return scale * (steps * step[0] + learns * learn[0]), steps * step[1] + learn[1] + 200


def ebm(values: dict[str, Any], rng: torch.Generator, chapter: str) -> list[Loop]:
    """Short-run, mid-run and long-run: trainings, evaluation chains, attacks."""
    loops = []
    for name in [values["data"], *values.get("more_data", [])]:
        energy = an_energy(values, name, rng)
        stacked = getattr(energy, "stack", None) is not None
        each = 1 if stacked else values["n_seeds"]

        def training(what: str, updates: float, steps: int, batch: int, times: float = 1) -> None:
            unit = a_chain(energy, batch, steps)  # noqa: B023
            loops.append(Loop(chapter, f"{what}, {name}", updates * times, *unit))  # noqa: B023

        def walking(what: str, states: float, steps: float) -> None:
            unit = a_chain(energy, 1, 1, learns=0)  # noqa: B023
            loops.append(Loop(chapter, f"{what}, {name}", steps * states, unit[0], 0))  # noqa: B023

        if chapter == "short-run":
            arms = 3
            training("training", values["updates"] * arms, values["steps"], values["batch"], each)
            walking("evaluation chains", 2000 * arms * values["n_seeds"], 16 * values["steps"])
        elif chapter == "mid-run":
            energies = each + len(values["births"]) - 1
            training("mid-run training", values["updates"], values["steps"], values["batch"], energies)
            training("short-run training", values["short_updates"], values["short_steps"], values["batch"])
            walkers = values["n_seeds"] + values["short_seeds"]  # noise alone is one draw
            tried = walkers * sum(values["curve_steps"])
            attack = max(1, values["attack_steps"] // 2) * max(1, values["attack_replicas"] // 2)
            judged = values["replicas"] // 4
            walking("choice of K, attacks", values["curve_images"] * (attack + 3 * judged), tried)
            walking("choice of K, natural", values["natural_images"] * judged, tried)
            best = sorted(values["curve_steps"])[len(values["curve_steps"]) // 2]  # K is found, not set
            iterate = values["attack_steps"] * values["attack_replicas"] + 4 * values["replicas"]
            # BPDA on all, the short-run energy, the control; the full gradient costs three passes a step.
            walking("attacks", values["n_attacked"] * iterate * (values["n_seeds"] * (1 + 3) + 2 + 3), best)
            walking("attacks, secondary", values["n_secondary"] * iterate * 4, best)
            age = values["steps"] / values["rejuvenation"]
            walking("attacks at the trained age", values["n_secondary"] * iterate * walkers, age)
        else:
            updates = 2 * values["prior_updates"] + 4 * values["correction_updates"]
            training("prior and one stage", updates, values["steps"], values["batch"], each)
            training(
                "correction", 2 * values["correction_updates"], values["steps"], 2 * values["batch"], each
            )
            training("short-run", values["short_updates"], values["short_steps"], values["short_batch"], each)
            calls = a_chain(energy, 2, 1, learns=0)
            steps = 2 * values["chain_steps"] + values["short_chain_steps"]
            loops.append(
                Loop(chapter, f"long chains, {name}", steps, calls[0] / 2 * values["chains"], calls[1] - 200)
            )
    return loops


def pairs(values: dict[str, Any], rng: torch.Generator) -> list[Loop]:
    """The images of the critic's chapter."""
    loops, batch = [], values["images_batch"]
    for name in [values["images_data"], *values["more_data"]]:
        shape, few = SHAPES[name], 2
        make = networks.ConvGenerator(shape, values["images_latent"], values["images_width"], rng)
        critic = networks.ConvEnergy(shape, values["images_width"] // 2, rng)
        if values["images_gan"] == "sngan":
            critic = gan.spectrally_normalised(critic)
        run = gan.new_run(make, critic, rate=1e-5, rng=rng)
        x = torch.rand(few, *shape)
        options = {"batch": few, "critic_steps": values["images_critic_steps"], "progress": False}
        if values["images_gan"] != "sngan":
            options["penalty"] = values["images_penalty"]
        unit = counted(lambda: gan.train(run, x, run.update + 1, **options))  # noqa: B023
        # Each pair is trained once, and once more for the time that fine-tuning took.
        times = values["images_pairs"] * values["images_updates"] * 1.2
        loops.append(
            Loop("discriminator-langevin", f"training, {name}", times, unit[0] * batch / few, unit[1])
        )
        critic.eval(), make.eval()
        z = torch.randn(few, values["images_latent"])

        def there_and_back(critic: nn.Module = critic, make: nn.Module = make, z: Tensor = z) -> None:
            critic(make(z.clone().requires_grad_(True))).sum().backward()

        walk = counted(there_and_back)[0] / few * 2 / 3  # a chain takes no gradients of weights
        arms, steps = 4, max(values["images_steps"])
        states = values["images_pairs"] * values["images_samples"] * 2 * arms
        tuned = sum(values[arm][3] for arm in ("images_dcd", "images_dcd_pixel"))
        states_tuned = values["images_pairs"] * batch * tuned
        loops.append(Loop("discriminator-langevin", f"walks, {name}", states * steps, walk, 0))
        loops.append(Loop("discriminator-langevin", f"fine-tuning, {name}",
                          states_tuned * values["images_tune_steps"], walk, 0))  # fmt: skip
    return loops


def perturbed(values: dict[str, Any]) -> list[Loop]:
    """The large study of the chapter on weight perturbation."""
    if not values["large"]:
        return []
    shape, few = SHAPES[values["large"]], 2
    net = PlainResNet(shape[0], 10, values["large_width"])
    x = torch.rand(few, *shape)
    unit = counted(lambda: net(x).sum().backward())
    passes = 0.0
    for arm in values["large_arms"]:
        numbers = {"sam": [1.0], "amp": [1.0, 1.0], "amp_per_tensor": [1.0, 1.0]}.get(arm, [])
        made = recipe(arm, [0.1, 0.0, *numbers], 1)
        passes += made.epochs * (1 + (values["large_ascent"] / values["large_batch"] if made.rule else 0))
    loops = []
    for size in values["large_subsets"]:
        images = size or TRAIN[values["large"]]
        times = passes * values["large_seeds"] * values["large_epochs"] * images
        loops.append(Loop("adversarial-model-perturbation", f"{images} images", times, unit[0] / few, 0))
    return loops


def scores(values: dict[str, Any], rng: torch.Generator) -> list[Loop]:
    """LSD and score matching in the plane, three densities."""
    s, d = values["n_seeds"], 3
    energy = networks.MLPEnergy((2,), (values["width"],) * 2, stack=s * d, generator=rng)
    critic = networks.MLP((2, *(values["critic_width"],) * 2, 2), s * d, generator=rng)
    adams = [torch.optim.Adam(net.parameters(), 1e-5) for net in (energy, critic)]
    run = stein.SteinRun(energy, adams[0], rng, critic, adams[1])
    x, loops = torch.randn(500, 2), []
    cycle = values["lsd_critic_steps"] + 1
    unit = counted(lambda: stein.train(
        run, x, run.step + cycle, batch=values["batch"], critic_steps=cycle - 1))  # fmt: skip
    for what, steps in (
        ("LSD, two critics", 2 * values["lsd_steps"]),
        ("unequal weights", values["weight_steps"]),
    ):
        loops.append(Loop("stein-discrepancy", what, steps / cycle, *unit))
    unit = counted(lambda: stein.train(
        run, x, run.step + 1, batch=values["batch"], loss=stein.score_matching_loss))  # fmt: skip
    loops.append(Loop("stein-discrepancy", "score matching", 2 * values["sm_steps"], *unit))
    return loops


def on_graphs(values: dict[str, Any], rng: torch.Generator) -> list[Loop]:
    """Stein training of graph energies: every arm, and the chains."""
    ring = graphs.GraphBatch.from_edges([[(i, (i + 1) % 16) for i in range(16)]] * 4, [16] * 4)
    size = {"channels": values["channels"], "hidden": values["hidden"]}
    run = graphs.graph_run(ring, tuple(values["levels"]), rng, **size)
    few = 2
    unit = counted(lambda: graphs.train(run, run.step + 1, batch=few, progress=False))
    arms = 6  # of the comparison; a model and a critic step cost 5 in the chapter's unit
    steps = (values["cost"] * 2 + values["short_cost"] * arms) / 5
    loops = [Loop("stein-graphs", "trainings", steps, unit[0] * values["batch"] / few, unit[1])]
    a, sigma = torch.randn(few, 120), torch.full((few,), 0.5)
    walk = counted(lambda: langevin.langevin(lambda v: run.average(v, sigma), a, 1, 0.01))
    steps, sizes = values["chain_steps"] * len(values["levels"]) * values["draws"], 9
    loops.append(Loop("stein-graphs", "sampling", steps * 2 * sizes, walk[0] / few * 3, walk[1]))
    return loops


def settings(profile: str) -> dict[str, dict[str, Any]]:
    """Every chapter's parameters in a profile."""
    chapters = load_chapters(ROOT)
    return resolve(chapters, list(chapters.values()), load_profile(ROOT, profile, chapters))


def all_loops(profile: str) -> list[Loop]:
    """Every long loop of a profile."""
    values = settings(profile)
    rng = torch.Generator().manual_seed(0)
    loops = []
    for chapter in ("short-run", "mid-run", "long-run"):
        loops += ebm(values[chapter], rng, chapter)
    loops += pairs(values["discriminator-langevin"], rng) + scores(values["stein-discrepancy"], rng)
    return (
        loops + on_graphs(values["stein-graphs"], rng) + perturbed(values["adversarial-model-perturbation"])
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    loops = all_loops(args.profile)
    chapters: dict[str, float] = {}
    for loop in loops:
        chapters[loop.chapter] = chapters.get(loop.chapter, 0.0) + loop.minutes
        print(f"{loop.chapter:30s} {loop.what:36s} {loop.times * loop.operations:9.3g} operations "
              f"{loop.times * loop.calls:9.3g} calls {loop.minutes:7.1f} min")  # fmt: skip
    for chapter, minutes in chapters.items():
        print(f"{chapter:30s} {minutes:7.1f} of {LIMIT:g} minutes" + "  TOO LONG" * (minutes > LIMIT))
    if args.out is not None:
        rows = [
            {"chapter": loop.chapter, "loop": loop.what, "operations": loop.times * loop.operations,
             "calls": loop.times * loop.calls, "minutes": round(loop.minutes, 2)}
            for loop in loops
        ]  # fmt: skip
        assumed = {"rate": RATE, "share": SHARE, "call": CALL, "limit": LIMIT}
        command = f"python benchmarks/budget.py --profile {args.profile}"
        write(args.out, {"kind": "budget", "command": command, "assumed": assumed, "loops": rows})


if __name__ == "__main__":
    main()
