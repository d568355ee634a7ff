"""Known weaknesses of the pinned dependencies: ``python tools/audit.py`` asks pip-audit about them all.

pip-audit comes into an environment that is thrown away. What it found, or that it could not look, is recorded
in build/audit.json. It counts a package that the database does not answer for as skipped and ends well; here
that is told apart, for a look-up that did not happen is no clean bill.

Exit status: 0 all were looked up and nothing is known, 1 something is known, 2 not all could be looked up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["judged", "main", "pip_audit"]

ROOT = Path(__file__).resolve().parents[1]


def pip_audit(constraints: Path) -> dict[str, Any]:
    """pip-audit's report on exact versions; raises ``OSError`` with the reason if it could not be made."""
    with tempfile.TemporaryDirectory() as folder:
        python, report = Path(folder) / "bin" / "python", Path(folder) / "report.json"
        arguments = ["--requirement", str(constraints), "--no-deps", "--disable-pip"]
        for command in (
            [sys.executable, "-m", "venv", folder],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"],
            [str(python), "-m", "pip_audit", *arguments, "--format", "json", "--output", str(report)],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if (
                done.returncode and not report.is_file()
            ):  # with a report it only says that something was found
                lines = done.stdout.strip().splitlines() or ["no output"]
                raise OSError(f"{' '.join(command[1:4])}: {lines[-1]}")
        return json.loads(report.read_text(encoding="utf-8"))


def judged(report: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The exit status and what is kept of pip-audit's report."""
    packages = report["dependencies"]
    found = [
        {"package": p["name"], "version": p["version"], "id": v["id"], "fixed_in": v["fix_versions"]}
        for p in packages
        for v in p.get("vulns", [])
    ]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    kept = {"looked_up": len(packages) - len(skipped), "not_looked_up": skipped, "known": found}
    return (1 if found else 2 if skipped or not packages else 0), kept


def main(argv: list[str] | None = None) -> int:
    """Audit and record; returns the exit status."""
    parser = argparse.ArgumentParser(description="Ask pip-audit about the pinned dependencies.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    root = parser.parse_args(argv).root
    try:
        status, kept = judged(pip_audit(root / "constraints.txt"))
    except OSError as error:
        status, kept = 2, {"looked_up": 0, "error": str(error)}
    record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "status": status, **kept}
    target = root / "build" / "audit.json"
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(".audit.json.part")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)
    for known in kept.get("known", []):
        fixed = ", ".join(known["fixed_in"]) or "no version yet"
        print(f"audit: {known['package']} {known['version']}: {known['id']}, mended in {fixed}")
    if status == 0:
        print(f"audit: {kept['looked_up']} packages, nothing known")
    elif missing := kept.get("error") or ", ".join(kept["not_looked_up"]):
        print(f"audit: {kept['looked_up']} packages looked up; NOT looked up: {missing}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
