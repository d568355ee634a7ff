#!/usr/bin/env python
"""Run chapters into a book: ``python book/run.py [--profile P] [--only CHAPTER ...] [--set name=value] ...``.

Each chapter (a MyST text notebook) is converted with jupytext and executed with papermill, in a kernel of
this very interpreter and with the project's root as its working directory; ``pages.py`` then stages what
was executed and builds the book from it. A run leaves under ``build/<profile>/``:

    executed/<chapter>.ipynb   the notebook with its outputs (failed/ has the partial ones)
    results/<chapter>.json     the figures it recorded, and where they were made
    figures/<chapter>-<n>.png  its images
    logs/<chapter>.log         what its cells printed
    html/                      the book

A chapter whose source, parameters, companion and packages are unchanged is not run again. Exit status:
0 done, 1 a chapter or the build failed, 2 something in the call is wrong, 130 interrupted.

``--publish`` runs nothing: it builds the book for its readers from chapters that were executed before,
perhaps on another machine, and refuses one that is missing or comes from another state of the project.

Under ``torchrun`` every process runs the chapters named by ``--only`` together with the others, training one
model between them (``companion.distributed``); the first keeps the results and builds the book.

``--jobs 2`` runs two chapters side by side, the longest first, each with half the cores. Small networks gain
little from a second core, so the whole is done sooner, though each chapter by itself takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keys
import pages
import plan
import recorded
from execute import ChapterFailed, execute_all
from parameters import BookError
from plan import Chapter, Layout, Profile
from render import BuildFailed, build_book
from tqdm import tqdm

__all__ = ["is_current", "main"]


def is_current(chapter: Chapter, values: dict[str, Any], layout: Layout) -> bool:
    """Whether this very run of the chapter has been done and its notebook is still there."""
    result = pages.read_result(layout, chapter)
    return result is not None and result["key"] == keys.cache_key(
        layout.root, chapter, values, layout.profile
    )


def _share_the_cores(jobs: int) -> None:
    """Give the numerical libraries of each job its part of the threads that this process may really use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's quota, which the count above ignores
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, min(cores, int(quota) // int(period)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, cores // jobs)))
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # bars inside chapters go to a log, not to a terminal


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Keep a second run out of this profile's folder; the lock goes with the process, however it ends."""
    layout.build.mkdir(parents=True, exist_ok=True)
    with (layout.build / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BookError(
                f"another run is at work in {layout.shown(layout.build)}; let it end first"
            ) from None
        yield


def _list(chapters: list[Chapter], values: dict[str, dict[str, Any]], layout: Layout) -> None:
    for chapter in chapters:
        state = "up to date" if is_current(chapter, values[chapter.name], layout) else "to run"
        print(f"{chapter.name}  [{layout.profile}: {state}]")
        for name, parameter in chapter.parameters.items():
            print(f"    {name} = {values[chapter.name][name]!r:<24} {parameter.comment}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="book/run.py", description="Run chapters and build the book.")
    parser.add_argument("--profile", default="cpu", help="smoke, cpu (default), gpu or paper")
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="CHAPTER")
    parser.add_argument("--set", action="append", default=[], metavar="[CHAPTER.]NAME=VALUE", dest="settings")
    parser.add_argument("--data", metavar="NAME_OR_PATH", help="data set for the chapters that take one")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="chapters side by side (1)")
    parser.add_argument("--fresh", action="store_true", help="run chapters again even if nothing changed")
    parser.add_argument("--no-build", action="store_true", help="run chapters, do not build the book")
    parser.add_argument("--publish", action="store_true", help="run nothing, build for readers what was run")
    parser.add_argument("--list", action="store_true", help="show chapters and parameters, run nothing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace) -> None:
    rank, size = _place()
    layout = Layout(args.root.resolve(), args.profile, rank)
    chapters = plan.load_chapters(layout.root)
    profile = plan.load_profile(layout.root, args.profile, chapters)
    selected = plan.select(chapters, args.only)
    settings = [plan.Setting.parse(text) for text in args.settings]
    values = plan.resolve(chapters, selected, profile, settings, args.data)
    if args.list:
        _list(selected, values, layout)
        return
    if args.publish:
        if selected != list(chapters.values()) or settings or args.data or args.fresh or args.no_build:
            raise BookError("--publish takes all chapters as the profile has them; give it --profile alone")
        with _alone(layout):
            _refuse_unpublishable(selected, values, layout)
            build_book(layout, chapters, [], banner=True)
        return
    if size > 1:
        _refuse_undivided(selected, args)
    _share_the_cores(args.jobs * (int(os.environ["LOCAL_WORLD_SIZE"]) if size > 1 else 1))
    with _alone(layout):
        # All of several processes, or none: one that found its part done would leave the others waiting.
        due = [c for c in selected if args.fresh or size > 1 or not is_current(c, values[c.name], layout)]
        for chapter in selected:
            if chapter not in due:
                _say(selected, chapter, "unchanged, not run again")
        if args.jobs > 1:
            due = _longest_first(due, layout)
        failure: ChapterFailed | None = None
        with contextlib.closing(execute_all(due, values, profile, layout, args.jobs)) as outcomes:
            for chapter, outcome in tqdm(outcomes, "chapters", len(due), disable=not sys.stderr.isatty()):
                if isinstance(outcome, ChapterFailed):
                    failure = failure or outcome
                    _say(selected, chapter, "failed")
                else:
                    seconds, memory = outcome["seconds"], outcome["peak_memory_mb"]
                    _say(selected, chapter, f"{seconds:.1f} s, peak memory {memory:.0f} MB")
        if failure is not None:
            raise failure
        if not args.no_build and rank == 0:
            build_book(layout, chapters, _stale(chapters, selected, profile, layout))


def _longest_first(chapters: list[Chapter], layout: Layout) -> list[Chapter]:
    """By the time that each took when it was last measured, so that no job is left with a long one alone.

    A chapter that nobody has measured yet counts as the longest.
    """
    kept = recorded.runs(layout.root, [c.name for c in chapters], layout.profile, {})
    minutes = {
        name: max((run.minutes for run in own if run.profile == layout.profile), default=math.inf)
        for name, own in kept.items()
    }
    return sorted(chapters, key=lambda chapter: -minutes[chapter.name])


def _place() -> tuple[int, int]:
    """This process's rank, and how many ``torchrun`` started: (0, 1) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _refuse_undivided(chapters: list[Chapter], args: argparse.Namespace) -> None:
    """Raise ``BookError`` for what several processes cannot do together."""
    alone = [c.name for c in chapters if not c.distributed]
    if alone:
        raise BookError(
            f"{', '.join(alone)}: several processes have nothing to share there; run "
            f"{'it' if len(alone) == 1 else 'them'} without torchrun"
        )
    if args.jobs > 1:
        raise BookError(
            "--jobs runs chapters side by side, torchrun one chapter on all processes: choose one"
        )


def _refuse_unpublishable(chapters: list[Chapter], values: dict[str, dict[str, Any]], layout: Layout) -> None:
    """Raise ``BookError`` unless each chapter was executed as it stands, here or elsewhere at this commit."""
    problems, head = [], pages.commit(layout.root)
    for chapter in chapters:
        result = pages.read_result(layout, chapter)
        if result is None:
            problems.append(f"{chapter.name}: not executed")
            continue
        here = is_current(chapter, values[chapter.name], layout)
        same_commit = head is not None and result["commit"] == head and not head.endswith("+dirty")
        if not here and not same_commit:
            made_at = result["commit"] or "no commit"
            problems.append(f"{chapter.name}: executed at {made_at}, this is {head}")
    if problems:
        told = "".join(f"\n  {line}" for line in problems)
        raise BookError(f"not fit to publish in profile {layout.profile}; run the chapters first:{told}")


def _say(selected: list[Chapter], chapter: Chapter, note: str) -> None:
    tqdm.write(f"[{selected.index(chapter) + 1}/{len(selected)}] {chapter.name}: {note}")
    sys.stdout.flush()


def _stale(
    chapters: dict[str, Chapter], selected: list[Chapter], profile: Profile, layout: Layout
) -> list[str]:
    """Chapters outside this run whose pages come from an earlier state of the project."""
    others = [c for c in chapters.values() if c not in selected and c.name in profile.sections]
    values = plan.resolve(chapters, others, profile)
    done = [c for c in others if pages.read_result(layout, c) is not None]
    return [c.name for c in done if not is_current(c, values[c.name], layout)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return its exit status; errors end as a message, not a traceback."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ChapterFailed, BuildFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted; finished chapters are kept, the same command goes on from here", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    # Also when started with SIGINT ignored, as a shell does for a job in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
