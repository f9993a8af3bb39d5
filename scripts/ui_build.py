"""Builds the server's page from its sources, with Node.js from PyPI and the npm packages that the lockfile pins.

    uv run --group ui scripts/ui_build.py            # writes llama_jax/server/static
    uv run --group ui scripts/ui_build.py --check    # exit code 1 unless that is what the sources build

Both work on a copy in a temporary folder, so that no node_modules is left behind; --work FOLDER keeps it for the
next run. Without npm's registry the exit code is 69.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
import tempfile
from pathlib import Path

import npm

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "llama_jax" / "server" / "ui"
BUILT = ROOT / "llama_jax" / "server" / "static"


def build(work: Path) -> Path:
    """Return the folder, inside of `work`, with the page that the sources are built to."""
    sources, built = work / "ui", work / "static"
    modules = sources / "node_modules"
    for stale in sources.glob("*"):
        if stale != modules:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    shutil.copytree(SOURCES, sources, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))

    lock, installed = sources / "package-lock.json", work / "installed.json"
    if not modules.is_dir() or not installed.is_file() or not filecmp.cmp(lock, installed, shallow=False):
        npm.install(sources)
        shutil.copy(lock, installed)
    npm.run(sources, "node_modules/typescript/bin/tsc", "--noEmit")
    npm.run(sources, "node_modules/vite/bin/vite.js", "build", "--logLevel", "warn", "--emptyOutDir", "--outDir", built)
    (built / "ui" / "licenses.txt").write_text(licences(sources), encoding="utf-8")
    return built


def licences(sources: Path) -> str:
    """Return the licences of the packages that the page is made of."""
    parts = []
    for name in json.loads((sources / "package.json").read_text())["dependencies"]:
        folder = sources / "node_modules" / name
        about = json.loads((folder / "package.json").read_text())
        (text,) = (path.read_text(encoding="utf-8") for path in folder.iterdir() if path.stem.upper() == "LICENSE")
        parts.append(f"{name} {about['version']} ({about['license']})\n\n{text.strip()}\n")
    return f"\n{'-' * 72}\n\n".join(parts)


def differences(built: Path) -> list[str]:
    """Return the files that the repository and a build do not have in common."""
    files = {path.relative_to(root) for root in (built, BUILT) for path in root.rglob("*") if path.is_file()}
    _, changed, missing = filecmp.cmpfiles(built, BUILT, sorted(map(str, files)), shallow=False)
    return sorted(changed + missing)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--work", type=Path, help="folder for node_modules and the copy of the sources")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        built = build(work)
        if options.check:
            changed = differences(built)
            for name in changed:
                print(f"differs from what the sources build: static/{name}")
            return int(bool(changed))
        shutil.rmtree(BUILT, ignore_errors=True)
        shutil.copytree(built, BUILT)
    for path in sorted(BUILT.rglob("*")):
        if path.is_file():
            print(f"{path.relative_to(BUILT)}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
