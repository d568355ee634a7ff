# @title Set-up: installs the book's package where it is missing, and says what this machine is
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

INSTALL = ""
VERSION = ""
TOOK = []


def install_companion() -> None:
    """Install the book's package and those of its dependencies that are missing.

    No package that is here changes its version, torch, numpy and matplotlib above all: each version goes
    into a file of constraints. `--no-deps` would keep them too, but leave out what is really missing.
    """
    print(f"installing {INSTALL} and what it needs; what is here stays as it is")
    installed = {}
    for package in importlib.metadata.distributions():
        name, version = package.metadata["Name"], package.version
        if name and version and re.fullmatch(r"[\w.-]+", name) and re.fullmatch(r"\d[\w.!+-]*", version):
            installed.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    with tempfile.TemporaryDirectory() as folder:
        constraints = os.path.join(folder, "installed.txt")
        with open(constraints, "w", encoding="utf-8") as file:
            file.writelines(f"{name}=={version}\n" for name, version in sorted(installed.items()))
        # Not --quiet: pip would not say which packages contradict each other.
        command = [sys.executable, "-m", "pip", "install", "--no-input", "-c", constraints, INSTALL]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        output = done.stdout.strip()
        if "ResolutionImpossible" in output:
            reason = (
                "it needs a newer version of a package that is installed here, and installed packages are "
                "left as they are. Take the notebook of another release of the book, or a fresh environment"
            )
        else:
            reason = "look at the last lines of pip's output below"
        raise RuntimeError(f"{INSTALL} could not be installed: {reason}.\n\n{output[-2000:]}")
    importlib.invalidate_caches()


def show_device() -> None:
    """Say what the chapter will run on, and how long it took where it was measured."""
    import torch

    from companion.record import describe_device

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        print(f"device: {describe_device('cuda')}, {memory / 2**30:.0f} GB")
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        print(f"device: {describe_device('cpu')}, {memory / 2**30:.0f} GB; no GPU")
    for profile, device, duration in TOOK:
        print(f"time: {duration} on {device} in the {profile} profile")
    if not any(profile == "gpu" for profile, _, _ in TOOK):
        print("time: this chapter has not been measured on a GPU yet")


def check_device(profile: str, device: str) -> None:
    """Warn when the sizes meant for a GPU are about to run on the CPU."""
    import torch

    if profile == "gpu" and (str(device) == "cpu" or not torch.cuda.is_available()):
        print(
            'WARNING: the sizes of the "gpu" profile take very long on a CPU. On Colab choose Runtime > '
            'Change runtime type > GPU; or set profile = "cpu" in the cell above and run it again.'
        )


if importlib.util.find_spec("companion") is None:
    if not INSTALL:
        raise RuntimeError(
            "the book's package is missing, and this notebook was made from a copy of the book without a "
            "public address. In that copy's folder run: pip install -e ."
        )
    install_companion()

from companion import __version__ as version  # noqa: E402

if version != VERSION:
    print(f"WARNING: companion {version} is installed here; this notebook was made for {VERSION}")
show_device()
