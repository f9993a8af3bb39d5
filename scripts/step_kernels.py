"""The kernels of a decode step, counted for each layer, compiled for a GPU that need not be here.

    python scripts/step_kernels.py llama-3.1-8b                                # for an MI300X
    python scripts/step_kernels.py llama-3.2-1b --target mi355x --batch 8 --page-size 64
    python scripts/step_kernels.py llama-3.1-8b --weights int4_g128 --kernels fused_matmul=reference

Counts what the middle one of three layers launches, in order. A launch costs some 4.5 us on an MI300X (blog.kog.ai) and
1 to 2 in a CUDA graph. XLA chooses its products without measuring them here: on the GPU itself it may split others.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from llama_jax.aot import compile_for
from llama_jax.aot.programs import decode_program
from llama_jax.cache import PagedCache, stored_dtype
from llama_jax.config import preset
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.registry import parse_backends
from llama_jax.recipe import recipe, schemes
from llama_jax.targets import abstract_device, find

LAYERS = 3
_LAUNCH = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = .*?\b(fusion|custom-call|copy|all-reduce(?:-start)?)\(")
_LAYER = re.compile(r'op_name="[^"]*layers\.(\d+)/')


def launches(text: str) -> Iterator[tuple[str, str]]:
    """Name and line of each kernel that the entry computation of an HLO module launches, in order."""
    entry = text[text.index("\nENTRY ") :]
    for line in entry.splitlines():
        if found := _LAUNCH.match(line):
            yield found[1], line


def of_layer(text: str, layer: int) -> list[str]:
    """The kernels between the first of a layer and the first of the next one: those in between that have lost their
    names belong to it. What all layers share is computed by the first, whatever layer's name XLA gives it."""
    all_of = list(launches(text))
    firsts: dict[int, int] = {}
    for i, (_, line) in enumerate(all_of):
        if (named := _LAYER.search(line)) and (n := int(named[1])) in (0, len(firsts)):
            firsts.setdefault(n, i)
    return [described(name, line) for name, line in all_of[firsts[layer] : firsts[layer + 1]]]


def described(name: str, line: str) -> str:
    """The kernel's name, that of a Pallas kernel as it is in profiles, and the operation that it ends with."""
    pallas = re.search(r'\bname = \\?"(\w+)|kernel_name\W+(\w+)', line)
    operation = re.search(r'op_name="[^"]*/([^"/]+/[^"/]+)"', line)
    shown = next((group for group in pallas.groups() if group), name) if pallas else name
    return f"{shown:45} {operation[1] if operation else ''}"


def main(argv: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset")
    parser.add_argument("--target", default="mi300x")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--kv-dtype")
    parser.add_argument("--weights", help="a layout, such as int4_g128")
    parser.add_argument("--kernels", default="", help="operation=backend,...")
    args = parser.parse_args(argv)
    config, target = preset(args.model), find(args.target)
    config = config.replace(layers=config.layers[:LAYERS])
    if args.weights:
        config = config.replace(schemes=schemes(config, recipe(args.weights)))
    with abstract_device(target), using(**parse_backends(args.kernels)):
        program = decode_program(
            config, batch=args.batch, capacity=args.context, dtype="bfloat16", kv_dtype=args.kv_dtype
        )
        if args.page_size:
            params, state = program.args

            def paged() -> PagedCache:
                dtype = stored_dtype(args.kv_dtype, "bfloat16")
                return PagedCache.create(config, args.batch, args.context, dtype, page_size=args.page_size)

            program = type(program)(
                program.name,
                program.function,
                (params, type(state)(**{**vars(state), "cache": jax.eval_shape(paged)})),
                program.static,
            )
        compilation = compile_for(target, program.function, program.args, kwargs=program.static)
    found = of_layer(compilation.compiled.as_text() or "", LAYERS // 2)
    print(f"{args.model} on {target.name}, {args.batch} rows: {len(found)} kernels a layer")
    for kernel in found:
        print(f"  {kernel}")
    return found


if __name__ == "__main__":
    main()
