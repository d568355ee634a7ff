"""Tune every arm of the adversarial-model-perturbation chapter alike, on validation data, and record it.

    python benchmarks/tune_perturb.py --out results/tuning-perturb-digits.json

Every arm gets the same number of trials, seeds and epochs. A trial is a point of a scrambled Sobol sequence:
its first two coordinates are the peak of the learning rate and the weight decay, the same whichever arm asks,
the others the arm's own numbers (the radius, the flood level, ...; label smoothing stays at 0.1). A trial's
score is the NLL of the clean *validation* labels after the last epoch, averaged over the seeds; a trial that
leaves the numbers is recorded as such. The chapter uses each arm's best trial, with other seeds, and reports
on the test split. Trials that ``--out`` already holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from tuning import Record, best

from companion import data
from companion.calibration import calibration_error, error_rate, hard_nll
from companion.classifiers import ARMS, StackedConvNet, noisy_subsets, recipe, train_stack

SEEDS, EPOCHS, IMAGES, NOISE = 3, 40, 600, 0.3
COMMON = {"rate": (0.02, 0.3), "weight_decay": (1e-4, 2e-2)}
OWN = {  # of each arm's numbers: logarithmic, but for the share of the training at which SWA begins
    "flooding": {"level": (0.1, 1.3)},
    "mixup": {"alpha": (0.1, 4.0)},
    "sam": {"rho": (0.1, 3.0)},
    "asam": {"rho": (0.3, 6.0)},
    "amp": {"eps": (0.2, 3.0), "zeta": (0.5, 20.0)},
    "amp_per_tensor": {"eps": (0.1, 1.5), "zeta": (0.5, 20.0)},
    "random": {"eps": (0.1, 3.0)},
    "swa": {"start": (0.25, 0.9), "average_rate": (0.05, 1.0)},
}


def settings(arm: str, trial: int) -> dict[str, float]:
    """The trial's settings for an arm, in the order that ``recipe`` takes them, rounded to two digits."""
    point = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(trial + 1)[-1].tolist()
    drawn = {}
    for u, (name, (low, high)) in zip(point, (COMMON | OWN.get(arm, {})).items(), strict=False):
        value = low + u * (high - low) if name == "start" else low * math.exp(u * math.log(high / low))
        drawn[name] = float(f"{value:.2g}")
    return drawn


def trial(job: tuple[str, int, int]) -> dict[str, object]:
    """Train one arm with one setting for all seeds side by side and score it on the validation split."""
    arm, number, epochs = job
    torch.set_num_threads(1)  # the pool already uses the cores
    digits, chosen = data.load("digits"), settings(arm, number)
    rng = torch.Generator().manual_seed(20_000 + number)
    x, y = noisy_subsets(digits.x_train, digits.y_train, IMAGES, digits.n_classes, NOISE, SEEDS, rng)
    net = StackedConvNet(digits.shape, digits.n_classes, SEEDS, generator=rng)
    row: dict[str, object] = {"arm": arm, "trial": number, **chosen}
    start = time.process_time()
    try:
        train_stack(x, y, net, recipe(arm, list(chosen.values()), epochs), rng)
        logits = net.predict(digits.x_validation)
        for name, figure in (("nll", hard_nll), ("error", error_rate), ("ece", calibration_error)):
            row[name] = [round(value, 4) for value in figure(logits, digits.y_validation).tolist()]
    except RuntimeError as error:
        row["failed"] = str(error)
    return row | {"cpu_seconds": round(time.process_time() - start, 1)}


def summary(rows: list[dict]) -> dict[str, object]:
    """Each arm's trial of lowest mean NLL."""
    return {"best": best(rows, "nll", by="arm", groups=ARMS, lowest=True)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="settings tried for every arm")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    header = {
        "data": "digits", "images": IMAGES, "noise": NOISE, "seeds": SEEDS, "epochs": args.epochs,
    }  # fmt: skip
    try:
        record = Record(args.out, header, summary, identity=("arm", "trial"))
    except ValueError as error:
        parser.error(str(error))
    jobs = [(arm, i, args.epochs) for i in range(args.trials) for arm in ARMS if record.lacks(arm, i)]
    record.run(trial, jobs, args.workers)
    for row in summary(record.rows)["best"].values():
        print(row)


if __name__ == "__main__":
    main()
