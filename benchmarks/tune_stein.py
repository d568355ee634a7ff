"""Tune score matching and both forms of LSD on three densities of the plane, on validation data.

    python benchmarks/tune_stein.py --out results/tuning-stein-plane.json

Every method gets the same random learning rates, and so the same number of trials, seeds and steps of its
own; only the two forms of LSD have a critic, for which each trial also draws a learning rate, the number of
critic steps for one of the model, and the penalty. A trial's score is the log-likelihood of *validation*
points under the averaged weights, the normaliser by quadrature, less that under the true density (so that
trials with other data can be compared), averaged over densities and seeds. The chapter uses each method's
best trial, with other seeds, and reports the last iterate on other test points. Trials that ``--out`` already
holds are not run again.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import torch
from tuning import Record, best, log_uniform

from companion import energies, metrics, networks, stein

SEEDS, POINTS, BATCH, WIDTHS, GAIN, AVERAGE = 2, 10_000, 200, (64, 128), 4.0, 0.99
METHODS = ("score_matching", "plain", "anchored")
DENSITIES = {
    "eight_gaussians": energies.GaussianMixture.ring(std=0.3),
    "moons": energies.GaussianMixture.moons(),
    "rings": energies.Rings((1.0, 2.0), 0.2),
}


def settings(trial: int) -> dict[str, float]:
    """The trial's random settings, the same whichever method asks."""
    draw = random.Random(3000 + trial)

    return {
        "rate": log_uniform(draw, 5e-4, 6e-3), "critic_rate": log_uniform(draw, 1e-3, 8e-3),
        "beta": draw.choice([0.0, 0.5, 0.9]), "critic_steps": draw.choice([1, 2, 5]),
        "lam": draw.choice([1.0, 10.0]),
    }  # fmt: skip


def trial(job: tuple[str, int, dict[str, float], int]) -> dict[str, object]:
    """Train one method with one setting on all densities and seeds side by side and score it."""
    method, number, chosen, steps = job
    torch.set_num_threads(1)  # the pool already uses every core
    start, rng = time.perf_counter(), torch.Generator().manual_seed(40_000 + number)
    stack = SEEDS * len(DENSITIES)
    train, held_out = (
        torch.stack([d.sample(POINTS, rng) for d in DENSITIES.values() for _ in range(SEEDS)])
        for _ in range(2)
    )
    width, critic_width = WIDTHS
    net = networks.MLPEnergy((2,), (width, width), stack, gain=GAIN, generator=rng)
    energy = stein.GaussianBase(net, train.mean(1), train.std(1))
    betas = (chosen["beta"], 0.999)
    run = stein.SteinRun(energy, torch.optim.Adam(energy.parameters(), chosen["rate"], betas), rng)
    loss = stein.score_matching_loss if method == "score_matching" else None
    if loss is None:
        sizes = (2, critic_width, critic_width, 2)
        run.critic = networks.MLP(sizes, stack, gain=GAIN, generator=rng)
        run.critic_optimizer = torch.optim.Adam(run.critic.parameters(), chosen["critic_rate"], betas)
    row: dict[str, object] = {"method": method, "trial": number, **chosen}
    try:
        stein.train(
            run, train, steps, batch=BATCH, loss=loss, lam=chosen["lam"], average=AVERAGE,
            critic_steps=chosen["critic_steps"], anchored=method == "anchored",
            schedule=lambda share: min(1.0, 2 * (1 - share)),
        )  # fmt: skip
        with torch.no_grad():
            values = -run.average(held_out).double().mean(-1)
        values = (values - metrics.grid_log_normaliser(run.average, 6.0, stack=stack)).reshape(-1, SEEDS)
        row["loglik"] = {k: [round(u, 4) for u in v] for k, v in zip(DENSITIES, values.tolist(), strict=True)}
        truth = [
            d.log_density(x).mean(-1) for d, x in zip(DENSITIES.values(), held_out.split(SEEDS), strict=True)
        ]
        row["truth"] = {k: [round(u, 4) for u in v.tolist()] for k, v in zip(DENSITIES, truth, strict=True)}
        row["score"] = round((values - torch.stack(truth)).mean().item(), 4)
    except (FloatingPointError, ValueError) as error:
        row["failed"] = str(error)
    return row | {"steps": steps, "seconds": round(time.perf_counter() - start, 1)}


def summary(rows: list[dict]) -> dict[str, object]:
    """Each method's trial of highest score."""
    return {"best": best(rows, "score", by="method", groups=METHODS)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="random settings, each tried for every method")
    parser.add_argument("--steps", type=int, default=6000, help="of LSD, critic steps included")
    parser.add_argument("--score-matching-steps", type=int, default=2500)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    header = {
        "densities": list(DENSITIES), "seeds": SEEDS, "points": POINTS, "batch": BATCH, "widths": WIDTHS,
        "gain": GAIN, "average": AVERAGE, "steps": args.steps,
        "score_matching_steps": args.score_matching_steps,
    }  # fmt: skip
    try:
        record = Record(args.out, header, summary, identity=("method", "trial"))
    except ValueError as error:
        parser.error(str(error))
    jobs = [(method, i) for i in range(args.trials) for method in METHODS if record.lacks(method, i)]
    steps = dict.fromkeys(METHODS, args.steps) | {"score_matching": args.score_matching_steps}
    record.run(trial, [(method, i, settings(i), steps[method]) for method, i in jobs], args.workers)
    for row in summary(record.rows)["best"].values():
        print(row)


if __name__ == "__main__":
    main()
