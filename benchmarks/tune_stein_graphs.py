"""Which training of the graph energy is reliable? Every candidate at one cost, on validation graphs.

    python benchmarks/tune_stein_graphs.py --out results/tuning-stein-graphs.json

The plain adversarial objective with the remedies that one tries against its divergence (more critic steps,
two time scales, a penalty on the score, averaged weights), the anchored one with several rates and ratios,
and denoising score matching for orientation. Each candidate is trained with the same three seeds and the
same *cost*: a critic step counts 2, a model step 3, as their times on a CPU are. Trained on community-small;
judged on 200 graphs drawn afresh from the same recipe, which neither training nor test set contains:

- ``dsm``: the denoising loss of the averaged energy a pair, mean over the levels (1 = knows nothing);
- ``dsm_last``: the same of the last weights, not averaged;
- ``mmd``: mean of the degree, clustering and orbit MMD of 100 generated graphs, in draws of 20.

A run whose loss is no longer finite is recorded as diverged, with the step; one that ends with a loss above 1
counts as lost. Runs that ``--out`` holds already are not repeated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from tuning import Record

from companion import graphs
from companion.graphs.training import Pool
from companion.langevin import DivergenceError

SEEDS = 3
CRITIC_COST, MODEL_COST = 2, 3
LEVELS, WEIGHTS = (1.0, 0.75, 0.6, 0.45, 0.35, 0.25, 0.2, 0.1), (1.0,) * 7 + (0.3,)


def _plain(critic_steps: int, rate: float, critic_rate: float, **more: float) -> dict:
    return {"method": "plain", "critic_steps": critic_steps, "rate": rate, "critic_rate": critic_rate, **more}


def _anchored(critic_steps: int, rate: float, critic_rate: float, **more: float) -> dict:
    return {
        "method": "anchored",
        "critic_steps": critic_steps,
        "rate": rate,
        "critic_rate": critic_rate,
        **more,
    }


CANDIDATES = {
    "plain 1:1, as the anchored": _plain(1, 6e-3, 6e-3),
    "plain 1:1, slow": _plain(1, 5e-4, 1e-3),
    "plain 3:1": _plain(3, 5e-4, 1e-3),
    "plain 5:1": _plain(5, 5e-4, 1e-3),
    "plain 5:1, two time scales": _plain(5, 3e-4, 3e-3),
    "plain 5:1, momentum 0.5": _plain(5, 5e-4, 1e-3, momentum=0.5),
    "plain 5:1, score penalty 0.1": _plain(5, 5e-4, 1e-3, score_penalty=0.1),
    "anchored 1:1": _anchored(1, 6e-3, 6e-3),
    "anchored 1:1, critic not averaged": _anchored(1, 6e-3, 6e-3, critic_averaging=0.0),
    "anchored 1:1, half the rates": _anchored(1, 3e-3, 3e-3),
    "anchored 1:1, twice the rates": _anchored(1, 1.2e-2, 1.2e-2),
    "anchored 2:1": _anchored(2, 6e-3, 6e-3),
    "anchored 1:1, batches of 32": _anchored(1, 6e-3, 6e-3, batch=32),
    "dsm": {"method": "dsm", "rate": 6e-3, "critic_steps": 0},
}  # fmt: skip


def validation() -> graphs.GraphBatch:
    return graphs.two_blocks(200, seeded=True, generator=torch.Generator().manual_seed(1))


def denoising(energy: torch.nn.Module, judged: graphs.GraphBatch) -> list[float]:
    """The denoising loss of an energy on all graphs, one number a level; the same noise for every energy."""
    return graphs.denoising_loss(energy, judged, LEVELS, torch.Generator().manual_seed(5))


def trial(job: tuple[str, int, int]) -> dict[str, object]:
    """Train one candidate with one seed at the given cost and judge it."""
    name, seed, cost = job
    torch.set_num_threads(1)  # the pool already uses every core
    chosen = dict(CANDIDATES[name])
    method, critic_steps = chosen.pop("method"), chosen.pop("critic_steps")
    rates = {key: chosen.pop(key) for key in ("rate", "critic_rate") if key in chosen}
    betas = (chosen.pop("momentum", 0.9), 0.95)
    steps = cost // (CRITIC_COST * critic_steps + MODEL_COST)
    if chosen.get("batch") == 32:
        steps = round(steps / 1.5)  # a step then takes half as long again
    rng = torch.Generator().manual_seed(100 + seed)
    data = graphs.load("community-small")
    fresh = validation()
    pool = Pool(fresh)
    run = graphs.graph_run(data.train, LEVELS, rng, method=method, betas=betas, **rates)
    row: dict[str, object] = {"candidate": name, "seed": seed, "steps": steps}
    start = time.perf_counter()
    try:
        graphs.train(
            run, steps, critic_steps=max(1, critic_steps), level_weights=WEIGHTS, progress=False, **chosen
        )
    except DivergenceError as error:
        return row | {"diverged": error.step}
    row["seconds"] = round(time.perf_counter() - start, 1)
    history = run.gauge("dsm")
    row["path"] = [round(part.mean().item(), 3) for part in history.chunk(10)]
    row["dsm"] = [round(value, 4) for value in denoising(run.average, fresh)]
    row["dsm_last"] = round(statistics.fmean(denoising(run.energy, fresh)), 4)
    try:
        made = graphs.generate(run.average, pool.draw_sizes(100, rng), run.levels, steps=30, generator=rng)
        a, b = graphs.descriptors(made.graphs), graphs.descriptors(fresh)
        parts = [graphs.mmd(a.subset(range(i, i + 20)), b) for i in range(0, 100, 20)]
        for key in ("degree", "cluster", "orbit", "mean"):
            row[f"mmd_{key}"] = round(statistics.fmean(part[key] for part in parts), 4)
    except (DivergenceError, ValueError) as error:
        row["not_sampled"] = str(error).split(" (")[0]
    return row


def table(rows: list[dict]) -> list[dict]:
    """One line a candidate: how many of its seeds held, and the mean and spread of the others."""
    lines = []
    for name in CANDIDATES:
        mine = [row for row in rows if row["candidate"] == name]
        if not mine:
            continue
        scores = [statistics.fmean(row["dsm"]) for row in mine if "dsm" in row]
        mmds = [row["mmd_mean"] for row in mine if "mmd_mean" in row]
        line: dict[str, object] = {
            "candidate": name,
            "runs": len(mine),
            "diverged": len(mine) - len(scores),
            "lost": sum(score > 1 for score in scores),  # trained to the end, and worse than knowing nothing
        }
        for key, values in (("dsm", scores), ("mmd", mmds)):
            if values:
                line[key] = float(f"{statistics.fmean(values):.4g}")
                line[f"{key}_sd"] = float(f"{statistics.stdev(values):.3g}") if len(values) > 1 else 0.0
        lines.append(line)
    return lines


def summary(rows: list[dict]) -> dict[str, object]:
    return {"table": table(rows)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cost", type=int, default=7500, help="of one run: 2 a critic step, 3 a model step")
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), help="some of the candidates")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as each worker does
    header = {
        "data": "community-small", "cost": args.cost, "levels": LEVELS, "weights": WEIGHTS, "batch": 16,
    }  # fmt: skip
    try:
        record = Record(args.out, header, summary, identity=("candidate", "seed"), key="runs")
    except ValueError as error:
        parser.error(str(error))
    names = args.only or list(CANDIDATES)
    record.run(
        trial, [(n, s, args.cost) for s in range(SEEDS) for n in names if record.lacks(n, s)], args.workers
    )
    for line in table(record.rows):
        print(line)


if __name__ == "__main__":
    main()
