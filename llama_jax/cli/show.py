"""`llama-jax show`: what a model is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from llama_jax.checkpoint import is_checkpoint, open_checkpoint
from llama_jax.cli.options import examples, json_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.config import LlamaConfig, MoeSpec, config_to_hf
from llama_jax.errors import TokenizerError
from llama_jax.models import DEFAULT_MODEL, resolve

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@click.command(
    name="show",
    epilog=examples(
        "llama-jax show", "llama-jax show my-checkpoint --tensors --digests", "llama-jax show m.gguf --json"
    ),
)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--tensors", is_flag=True, help="Also list every tensor with shape and dtype.")
@click.option("--digests", is_flag=True, help="Also list every tensor's digest (of converted checkpoints).")
@json_option
def command(model: str, tensors: bool, digests: bool, as_json: bool) -> None:
    """Show shapes, parameter count, dtype, context, source and licence of MODEL (by default the default model).

    No weights are read. A local folder or file is shown as it is, without converting it.
    """
    facts, listed = _facts(model)
    if not digests:
        listed = {name: {k: v for k, v in tensor.items() if k != "digest"} for name, tensor in listed.items()}
    if as_json:
        print_json(facts | ({"tensors": listed} if tensors or digests else {}))
        return
    lines = [f"{name.replace('_', ' ') + ':':<20}{_text(name, value)}" for name, value in facts.items()]
    if tensors or digests:
        lines += ["", *(_tensor_line(name, tensor) for name, tensor in listed.items())]
    click.echo(printable("\n".join(lines)))


def _facts(model: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What there is to say, by name, and the tensors by name: shape, dtype, and the digest where there is one."""
    local = Path(model)
    if local.exists() and not is_checkpoint(local):
        return _facts_of_source(model, local)
    with Reporter() as reporter:
        checkpoint = open_checkpoint(resolve(model, progress=reporter.progress, notify=reporter.notify))
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(t.shape), "dtype": t.dtype, "digest": t.digest} for name, t in checkpoint.tensors.items()
    }
    texts = {name: file.read_bytes() for name in _TEMPLATE_FILES if (file := checkpoint.path / name).is_file()}
    facts = {
        "model": model,
        "format": f"checkpoint, version {checkpoint.format_version}, written by {checkpoint.tool}",
        "path": str(checkpoint.path),
        "source": f"{checkpoint.source.kind} {checkpoint.source.name}".strip(),
        "revision": checkpoint.source.revision,
        "licence": checkpoint.source.licence,
        "chat_template": _has_template(texts),
        **_shapes(checkpoint.config, tensors),
        "bytes": checkpoint.nbytes,
        "dtype": checkpoint.dtype,
    }
    return facts, tensors


def _facts_of_source(model: str, path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The same of a model that has not been converted: from its own header files."""
    from llama_jax.convert.run import open_source
    from llama_jax.params import param_specs

    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    source = open_source(files[0] if len(files) == 1 else path)
    try:
        specs = param_specs(source.config)
        dtypes = {spec.name: source.dtype(spec) for spec in specs}
        tensors = {spec.name: {"shape": list(spec.shape), "dtype": dtypes[spec.name].name} for spec in specs}
        nbytes = sum(spec.size * dtypes[spec.name].itemsize for spec in specs)
        try:
            template = _has_template(source.files)
        except TokenizerError:
            template = None  # without a usable tokenizer there is no knowing; the rest can be shown
        facts = {
            "model": model,
            "format": f"{source.source.kind}, not converted",
            "path": str(source.path),
            "source": source.source.name,
            "revision": source.source.revision,
            "licence": source.source.licence,
            "chat_template": template,
            **_shapes(source.config, tensors),
            "bytes": nbytes,
            "dtype": max(dtypes.values(), key=lambda d: sum(s.size for s in specs if dtypes[s.name] == d)).name,
        }
    finally:
        source.close()
    return facts, tensors


def _shapes(config: LlamaConfig, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for layer in config.layers:
        window = f" {layer.window}" if layer.window else ""
        kind = f"{layer.attention}{window}{'' if layer.rope else ' without rope'}"
        kinds[kind] = kinds.get(kind, 0) + 1
    experts = {(m.num_experts, m.top_k) for layer in config.layers if isinstance(m := layer.mlp, MoeSpec)}
    widths = {m.intermediate_size if isinstance(m := layer.mlp, MoeSpec) else m for layer in config.layers}
    return {
        "architecture": config_to_hf(config)["model_type"],
        "parameters": sum(math.prod(t["shape"]) for t in tensors.values()),
        "context": config.context_length,
        "vocabulary": config.vocab_size,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "mlp_size": sorted(widths),
        "experts": [f"{top_k} of {number}" for number, top_k in sorted(experts)],
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention": [f"{number}x {kind}" for kind, number in kinds.items()],
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}",
        "tied_embeddings": config.tie_word_embeddings,
    }


def _has_template(files: Mapping[str, bytes | str]) -> bool:
    """Whether one of a model's small files holds a chat template."""
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    try:
        config = json.loads(files.get("tokenizer_config.json", "{}"))
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return "none" if name == "experts" else "unknown"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name == "bytes":
        return f"{value:,} ({size_text(value)})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tensor_line(name: str, tensor: Mapping[str, Any]) -> str:
    digest = f"  {tensor['digest']}" if "digest" in tensor else ""
    return f"{name:<48}{tensor['dtype']:<10}{tensor['shape']!s:<18}{digest}"
