"""One chapter: executed with papermill in a kernel that cannot be orphaned, its figures collected.

The kernel is one of this very interpreter and works in the project's root. A chapter that fails leaves its
partial notebook under ``failed/`` and an error that shows the cell; one that is interrupted leaves its log.
``execute_all`` runs several chapters side by side, one kernel each.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import keys
import nbformat
import pages
import plan
from nbformat import NotebookNode
from parameters import BookError
from plan import Chapter, Layout, Profile

__all__ = ["ChapterFailed", "execute_all", "glued_numbers"]

ENVIRONMENT_CELL = """\
import json as _json
from companion.record import environment as _environment
print(_json.dumps(_environment(globals().get("device"))))"""


class ChapterFailed(Exception):
    """A chapter did not reach its end; the message is what the person at the terminal needs."""


# --- kernels --------------------------------------------------------------------------------------


def _kernel_manager() -> type:
    """The class of kernel managers to give to papermill (imported late: it costs half a second)."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        """A kernel of the interpreter that runs this file, whatever kernelspecs the machine has."""

        started: ClassVar[list[ThisPython]] = []

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.started.append(self)

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher"]
            argv += ["--log-level=ERROR", "-f", "{connection_file}"]
            # Another backend in the reader's environment would leave the book without figures.
            env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            return KernelSpec(argv=argv, env=env, display_name="Python 3", language="python")

        @classmethod
        def kill_all(cls) -> None:
            """End the kernels of this class, and the processes that they started."""
            for manager in cls.started:
                group = getattr(manager.provisioner, "pid", None)  # a kernel leads a process group
                if group:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, signal.SIGKILL)

    return ThisPython


# --- several chapters -----------------------------------------------------------------------------


class _Interrupted(Exception):
    """This chapter's kernel was ended because the whole run was interrupted."""


def execute_all(
    chapters: Sequence[Chapter],
    values: dict[str, dict[str, Any]],
    profile: Profile,
    layout: Layout,
    jobs: int = 1,
) -> Iterator[tuple[Chapter, dict[str, Any] | ChapterFailed]]:
    """Run chapters, at most ``jobs`` at a time; yield each with its results, or its failure, when it ends.

    After a failure no further chapter is started, those at work still end. Raises ``KeyboardInterrupt`` once
    every kernel is gone.
    """
    import papermill  # noqa: F401  half a second, and better not in several threads at once

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # _explain says it better
    waiting, running, kernels, stop = list(chapters), {}, [], threading.Event()
    # Outside the main thread nbclient installs no signal handlers of its own, so an interrupt comes to the
    # wait below and does not look like a kernel that died.
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or waiting:
                while waiting and len(running) < jobs:
                    chapter, kernel = waiting.pop(0), _kernel_manager()
                    kernels.append(kernel)
                    future = pool.submit(
                        _execute, chapter, values[chapter.name], profile, layout, kernel, stop
                    )
                    running[future] = chapter
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chapter = running.pop(future)
                    try:
                        outcome: dict[str, Any] | ChapterFailed = future.result()
                    except ChapterFailed as error:
                        outcome, waiting = error, []
                    yield chapter, outcome
        except BaseException:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave a kernel behind
            stop.set()
            while not all(future.done() for future in running):
                for kernel in kernels:
                    kernel.kill_all()
                time.sleep(0.1)
            raise


# --- one chapter ----------------------------------------------------------------------------------


def _execute(
    chapter: Chapter,
    values: dict[str, Any],
    profile: Profile,
    layout: Layout,
    kernel: Any,
    stop: threading.Event,
) -> dict[str, Any]:
    """Run one chapter, put its notebook and results in place, and return the results.

    Raises ``ChapterFailed`` (the partial notebook is then under ``failed/``) or, after ``stop``,
    ``_Interrupted`` (of this run of the chapter only the log is left). What earlier runs left stays as it is.
    """
    import papermill

    key = keys.cache_key(layout.root, chapter, values, profile.name)  # of what is read now
    source = layout.folder("running") / f"{chapter.name}.source.ipynb"
    running = layout.folder("running") / f"{chapter.name}.ipynb"
    notebook = copy.deepcopy(chapter.notebook)
    tag = {"tags": [pages.ENVIRONMENT_TAG]}
    notebook.cells.append(nbformat.v4.new_code_cell(ENVIRONMENT_CELL, metadata=tag))
    nbformat.write(notebook, source)
    running.unlink(missing_ok=True)  # of a run that was killed
    defaults = {name: parameter.default for name, parameter in chapter.parameters.items()}
    started = time.perf_counter()
    try:
        with (layout.folder("logs") / f"{chapter.name}.log").open("w", encoding="utf-8") as log:
            papermill.execute_notebook(
                source,
                running,
                parameters={name: value for name, value in values.items() if value != defaults[name]},
                kernel_name="python3",
                language="python",
                kernel_manager_class=kernel,
                shutdown_kernel="immediate",
                cwd=layout.root,
                progress_bar={"desc": chapter.name, "leave": False} if sys.stderr.isatty() else False,
                stdout_file=log,
                stderr_file=log,
                start_timeout=profile.run.start_timeout,
                execution_timeout=profile.run.cell_timeout,
            )
        executed = nbformat.read(running, as_version=4)
        result = _result(chapter, values, layout, executed)
    except Exception as error:
        if stop.is_set():
            running.unlink(missing_ok=True)
            raise _Interrupted from error
        message = _explain(error, chapter, profile, layout, running)
        if running.exists():
            os.replace(running, layout.folder("failed") / running.name)
        raise ChapterFailed(message) from error
    finally:
        kernel.kill_all()
        source.unlink(missing_ok=True)
    result |= {"seconds": round(time.perf_counter() - started, 1), "key": key}
    # The old result goes first and the new one comes last: a result in place vouches for its notebook.
    final = layout.folder("results") / f"{chapter.name}.json"
    final.unlink(missing_ok=True)
    _save_images(executed, chapter.name, layout.folder("figures"))
    os.replace(running, layout.folder("executed") / running.name)
    (layout.folder("failed") / running.name).unlink(missing_ok=True)
    pages.write_atomically(final, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _result(
    chapter: Chapter, values: dict[str, Any], layout: Layout, notebook: NotebookNode
) -> dict[str, Any]:
    """What an executed chapter recorded. Raises ``BookError`` when it did not come to its last cell."""
    last = notebook.cells[-1]
    printed = "".join(output.get("text", "") for output in last.get("outputs", []))
    if pages.ENVIRONMENT_TAG not in plan.tags(last) or not printed:
        raise BookError("the run ended before the chapter's last cell; does a cell call exit()?")
    environment = json.loads(printed.splitlines()[-1])
    return {
        "chapter": chapter.name,
        "profile": layout.profile,
        "figures": glued_numbers(notebook),
        "seed": values.get("seed"),
        **environment,
        "parameters": values,
        "commit": pages.commit(layout.root),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def glued_numbers(notebook: NotebookNode) -> dict[str, float | int]:
    """All numbers that were glued in an executed notebook, by name.

    Raises ``BookError`` when one name was given to two different numbers, or to nan or infinity.
    """
    figures: dict[str, float | int] = {}
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    for output in outputs:
        scrap = output.get("metadata", {}).get("scrapbook")
        if not scrap:
            continue
        name, text = scrap["name"], output["data"].get(f"{scrap.get('mime_prefix', '')}text/plain", "")
        text = re.sub(r"^np\.\w+\((.*)\)$", r"\1", text)
        if text in ("nan", "inf", "-inf"):
            raise BookError(f"the figure {name!r} is {text}")
        try:
            number = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue  # a glued picture or text
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if figures.setdefault(name, number) != number:
            raise BookError(f"the figure {name!r} was recorded twice, as {figures[name]} and as {number}")
    return figures


def _save_images(notebook: NotebookNode, name: str, folder: Path) -> None:
    for old in folder.glob(f"{name}-*.png"):
        if re.fullmatch(re.escape(name) + r"-\d+\.png", old.name):
            old.unlink()
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    images = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    for number, image in enumerate(images, start=1):
        (folder / f"{name}-{number}.png").write_bytes(base64.b64decode(image))


def _explain(error: Exception, chapter: Chapter, profile: Profile, layout: Layout, running: Path) -> str:
    """Where a chapter failed, the cell's source, the last lines of the error and where to look on."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    lines = [f"FAILED {chapter.name} ({chapter.document}.md, profile {profile.name})"]
    cell, number, total = _failing_cell(running)
    if cell is not None and not isinstance(error, BookError):  # those are about the chapter as a whole
        line = chapter.text.count("\n", 0, max(chapter.text.find(cell.source), 0)) + 1
        lines[0] = (
            f"FAILED {chapter.name}, code cell {number} of {total} ({chapter.document}.md, line {line})"
        )
        lines += ["", *("    " + text for text in cell.source.splitlines()), ""]
    if isinstance(error, CellTimeoutError):
        lines += [
            f"CellTimeoutError: the cell ran longer than {profile.run.cell_timeout:g} s and was ended. "
            f"If it needs more, raise cell_timeout under 'run:' in book/profiles/{profile.name}.yml."
        ]
    elif isinstance(error, DeadKernelError):
        lines += [
            "DeadKernelError: the kernel's process ended in this cell without a Python error: too little "
            "memory, a kill from outside, or a crash in compiled code."
        ]
    else:
        traceback = "\n".join(getattr(error, "traceback", [])) or f"{type(error).__name__}: {error}"
        plain = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
        lines += plain.rstrip().splitlines()[-14:]
    log = layout.folder("logs") / f"{chapter.name}.log"
    lines += ["", f"partial notebook: {layout.shown(layout.build / 'failed' / running.name)}"]
    lines += [f"what it printed:  {layout.shown(log)}"]
    return "\n".join(lines)


def _failing_cell(running: Path) -> tuple[NotebookNode | None, int, int]:
    """The last code cell that was begun in a partial notebook, its number and how many there are."""
    if not running.exists():
        return None, 0, 0
    notebook = nbformat.read(running, as_version=4)
    ours = {"injected-parameters", pages.ENVIRONMENT_TAG}
    code = [c for c in notebook.cells if c.cell_type == "code" and not ours & set(plan.tags(c))]
    begun = [i for i, c in enumerate(code) if c.metadata.get("papermill", {}).get("start_time")]
    return (code[begun[-1]], begun[-1] + 1, len(code)) if begun else (None, 0, len(code))
