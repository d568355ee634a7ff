"""Tune the arms of the chapter on critics as energies alike, on pairs and data of their own, and record it.

    python benchmarks/tune_refine.py --out results/tuning-refine.json

In each part every arm gets the same number of random settings of what it has (step size and inverse
temperature; DCD its learning rate too; DOT a step alone) on two pairs trained on the 25 Gaussians, and is
scored by the high-quality share times the share of modes found. On digits the walking arms are scored by the
lowest FD against *validation* images over the numbers of steps in the chapter, averaged over four pairs; the
number of DCD's updates is searched there too. The chapter uses each arm's best trial with other seeds and
reports on test points and images. Trials that ``--out`` already holds are not run again.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tuning import Record, best, log_uniform

from companion import data, gan, metrics, networks, refine
from companion.energies import GaussianMixture
from companion.langevin import DivergenceError

TRIALS = {"plane": 8, "digits": 12}
IMAGE_PAIRS = 4
RANGES = {
    "plane": {
        "data_space": {"step_size": (0.01, 0.03), "beta": (10.0, 80.0)},
        "ddls": {"step_size": (0.01, 0.15), "beta": (5.0, 150.0)},
        "dgflow": {"step_size": (0.005, 0.1), "beta": (20.0, 500.0)},
        "dot": {"step_size": (0.001, 0.03)},
        "dcd": {"step_size": (0.01, 0.03), "beta": (10.0, 80.0), "rate": (1.5e-3, 8e-3)},
    },
    "digits": {
        "ddls": {"step_size": (0.01, 0.12), "beta": (3.0, 80.0)},
        "pixel": {"step_size": (0.002, 0.03), "beta": (3.0, 300.0)},
        "dcd": {
            "step_size": (0.01, 0.12),
            "beta": (3.0, 80.0),
            "rate": (3e-5, 1e-3),
            "updates": (30, 150),
        },
        "dcd_pixel": {
            "step_size": (0.002, 0.03),
            "beta": (3.0, 300.0),
            "rate": (3e-5, 1e-3),
            "updates": (30, 150),
        },
    },
}
# What the chapter fixes; a test holds the two against each other.
PLANE = {
    "hidden": [96, 96, 96], "gain": 4.0, "plane_updates": 600, "batch": 256, "rate": 0.001, "penalty": 0.1,
    "tune_updates": 600, "tune_steps": 20, "tune_batch": 128, "drift": 0.1, "plane_steps": 200,
}  # fmt: skip
IMAGES = {
    "images_latent": 16, "images_width": 16, "images_updates": 800, "images_batch": 64, "images_rate": 0.001,
    "images_critic_steps": 2, "images_penalty": 1.0, "images_penalty_batch": 16, "images_average": 0.99,
    "images_tune_steps": 10, "images_steps": [0, 5, 10, 20, 50],
}  # fmt: skip


def settings(part: str, arm: str, trial: int) -> dict[str, float]:
    """The trial's random settings, log-uniform; two arms with the same ranges get the same ones."""
    draw = random.Random(f"refine {trial}")

    chosen = {name: log_uniform(draw, *bounds) for name, bounds in RANGES[part][arm].items()}
    return {name: round(value) if name == "updates" else value for name, value in chosen.items()}


def plane_pairs(rng: torch.Generator) -> tuple[gan.GANRun, torch.Tensor, GaussianMixture]:
    """Two pairs on the 25 Gaussians, trained as in the chapter."""
    grid = GaussianMixture.grid(spacing=1.0, std=0.05)
    points, hidden = grid.sample(20000, rng), tuple(PLANE["hidden"])
    network = networks.PointGenerator(2, 2, hidden, stack=2, generator=rng)
    critic = networks.MLPEnergy((2,), hidden, stack=2, gain=PLANE["gain"], generator=rng)
    run = gan.new_run(network, critic, rate=PLANE["rate"], rng=rng)
    gan.train(
        run, points, PLANE["plane_updates"], batch=PLANE["batch"], critic_steps=3, penalty=PLANE["penalty"],
        penalty_batch=PLANE["batch"] // 4, progress=False,
    )  # fmt: skip
    return run, points, grid


def plane_trial(
    arm: str, chosen: dict[str, float], run: gan.GANRun, points: torch.Tensor, grid: GaussianMixture
) -> dict[str, object]:
    """One arm with one setting on both pairs."""
    rng = torch.Generator().manual_seed(31)
    critic, network, steps = run.critic, run.network, PLANE["plane_steps"]
    walk = {name: chosen[name] for name in ("step_size", "beta") if name in chosen}
    z = torch.empty(2, 500, network.latent).normal_(generator=rng)
    if arm == "dcd":
        critic = copy.deepcopy(critic)
        adam = torch.optim.Adam(critic.parameters(), lr=chosen["rate"], betas=(0.5, 0.9))
        refine.finetune(
            critic, network, points, PLANE["tune_updates"], optimizer=adam, batch=PLANE["tune_batch"],
            steps=PLANE["tune_steps"], generator=rng, penalty=PLANE["penalty"],
            penalty_batch=PLANE["tune_batch"] // 2, drift=PLANE["drift"], **walk,
            schedule=lambda share: 0.05**share,
        )  # fmt: skip
    latent = refine.Field(critic, network)
    if arm in ("data_space", "dcd"):
        x = refine.data_space(latent.decode(z), refine.Field(critic), steps, generator=rng, **walk).x
    else:
        x = getattr(refine, arm)(z, latent, steps, generator=rng, **walk).x
    rows = [metrics.mode_coverage(part, grid.means, grid.std) for part in x]
    found = []
    for part in x:
        distance, nearest = torch.cdist(part, grid.means).min(1)
        counts = torch.bincount(nearest[distance < 4 * grid.std], minlength=len(grid.means))
        found.append(int((counts >= len(part) / len(grid.means) / 10).sum()))
    return {
        "high_quality": [round(row.high_quality, 4) for row in rows], "modes": found,
        "score": round(sum(r.high_quality * n for r, n in zip(rows, found, strict=True)) / 25 / len(rows), 4),
    }  # fmt: skip


def image_pairs(digits: data.Dataset, rng: torch.Generator) -> list[gan.GANRun]:
    """Pairs on the digits, trained as in the chapter."""
    runs = []
    for _ in range(IMAGE_PAIRS):
        network = networks.ConvGenerator(digits.shape, IMAGES["images_latent"], IMAGES["images_width"], rng)
        critic = networks.ConvEnergy(digits.shape, IMAGES["images_width"] // 2, rng)
        run = gan.new_run(
            network, critic, rate=IMAGES["images_rate"], average=IMAGES["images_average"], rng=rng
        )
        runs.append(gan.train(
            run, digits.x_train, IMAGES["images_updates"], batch=IMAGES["images_batch"],
            critic_steps=IMAGES["images_critic_steps"], half_level=1 / digits.levels,
            penalty=IMAGES["images_penalty"], penalty_batch=IMAGES["images_penalty_batch"], progress=False,
        ))  # fmt: skip
        run.average.eval()
        run.critic.eval()
    return runs


def image_trial(
    arm: str,
    chosen: dict[str, float],
    runs: list[gan.GANRun],
    digits: data.Dataset,
    score: Callable[[torch.Tensor], float],
    count: int,
) -> dict[str, object]:
    """One arm with one setting on all pairs: FD on validation images at each number of steps."""
    rng, latent = torch.Generator().manual_seed(32), arm in ("ddls", "dcd")
    walk = {name: chosen[name] for name in ("step_size", "beta")}
    rows = []
    for run in runs:
        critic = run.critic
        if arm.startswith("dcd"):
            critic = copy.deepcopy(critic)
            adam = torch.optim.Adam(critic.parameters(), lr=chosen["rate"], betas=(0.0, 0.9))
            refine.finetune(
                critic, run.average, digits.x_train, chosen["updates"], optimizer=adam,
                batch=IMAGES["images_batch"], steps=IMAGES["images_tune_steps"], generator=rng, latent=latent,
                half_level=1 / digits.levels, penalty=IMAGES["images_penalty"],
                penalty_batch=IMAGES["images_penalty_batch"], **walk,
            )  # fmt: skip
        field = refine.Field(critic.eval(), run.average if latent else None)
        z = torch.empty(count, run.average.latent).normal_(generator=rng)
        state = z if latent else refine.Field(critic, run.average).decode(z)
        method, done, row = refine.ddls if latent else refine.data_space, 0, []
        for mark in IMAGES["images_steps"]:
            if mark > done:
                state, done = method(state, field, mark - done, generator=rng, **walk).state, mark
            row.append(round(score(field.decode(state)), 4))
        rows.append(row)
    mean = [sum(values) / len(values) for values in zip(*rows, strict=True)]
    return {"fd": rows, "score": round(-min(mean), 4)}


def summary(rows: list[dict]) -> dict[str, object]:
    """Each arm's trial of highest score, by part."""
    parts = {
        part: best([row for row in rows if row["part"] == part], "score", by="arm", groups=arms)
        for part, arms in RANGES.items()
    }
    return {"best": {part: found for part, found in parts.items() if found}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=[*RANGES, "both"], default="both")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    header = {"plane": PLANE, "digits": IMAGES, "image_pairs": IMAGE_PAIRS}
    try:
        record = Record(args.out, header, summary, identity=("part", "arm", "trial"))
    except ValueError as error:
        parser.error(str(error))
    for part in RANGES if args.part == "both" else [args.part]:
        todo = [(a, i) for i in range(TRIALS[part]) for a in RANGES[part] if record.lacks(part, a, i)]
        if not todo:
            continue
        rng = torch.Generator().manual_seed(1000)
        if part == "plane":
            given = plane_pairs(rng)
        else:
            digits = data.load()
            judge = metrics.train_classifier(digits.x_train, digits.y_train, generator=rng)
            reference = judge.embed(data.dequantise(digits.x_validation, digits.levels, rng))

            def score(x: torch.Tensor, judge=judge, reference=reference) -> float:  # noqa: ANN001
                return metrics.frechet_distance(judge.embed(x.clamp(-1, 1)), reference)

            given = (image_pairs(digits, rng), digits, score, len(reference))
        for arm, number in todo:
            start, chosen = time.perf_counter(), settings(part, arm, number)
            row = {"part": part, "arm": arm, "trial": number, **chosen}
            try:
                row |= (plane_trial if part == "plane" else image_trial)(arm, chosen, *given)
            except DivergenceError as error:
                row["diverged"] = f"step {error.step} of the chain"
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(row, flush=True)
            record.add(row)


if __name__ == "__main__":
    main()
