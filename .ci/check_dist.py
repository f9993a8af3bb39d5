"""Lists what a wheel and an sdist contain and compares it with the files that git tracks.

    python .ci/check_dist.py DIST_FILE...

A package that reaches its readers without a module, or with tests and data that are none of theirs, is noticed here.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

LINKED = ("kernels", "convert")
"""Top-level folders that are packages of llama_jax by a link."""

SDIST_ONLY = "llama_jax/server/ui/"
"""Sources of the server's page; a wheel has what is built from them."""

REQUIRED = {f"llama_jax/{name}/__init__.py" for name in LINKED} | {"llama_jax/__init__.py", "llama_jax/py.typed"}


def expected_package_files(tracked: list[str]) -> set[str]:
    """Paths below llama_jax/ that a distribution must hold, from the paths that git tracks."""
    files = set()
    for path in tracked:
        top, _, rest = path.partition("/")
        if top in LINKED:
            files.add(f"llama_jax/{path}")
        elif top == "llama_jax" and rest not in LINKED:
            files.add(path)
    return files


def contents(dist: Path) -> list[str]:
    """Paths of the files in a wheel or an sdist, the latter without its leading folder."""
    if dist.suffix == ".whl":
        with zipfile.ZipFile(dist) as wheel:
            return sorted(wheel.namelist())
    with tarfile.open(dist) as sdist:
        return sorted(m.name.partition("/")[2] for m in sdist.getmembers() if not m.isdir())


def problems(names: list[str], expected: set[str], *, wheel: bool) -> list[str]:
    """Problems of a distribution that holds the files `names`."""
    if wheel:
        expected = {n for n in expected if not n.startswith(SDIST_ONLY)}
    package = {n for n in names if n.startswith("llama_jax/")}
    rest = [n for n in names if n not in package]
    found = [f"missing: {n}" for n in sorted((expected | REQUIRED) - package)]
    found += [f"not tracked by git: {n}" for n in sorted(package - expected)]
    found += [f"does not belong here: {n}" for n in rest if n.split("/")[0] in ("tests", "docs", "scripts", *LINKED)]
    if wheel:
        found += [f"outside the package: {n}" for n in rest if ".dist-info/" not in n]
        licences = {n.rpartition("/")[2] for n in rest if "/licenses/" in n}
        found += [f"missing licence file: {n}" for n in sorted({"LICENSE", "NOTICE"} - licences)]
    return found


def main(paths: list[str]) -> int:
    tracked = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = expected_package_files(tracked)
    kinds, failed = set(), False
    for dist in map(Path, paths):
        names = contents(dist)
        wheel = dist.suffix == ".whl"
        kinds.add(wheel)
        print(f"{dist.name}: {len(names)} files, {dist.stat().st_size / 1024:.0f} KiB")
        print(*(f"  {name}" for name in names), sep="\n")
        for problem in problems(names, expected, wheel=wheel):
            print(f"{dist.name}: {problem}", file=sys.stderr)
            failed = True
    if kinds != {True, False}:
        print("expected a wheel and an sdist", file=sys.stderr)
        failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
