"""Make ``.venv`` fit to run the book: ``python3 tools/setup.py``. Standard library only.

The environment is made, filled under ``constraints.txt``, tried out and then stamped; while the stamp fits,
setting up again takes no time. An environment that was broken, moved or left half-installed is made anew.
``--freeze`` writes ``constraints.txt`` from a fresh environment instead.

The syntax is kept plain so that an old Python gets as far as saying that it is too old.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["explain_pip", "main", "old_python", "set_up", "stamp_of", "venv_problem"]

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
EXTRAS = "book,test"
IMPORTS = (
    "companion, companion.graphs, jupyter_book, jupytext, matplotlib, nbclient, networkx, papermill, pytest, "
    "safetensors, sklearn, torch, torch_geometric"
)
STAMP, UNFINISHED = "downhill-setup.json", "downhill-unfinished"
# Parts of torch that exist on some platforms only, and tools that pip itself brings.
NOT_FROZEN = re.compile(r"(nvidia|cuda|triton|pytorch-triton|pip|setuptools|wheel|downhill)\b")
CONSTRAINTS_HEADER = """\
# The exact versions that the book is made with; `make constraints` writes them from a fresh environment with
# the extras book and test. pyproject.toml has only lower bounds.
"""
# The figures in results/ were measured with this torch; raise both together.
KEPT = ["torch==2.13.0"]


class SetupError(Exception):
    """What is wrong and what to do about it, in a line."""


def say(text: str) -> None:
    print("setup: " + text, flush=True)


# --- the machine's Python -------------------------------------------------------------------------


def old_python(version: tuple) -> str | None:
    """Why a Python of this version cannot run the book, with a better one if the machine has it."""
    if tuple(version[:2]) >= OLDEST:
        return None
    newer = ["python3.%d" % minor for minor in range(14, OLDEST[1] - 1, -1)]  # noqa: UP031
    found = next((name for name in newer if shutil.which(name)), None)
    remedy = f"this machine has one: make setup PYTHON={found}" if found else "install one from python.org"
    return f"Python {version[0]}.{version[1]} is too old, the book needs 3.11 or newer; {remedy}"


def no_venv() -> str | None:
    """Why this Python cannot make virtual environments (Debian ships that part separately)."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        return f"this Python has no venv module; on Debian or Ubuntu: sudo apt install {package}"
    return None


# --- the environment ------------------------------------------------------------------------------


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def venv_problem(venv: Path) -> str | None:
    """Why an existing environment must be made anew; None when it works, or when there is none."""
    if not venv.exists():
        return None
    if (venv / UNFINISHED).exists():
        return "its installation was not finished"
    stamp = read_stamp(venv)
    if stamp is not None and stamp.get("place") != str(venv):
        return "it was moved here from " + str(stamp.get("place"))
    program = "import sys, pip; print(sys.prefix); print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(python_of(venv)), "-c", program], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return "its Python does not start"
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 2:
        return "its Python or its pip does not work"
    if os.path.realpath(lines[0]) != os.path.realpath(venv):
        return "its Python belongs to " + lines[0]
    if tuple(int(part) for part in lines[1].split()) < OLDEST:
        return "its Python is older than 3.11"
    return None


def read_stamp(venv: Path) -> dict | None:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stamp_of(root: Path, venv: Path) -> dict:
    """What an environment depends on: it is complete while its stamp is this one."""
    import tomllib  # here, because a Python that is too old lacks it

    hashed = hashlib.sha256()
    for name in ("constraints.txt", "tools/setup.py"):
        hashed.update((root / name).read_bytes() + b"\0")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    tables = [project.get("build-system"), project["project"], project["tool"].get("setuptools")]
    hashed.update(json.dumps(tables, sort_keys=True).encode())  # not the settings of ruff and pytest
    hashed.update((venv / "pyvenv.cfg").read_bytes())  # names the interpreter and its version
    source = (root / "companion" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r"""__version__\s*=\s*["'](.+?)["']""", source)
    return {
        "place": str(venv),
        "depends": hashed.hexdigest(),
        "companion": version.group(1) if version else "",
    }


def make_venv(venv: Path) -> None:
    """Make an empty environment. Raises ``SetupError``."""
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(explain_pip(done.stdout + done.stderr))


def pip_install(python: Path, arguments: list, log: Path, cwd: Path) -> None:
    """Run pip install, its output into ``log``. Raises ``SetupError`` with what to do when it fails."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    shows = sys.stdout.isatty()
    with log.open("w", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=str(cwd),
        )
        for line in process.stdout:
            file.write(line)
            if shows and line.lstrip().startswith(("Collecting", "Downloading", "Building", "Installing")):
                print("\r\033[K  " + line.strip()[:76], end="", flush=True)
        code = process.wait()
    if shows:
        print("\r\033[K", end="", flush=True)
    if code:
        output = log.read_text(encoding="utf-8", errors="replace")
        raise SetupError(f"{explain_pip(output)} (the whole output: {log})")


def explain_pip(output: str) -> str:
    """What to do about a pip run that failed, told from its output."""

    def says(*patterns: str) -> bool:
        return any(re.search(pattern, output, re.IGNORECASE) for pattern in patterns)

    if says(r"no space left on device", r"errno 28\b", r"disk quota exceeded"):
        return "the disk is full; free about 3 GB (pip cache purge helps) and run make setup again"
    if says(r"certificate.verify.failed", r"SSLError"):
        return "no secure connection to the package index; check the clock and the certificate (PIP_CERT)"
    if says(
        r"name resolution",
        r"getaddrinfo failed",
        r"nodename nor servname",
        r"NewConnectionError",
        r"ConnectTimeoutError",
        r"ReadTimeoutError",
        r"ProxyError",
        r"max retries exceeded",
        r"network is unreachable",
        r"connection (refused|reset|aborted)",
    ) or (says(r"\(from versions: none\)") and not says("require a different python version")):
        return "no network: pip reaches no package index; connect, or set PIP_INDEX_URL or PIP_FIND_LINKS"
    if says(
        r"command '?\S*(gcc|g\+\+|cc|clang|cl\.exe)'? failed",
        r"unable to execute '?\S*(gcc|cc|clang)",
        r"no such file or directory: '?\S*(gcc|cc|clang)",
        r"unknown compiler",
        r"Visual C\+\+ .* is required",
        r"no (acceptable )?c compiler",
    ):
        built = re.search(r"(?:Failed building wheel|Could not build wheels) for (\S+)", output)
        what = built.group(1).strip(",") if built else "a package"
        return (
            f"{what} has no ready-made wheel for this Python, and no compiler is there to make one; "
            "take another Python (make setup PYTHON=python3.12) or a compiler (apt install build-essential)"
        )
    if says(r"permission denied", r"errno 13\b"):
        return "permission denied; check who owns this folder and .venv"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return (
            f"no {missing.group(1)} for this Python ({sys.version.split()[0]}) and platform; "
            "try another Python (make setup PYTHON=python3.12) or renew the versions (make constraints)"
        )
    if says(r"ResolutionImpossible"):
        return "constraints.txt contradicts pyproject.toml; renew it with make constraints"
    errors = [line.strip() for line in output.splitlines() if re.match(r"\s*(ERROR|error)\b", line)]
    last = errors[-1:] or output.strip().splitlines()[-1:] or ["no output"]
    return "pip failed: " + last[0]


# --- the command ----------------------------------------------------------------------------------


def set_up(root: Path, venv: Path) -> None:
    """Bring the environment up to date, saying each step. Raises ``SetupError``."""
    problem = venv_problem(venv)
    if problem:
        say(f".venv is made anew, because {problem}")
        shutil.rmtree(venv)
    if not venv.exists():
        say(f"making .venv with Python {sys.version.split()[0]}")
        make_venv(venv)
    elif read_stamp(venv) == stamp_of(root, venv):
        say("up to date")
        return
    (venv / UNFINISHED).touch()
    say("installing the book's packages (minutes the first time)")
    arguments = ["-c", "constraints.txt", "-e", f".[{EXTRAS}]"]
    log = venv / "setup.log"
    try:
        pip_install(python_of(venv), arguments, log, root)
    except SetupError:
        if not re.search("^(Installing|Attempting)", log.read_text(encoding="utf-8"), re.MULTILINE):
            (venv / UNFINISHED).unlink()  # pip had touched nothing yet: what worked before still does
        raise
    say("trying them out")
    done = subprocess.run(
        [str(python_of(venv)), "-c", "import " + IMPORTS], capture_output=True, text=True, cwd=str(root)
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SetupError(f"installed, but an import fails: {reason}; run make setup again for a new .venv")
    temporary = venv / (STAMP + ".tmp")
    temporary.write_text(json.dumps(stamp_of(root, venv)), encoding="utf-8")
    os.replace(str(temporary), str(venv / STAMP))
    (venv / UNFINISHED).unlink()
    say("done; make course runs the book")


def freeze(root: Path) -> None:
    """Write ``constraints.txt`` from a fresh environment. Raises ``SetupError``."""
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        say("making a fresh environment")
        make_venv(venv)
        log = root / "build" / "constraints.log"
        log.parent.mkdir(exist_ok=True)
        pip_install(python_of(venv), ["-e", f".[{EXTRAS}]", *KEPT], log, root)
        command = [str(python_of(venv)), "-m", "pip", "freeze"]
        frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = CONSTRAINTS_HEADER + constraints(frozen)
    temporary = root / ".constraints.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(str(temporary), str(root / "constraints.txt"))
    say(f"constraints.txt holds {text.count('==')} versions")


def constraints(frozen: str) -> str:
    """The lines of ``pip freeze`` that hold on every platform: no local versions, no parts of CUDA."""
    lines = []
    for line in frozen.splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)==([^+\s]+)", line)
        if match and not NOT_FROZEN.match(match.group(1).lower()):
            lines.append(f"{match.group(1)}=={match.group(2)}")
    return "\n".join(sorted(lines, key=str.lower)) + "\n"


def main(argv: list | None = None) -> int:
    """Set up, or freeze; returns the exit status. Errors end as one line, not as a traceback."""
    parser = argparse.ArgumentParser(description="Make .venv fit to run the book.")
    parser.add_argument(
        "--freeze", action="store_true", help="write constraints.txt from a fresh environment"
    )
    arguments = parser.parse_args(argv)
    try:
        problem = old_python(sys.version_info) or no_venv()
        if problem:
            raise SetupError(problem)
        if arguments.freeze:
            freeze(ROOT)
        else:
            set_up(ROOT, ROOT / ".venv")
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: error: {explain_pip(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; make setup starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
