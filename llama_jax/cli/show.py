"""`llama-jax show`: what a model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from llama_jax.cli.options import examples, json_option, mesh_options
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.library import DEFAULT_MODEL, locate

_TEMPLATE_LINES = 3
_TEMPLATE_WIDTH = 100


@click.command(
    name="show",
    epilog=examples(
        "llama-jax show",
        "llama-jax show my-checkpoint --tensors",
        "llama-jax show m.gguf --json",
        "llama-jax show org/name",
        "llama-jax show llama-3.1-70b",
        "llama-jax show org/name --tp 8",
    ),
)
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--tensors", is_flag=True, help="Also list every tensor: shape, dtype, digest (of converted checkpoints)."
)
@click.option("--template", is_flag=True, help="Print the whole chat template, and nothing else.")
@mesh_options
@json_option
def command(model: str, tensors: bool, template: bool, mesh: str | None, tp: int | None, as_json: bool) -> None:
    """Show what MODEL is (by default the default model): shapes, size, memory, tokenizer, source, licence, digests.
    A preset such as llama-3.1-8b is shown without files.

    No weights are read, and nothing is converted or downloaded: a folder, a GGUF file or a download from the hub is
    shown as it is. With --tp or --mesh, also shows how the model would be split over this many devices, which need not
    exist.
    """
    from llama_jax.library.configs import find_preset
    from llama_jax.library.describe import describe, describe_preset

    axes = None
    if mesh is not None or tp is not None:
        from llama_jax.sharding import requested_axes

        axes = requested_axes(mesh, tp)
    config = find_preset(model)
    facts = describe(locate(model), model, axes) if config is None else describe_preset(config, model, axes)
    listed = facts.pop("tensors")
    if as_json:
        print_json(facts | ({"tensors": listed} if tensors else {}))
        return
    text = facts.pop("chat_template")
    if template:
        click.echo(printable(text or ""))
        return
    files, sharding = facts.pop("files"), facts.pop("sharding", [])
    lines = [f"{name.replace('_', ' ') + ':':<26}{_text(name, value)}" for name, value in facts.items()]
    lines.append(f"{'chat template:':<26}{_first_lines(text)}")
    lines += ["", "sharding:", *(f"  {line}" for line in sharding)] if sharding else []
    lines += ["", *(f"{name:<48}{digest}" for name, digest in files.items())] if files else []
    lines += ["", *(_tensor_line(name, tensor) for name, tensor in listed.items())] if tensors else []
    click.echo(printable("\n".join(lines)))


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    if value in ([], ""):
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{size_text(size)} as {dtype}" for dtype, size in value.items())
    if name == "bytes":
        return f"{value:,} ({size_text(value)})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _first_lines(template: str | None) -> str:
    if not template:
        return "none" if template == "" else "unknown"
    lines = template.splitlines()
    shown = [line[:_TEMPLATE_WIDTH] + ("…" if len(line) > _TEMPLATE_WIDTH else "") for line in lines[:_TEMPLATE_LINES]]
    more = f"{len(lines)} lines, {len(template):,} characters (--template prints it)"
    return "\n  ".join([more, *shown])


def _tensor_line(name: str, tensor: Mapping[str, Any]) -> str:
    digest, scheme = tensor.get("digest", ""), tensor.get("scheme", "")
    return f"{name:<48}{tensor['dtype']:<14}{tensor['shape']!s:<18}{digest} {scheme}".rstrip()
