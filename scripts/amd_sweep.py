"""Compiles every Pallas kernel for every AMD architecture and writes down what each needs, without a GPU.

    python scripts/amd_sweep.py                       # everything that has changed: minutes
    python scripts/amd_sweep.py --arch gfx942 --op moe --all

The results are `tests/amd_budgets/<arch>.json`, keyed by a hash of the kernels' sources; the tests fail when they are
stale, and when a kernel exceeds its budget. Needs the extra `rocm-aot`. `docs/kernels.md` gets its table from them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from llama_jax.aot import compile_for
from llama_jax.aot.compiler import code_object, topology
from llama_jax.aot.compiler.executable import Kernel
from llama_jax.aot.compiler.instructions import main_loop
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.fingerprint import source_hash
from llama_jax.kernels.dispatch.operation import Operation, choose, runner
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.targets import Target, abstract_device, find

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests" / "amd_budgets"
TARGETS = {
    "gfx90a": "mi250x",
    "gfx942": "mi300x",
    "gfx950": "mi355x",
    "gfx1100": "rx7900xtx",
    "gfx1151": "radeon8060s",
    "gfx1201": "rx9070xt",
}
"""Architecture to the device model that stands for it."""
BACKEND = "pallas_triton"
MOST_THREADS = 1024
Entry = dict[str, Any]


def variants(op: Operation) -> Iterator[tuple[str, Case, bool]]:
    """Name, case and whether its gradient is taken, of all that is compiled."""
    for case in op.models(None):
        yield case.name, case, False
        if case.differentiate:
            yield f"{case.name}, gradients", case, True


def compile_case(op: Operation, case: Case, gradients: bool, target: Target) -> Entry:
    """Resources of the kernels of one case: {"kernels": [...]}, or {"unsupported": reason}."""
    arguments = case.arguments()
    if reason := op.backends[BACKEND].unsupported(target, **arguments):
        return {"unsupported": reason}
    with abstract_device(target):
        choice = choose(op, target, "auto", **arguments)
    tiles = dict(choice.tiles) if choice.backend == BACKEND else {}
    f = program(runner(op, BACKEND, tiles), case, gradients)
    with abstract_device(target):
        products = pallas_kernels(jax.make_jaxpr(f)(case.abstract()).jaxpr)
    # RDNA has no matrix instructions for float32.
    without = {"float32"} if target.wave_size == 32 else set()
    names = {name: bool(dtypes - without) for name, dtypes in products.items()}
    compilation = compile_for(target, f, (case.abstract(),))
    ours = [kernel for kernel in compilation.kernels if plain(kernel.name) in names]
    if missing := set(names) - {plain(kernel.name) for kernel in ours}:
        raise RuntimeError(f"{missing} are not among {[kernel.name for kernel in compilation.kernels]}")
    found = [describe(kernel, names[plain(kernel.name)]) for kernel in ours]
    return {"kernels": found} | ({"tiles": tiles} if tiles else {})


def plain(name: str) -> str:
    """A kernel's name without the number that tells several of one name apart."""
    return re.sub(r"(_+\d+)+$", "", name)


def program(run: Callable[..., jax.Array], case: Case, gradients: bool) -> Callable[[dict[str, Any]], Any]:
    """The function of the arrays alone that is compiled."""

    def forward(arrays: dict[str, Any]) -> jax.Array:
        return run(**case.arguments(arrays))

    def backward(arrays: dict[str, Any]) -> Any:
        def loss(some: dict[str, Any]) -> jax.Array:
            return jnp.sum(forward(arrays | some).astype(jnp.float32) ** 2)

        return jax.grad(loss)({name: arrays[name] for name in case.differentiate})

    return backward if gradients else forward


def pallas_kernels(jaxpr: Any) -> dict[str, set[str]]:
    """Name of each Pallas kernel in a program, and the dtypes of the matrices that it multiplies."""
    found: dict[str, set[str]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            body = equation.params["jaxpr"]
            name = equation.params["name"] or body.debug_info.func_name
            found[name] = found.get(name, set()) | factors(body)
        else:
            for inner in inner_jaxprs(equation):
                for name, dtypes in pallas_kernels(inner).items():
                    found[name] = found.get(name, set()) | dtypes
    return found


def factors(jaxpr: Any) -> set[str]:
    """The dtypes of all matrices that a program multiplies."""
    found = {e.invars[0].aval.dtype.name for e in jaxpr.eqns if e.primitive.name == "dot_general"}
    return found.union(*(factors(inner) for e in jaxpr.eqns for inner in inner_jaxprs(e)))


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def describe(kernel: Kernel, multiplies: bool) -> Entry:
    """An entry of the results: one kernel.

    Args:
      multiplies: whether it has products that the hardware has matrix instructions for.
    """
    entry: Entry = {
        "name": kernel.name,
        "vgpr": kernel.vgpr,
        "agpr": kernel.agpr,
        "sgpr": kernel.sgpr,
        "spills": kernel.spills,
        "scratch_bytes": kernel.scratch_bytes,
        "lds_bytes": kernel.lds_bytes,
        "waves": kernel.waves,
        "occupancy": kernel.occupancy,
        "matrix_instructions": kernel.matrix_instructions,
        "multiplies": multiplies,
    }
    if loop := main_loop(kernel.arch, code_object.code(kernel.elf, kernel.name)):
        entry["loop"] = {
            "instructions": loop.instructions,
            "matrix": loop.matrix,
            "loads": loop.loads,
            "wide_loads": loop.wide_loads,
        } | ({"matrix_cycles": loop.matrix_cycles} if loop.matrix_cycles else {})
    return entry


def exceeded(entry: Entry, target: Target) -> list[str]:
    """Which budgets a kernel's entry breaks, in words."""
    found = []
    if entry["spills"] or entry["scratch_bytes"]:
        found.append(f"{entry['spills']} spilled registers, {entry['scratch_bytes']} bytes of scratch")
    if entry["lds_bytes"] > target.lds_bytes:
        found.append(f"{entry['lds_bytes']} bytes of local memory, of {target.lds_bytes}")
    if entry["waves"] * target.wave_size > MOST_THREADS:
        found.append(f"{entry['waves']} waves of {target.wave_size}, of {MOST_THREADS} threads")
    if entry["multiplies"] and not entry["matrix_instructions"]:
        found.append("it multiplies matrices without matrix instructions")
    if not entry["occupancy"]:
        found.append("no wave of it fits, or its occupancy is not known")
    return [f"{entry['name']}: {problem}" for problem in found]


def path_of(arch: str) -> Path:
    return BUDGETS / f"{arch}.json"


def load(arch: str) -> dict[str, Any]:
    """The results of an architecture; empty ones where there are none yet."""
    path = path_of(arch)
    empty: dict[str, Any] = {"arch": arch, "target": TARGETS[arch], "operations": {}}
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def made_with(op: str) -> dict[str, str]:
    """The sources and versions that results hold for."""
    return {"sources": source_hash(op), "jax": jax.__version__, "compiler": topology.compiler()[1]}


def dump(results: dict[str, Any]) -> None:
    """Writes results, a line a kernel."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        stripped = line.strip()
        # A kernel's entry goes on one line.
        if depth or (stripped == "{" and lines and lines[-1].rstrip().endswith(("[", "},"))):
            lines = [*lines, line.rstrip()] if not depth else [*lines[:-1], f"{lines[-1]} {stripped}"]
            depth += stripped.count("{") - stripped.count("}")
        else:
            lines.append(line)
    path = path_of(results["arch"])
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sweep(arch: str, names: list[str], everything: bool) -> list[str]:
    """Compiles what is new or has changed, keeps the results after each operation; what exceeds a budget."""
    target, results, problems = find(TARGETS[arch]), load(arch), []
    for name in names:
        op = operation(name)
        if BACKEND not in op.backends:
            continue
        kept = results["operations"].get(name, {})
        if everything or kept.get("made_with") != made_with(name):
            entries: dict[str, Entry] = {}
            for label, case, gradients in variants(op):
                began = time.perf_counter()
                entries[label] = compile_case(op, case, gradients, target)
                print(f"{arch} {name}, {label}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            results["operations"][name] = kept = {"made_with": made_with(name), "cases": entries}
            dump(results)
        problems += problems_of(arch, name, kept, target)
    return problems


def problems_of(arch: str, name: str, results: dict[str, Any], target: Target) -> list[str]:
    """Values above a budget in the results of one operation."""
    return [
        f"{arch} {name}, {label}: {problem}"
        for label, entry in results["cases"].items()
        for kernel in entry.get("kernels", ())
        for problem in exceeded(kernel, target)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=tuple(TARGETS), help="only this architecture")
    parser.add_argument("--op", action="append", choices=tuple(OPERATIONS), help="only this operation")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    options = parser.parse_args()
    problems = []
    for arch in options.arch or TARGETS:
        problems += sweep(arch, options.op or list(OPERATIONS), options.all)
    print("\n".join(problems) or "every kernel is within its budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
