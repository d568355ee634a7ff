"""Tune the three trained arms of the short-run chapter alike, on validation data, and record it.

    python benchmarks/tune_short_run.py --out results/tuning-short-run-digits.json

Every arm gets the same random settings of temperature, step size and both learning rates, and so the same
number of trials, seeds and updates. Twice the best of an arm lay at the upper edge of the learning rates, so
that trials from the 16th and from the 26th on draw from higher ones. A trial's score is the FD against the
*validation* split after the trained number of steps, averaged over the seeds; a trial that diverges scores
nothing and is recorded as such. The chapter uses each arm's best trial, with other seeds, and reports on
the test split. Trials that ``--out`` already holds are not run again, so that an interrupted search goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from tuning import Record, best, log_uniform

from companion import data, lifecycle, likelihood, metrics
from companion.langevin import DivergenceError

STEPS, BATCH, SEEDS = 30, 128, 2


def settings(trial: int) -> dict[str, float]:
    """The trial's random settings, log-uniform, the same whichever arm asks."""
    draw = random.Random(1000 + trial)
    ranges = {
        "temperature": (1e-4, 1e-2),
        "step_size": (0.008, 0.05),
        "rate": (5e-5, 1e-3) if trial < 16 else (4e-4, 4e-3) if trial < 26 else (1.5e-3, 1e-2),
        "network_rate": (3e-4, 3e-3) if trial < 16 else (8e-4, 4e-3) if trial < 26 else (1e-3, 5e-3),
    }

    return {name: log_uniform(draw, *bounds) for name, bounds in ranges.items()}


def trial(job: tuple[str, int, dict[str, float], int, str]) -> dict[str, object]:
    """Train one arm with one setting for all seeds side by side and score it."""
    arm, number, chosen, updates, source = job
    torch.set_num_threads(1)  # the pool already uses every core
    digits, start = data.load(source), time.perf_counter()
    rng = torch.Generator().manual_seed(7)
    net = metrics.train_classifier(digits.x_train, digits.y_train, generator=rng)
    reference = net.embed(data.dequantise(digits.x_validation, digits.levels, rng))
    rng.manual_seed(20_000 + number)
    sampling = {name: chosen[name] for name in ("temperature", "step_size")}
    run = lifecycle.short_run(
        arm, digits.shape, rate=chosen["rate"], network_rate=chosen["network_rate"], stack=SEEDS, rng=rng
    )
    row: dict[str, object] = {"arm": arm, "trial": number, **chosen}
    try:
        likelihood.train(
            run, digits.x_train, updates, batch=BATCH, steps=STEPS, data_noise=2 * chosen["step_size"],
            half_level=1 / digits.levels, progress=False, **sampling,
        )  # fmt: skip
        scores, _ = lifecycle.quality_over_steps(
            run, (0, STEPS, 4 * STEPS), len(reference),
            lambda x: metrics.frechet_distance(net.embed(x), reference), rng=rng, **sampling,
        )  # fmt: skip
        for name, values in zip(("fd_start", "fd", "fd_4x"), scores, strict=True):
            row[name] = [round(value, 4) for value in values]
        row["rho"] = [round(value, 4) for value in run.gauge("rho")[-100:].mean(0).tolist()]
    except DivergenceError as error:
        row["diverged"] = f"step {error.step} of the chain in update {run.update}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def summary(rows: list[dict]) -> dict[str, object]:
    """Each arm's trial of lowest mean FD."""
    return {"best": best(rows, "fd", by="arm", groups=lifecycle.ARMS, lowest=True)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=32, help="random settings, each tried for every arm")
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--data", default="digits", help="a data set's name or path (small images)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    header = {
        "data": args.data, "steps": STEPS, "batch": BATCH, "seeds": SEEDS, "updates": args.updates,
    }  # fmt: skip
    try:
        record = Record(args.out, header, summary, identity=("arm", "trial"))
    except ValueError as error:
        parser.error(str(error))
    jobs = [(arm, i) for i in range(args.trials) for arm in lifecycle.ARMS if record.lacks(arm, i)]
    record.run(trial, [(arm, i, settings(i), args.updates, args.data) for arm, i in jobs])
    for row in summary(record.rows)["best"].values():
        print(row)


if __name__ == "__main__":
    main()
