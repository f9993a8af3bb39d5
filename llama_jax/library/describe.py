"""Describes a model from its metadata alone: `describe` reads no weights and converts nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.format import Source, is_checkpoint, open_checkpoint
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec, config_to_hf
from llama_jax.errors import TokenizerError
from llama_jax.folders import cache_dir
from llama_jax.library import bundled

_BYTES = {"float32": 4, "bfloat16": 2}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def describe(path: Path, name: str, axes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Facts about a model at a path that `locate` gave; the command `show` prints them.

    Args:
      path: a checkpoint, a Hugging Face folder or a GGUF file.
      name: what the user called it.
      axes: sizes of the axes of a mesh, to be told how the model is split over it.

    Returns:
      Values that JSON can hold, always under the same names; None where something is not known:
        model, format, path, source, revision, licence: what it is and where it comes from.
        quantization: of the source's weights, "" if they were not quantised.
        architecture, parameters, active_parameters (those that one token passes through), context, vocabulary, layers,
        hidden_size, mlp_size, experts, heads, kv_heads, head_dim, attention, layer_kinds, rope, tied_embeddings.
        dtype, bytes: of the weights as they are stored, or would be once they are converted.
        memory_bytes: of the weights in memory, by dtype.
        kv_cache_bytes_per_token: of keys and values of all layers, by dtype.
        tokenizer: its kind and number of tokens, "" without one.
        chat_template: its whole text, "" without one.
        sharding: with `axes`, one line for each logical axis: split over what, or whole and why.
        files: digests of the checkpoint's small files.
        tensors: by name: shape, dtype, the digest where there is one, and the scheme of one that is not plain.

    Raises:
      LlamaJaxError: it is damaged or not supported, or nothing of it can be split over `axes`.
    """
    return _of_checkpoint(path, name, axes) if is_checkpoint(path) else _of_source(path, name, axes)


def describe_preset(config: LlamaConfig, name: str, axes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The same facts about a published shape, which has no files: None where only files could tell."""
    from llama_jax.params import param_specs

    specs = param_specs(config)
    return {
        "model": name,
        "format": "preset: a published shape, without weights",
        **dict.fromkeys(("path", "source", "revision", "licence", "quantization")),
        **_shapes(config),
        "dtype": config.dtype,
        "bytes": sum(spec.size * spec.itemsize(4 if config.dtype == "float32" else 2) for spec in specs),
        **_memory(config),
        **dict.fromkeys(("tokenizer", "chat_template")),
        **_sharding(config, axes),
        "files": {},
        "tensors": {s.name: {"shape": list(s.shape), "dtype": config.dtype} for s in specs},
    }


def _of_checkpoint(path: Path, name: str, axes: Mapping[str, int] | None) -> dict[str, Any]:
    c = open_checkpoint(path)
    files = {n: (path / n).read_bytes() for n in (*_TOKENIZER_FILES, *_TEMPLATE_FILES) if (path / n).is_file()}
    tensors = {
        n: {"shape": list(t.shape), "dtype": t.dtype, "digest": t.digest}
        | ({} if t.scheme == "plain" else {"scheme": t.scheme})
        for n, t in c.tensors.items()
    }
    return {
        "model": name,
        "format": f"checkpoint, version {c.format_version}, written by {c.tool}",
        **_origin(path, c.source),
        **_shapes(c.config),
        "dtype": c.dtype,
        "bytes": c.nbytes,
        **_memory(c.config),
        "tokenizer": _tokenizer(files),
        "chat_template": _template(files),
        **_sharding(c.config, axes),
        "files": dict(c.file_digests),
        "tensors": tensors,
    }


def _of_source(path: Path, name: str, axes: Mapping[str, int] | None) -> dict[str, Any]:
    from llama_jax.convert.opening import open_source
    from llama_jax.params import param_specs

    known, revision = _identity(path)
    with closing(open_source(path, name=known, revision=revision, dequantize=False)) as model:
        specs = param_specs(model.config)
        dtypes = {spec.name: model.dtype(spec) for spec in specs}
        by_dtype: Counter[str] = Counter()
        for spec in specs:
            by_dtype[dtypes[spec.name].name] += spec.size
        try:
            files: Mapping[str, bytes | str] | None = model.files
        except TokenizerError:
            files = None  # the rest can be shown
        return {
            "model": name,
            "format": f"{model.source.kind}, not converted",
            **_origin(path, model.source),
            **_shapes(model.config),
            "dtype": by_dtype.most_common(1)[0][0],
            "bytes": sum(spec.size * dtypes[spec.name].itemsize for spec in specs),
            **_memory(model.config),
            "tokenizer": None if files is None else _tokenizer(files),
            "chat_template": None if files is None else _template(files),
            **_sharding(model.config, axes),
            "files": {},
            "tensors": {s.name: {"shape": list(s.shape), "dtype": dtypes[s.name].name} for s in specs},
        }


def _sharding(config: LlamaConfig, axes: Mapping[str, int] | None) -> dict[str, list[str]]:
    if axes is None:
        return {}
    from llama_jax.layout import check, explain

    check(config, axes)
    return {"sharding": [str(split) for split in explain(config, axes)] or ["whole on one device"]}


def _identity(path: Path) -> tuple[str | None, str | None]:
    """Name and revision of a source that lies in the hub's cache, or is the default model."""
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    if path == bundled.find(cache_dir()):
        return bundled.NAME, f"sha256:{bundled.GGUF_SHA256}"
    return None, None


def _origin(path: Path, source: Source) -> dict[str, Any]:
    return {
        "path": str(path),
        "source": f"{source.kind} {source.name}".strip(),
        "revision": source.revision,
        "licence": source.licence,
        "quantization": source.quantization or "",
    }


def _shapes(config: LlamaConfig) -> dict[str, Any]:
    total, active = _parameters(config)
    attention = Counter(_attention(layer) for layer in config.layers)
    kinds = Counter(f"{_attention(layer)}, {_mlp(layer)}" for layer in config.layers)
    experts = {(m.num_experts, m.top_k) for layer in config.layers if isinstance(m := layer.mlp, MoeSpec)}
    widths = {m.intermediate_size if isinstance(m := layer.mlp, MoeSpec) else m for layer in config.layers}
    rope = config.rope
    return {
        "architecture": config_to_hf(config)["model_type"],
        "parameters": total,
        "active_parameters": active,
        "context": config.context_length,
        "vocabulary": config.vocab_size,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "mlp_size": sorted(widths),
        "experts": [f"{top_k} of {number}" for number, top_k in sorted(experts)],
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention": [f"{number}x {kind}" for kind, number in attention.items()],
        "layer_kinds": [f"{number}x {kind}" for kind, number in kinds.items()],
        "rope": f"{rope.kind}, theta {rope.theta:g}" + (f", factor {rope.factor:g}" if rope.kind != "default" else ""),
        "tied_embeddings": config.tie_word_embeddings,
        "weights": _weights(config),
    }


def _weights(config: LlamaConfig) -> list[str]:
    """The ways weights are stored, each with its share of all weights, the most frequent first."""
    from llama_jax.params import canonical_specs
    from llama_jax.quantized import stored_layout

    schemes, sizes = dict(config.schemes), Counter[str]()
    for spec in canonical_specs(config):
        name = schemes.get(spec.leaf) if spec.path[-1] == "weight" else None
        layout = stored_layout(name) if name else None
        sizes[layout.described if layout else name or "floating point"] += spec.size
    return (
        [f"{size / sizes.total():.1%} {kind}" for kind, size in sizes.most_common()] if schemes else ["floating point"]
    )


def _attention(layer: LayerSpec) -> str:
    window = f" {layer.window}" if layer.window else ""
    return f"{layer.attention}{window}{'' if layer.rope else ' without rope'}"


def _mlp(layer: LayerSpec) -> str:
    if not isinstance(layer.mlp, MoeSpec):
        return f"mlp {layer.mlp}"
    shared = f" and a shared one of {s}" if (s := layer.mlp.shared_intermediate_size) else ""
    return f"{layer.mlp.top_k} of {layer.mlp.num_experts} experts of {layer.mlp.intermediate_size}{shared}"


def _parameters(config: LlamaConfig) -> tuple[int, int]:
    """Number of parameters, and of those active for one token."""
    from llama_jax.params import canonical_specs

    total = active = 0
    for spec in canonical_specs(config):
        total += spec.size
        share = 1.0
        # Of a stack of experts a token sees some; the router, which has an axis of experts as well, it sees as a whole.
        if spec.axes[0] == "expert" and len(spec.shape) == 3:
            moe = config.layers[int(spec.path[1])].mlp
            assert isinstance(moe, MoeSpec)
            share = moe.top_k / moe.num_experts
        active += round(spec.size * share)
    return total, active


def _memory(config: LlamaConfig) -> dict[str, dict[str, int]]:
    from llama_jax.cache import KV_DTYPES, pair_bytes
    from llama_jax.params import param_specs

    specs = param_specs(config)
    pairs = config.num_kv_heads * config.num_layers  # a key and a value of each head

    def cached(itemsize: int, kv_dtype: str | None = None) -> int:
        return pairs * pair_bytes(config.head_dim, itemsize, kv_dtype)

    return {
        "memory_bytes": {dtype: sum(s.size * s.itemsize(n) for s in specs) for dtype, n in _BYTES.items()},
        "kv_cache_bytes_per_token": {dtype: cached(size) for dtype, size in _BYTES.items()}
        | {name: cached(1, name) for name in KV_DTYPES},
    }


def _tokenizer(files: Mapping[str, bytes | str]) -> str:
    """Kind and size of a tokenizer, from its file alone; its library is not needed for that."""
    if "tokenizer.json" in files:
        content = _json(files["tokenizer.json"])
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(vocabulary, (dict, list)):
            return "damaged"
        added = content.get("added_tokens") or []
        new = sum(1 for token in added if isinstance(token, dict) and token.get("content") not in vocabulary)
        kind = str(model.get("type", "unknown"))
        if kind == "BPE":
            kind = "SentencePiece BPE" if model.get("byte_fallback") else "byte-level BPE"
        return f"{kind}, {len(vocabulary) + new:,} tokens"
    return "SentencePiece (tokenizer.model)" if "tokenizer.model" in files else ""


def _template(files: Mapping[str, bytes | str]) -> str:
    """The default chat template, in the order in which `load_tokenizer` looks for it."""
    if (template := files.get("chat_template.jinja")) is not None:
        return template if isinstance(template, str) else template.decode(errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = _json(files.get(name, "{}")).get("chat_template")
        if isinstance(given, str):
            return given
        if isinstance(given, list):
            named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
            return str(named.get("default") or next(iter(named.values()), "") or "")
    return ""


def _json(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
