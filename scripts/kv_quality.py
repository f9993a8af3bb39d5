"""The cost of a quantised cache in quality: perplexity and distributions, beside a cache in the dtype of the model.

    python scripts/kv_quality.py
    python scripts/kv_quality.py --model org/name --text prose.txt --kilobytes 400 --window 2048 --json quality.json

Windows of the text, each half over the one before; the second half of each is scored, so that every token but the
first ones is scored once, behind at least half a window. Both caches serve the same weights.
The text is by default the reference prose of Python's own documentation (`pydoc_data.topics`, PSF licence).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.cache import KV_DTYPES, DenseCache, stored_dtype
from llama_jax.config import LlamaConfig
from llama_jax.measure.quality import compared, summary
from llama_jax.model import forward


def default_text() -> str:
    """Topics of Python's documentation, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: list[int], size: int) -> np.ndarray:
    """int32 [n, size]: windows that begin half a window apart."""
    starts = range(0, len(ids) - size + 1, size // 2)
    return np.asarray([ids[start : start + size] for start in starts], np.int32)


@partial(jax.jit, static_argnames=("config", "kv_dtype"))
def logits(params: Any, tokens: jax.Array, *, config: LlamaConfig, kv_dtype: str | None) -> jax.Array:
    """Logits [n, size / 2, vocab] that predict the second half of each window [n, size], by way of a cache."""
    batch, size = tokens.shape
    scored = jnp.broadcast_to(jnp.arange(size // 2 - 1, size - 1), (batch, size // 2))
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), tokens.shape)
    cache = DenseCache.create(config, batch, size, stored_dtype(kv_dtype, params["final_norm"]["weight"].dtype))
    return forward(params, config, tokens, positions, cache, logits_at=scored)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default the default model")
    parser.add_argument("--dtype", help="that both compute in")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default=KV_DTYPES[0])
    parser.add_argument("--text", type=Path, help="a file of prose, in UTF-8")
    parser.add_argument("--kilobytes", type=int, default=100, help="of the text")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--batch", type=int, default=2, help="windows at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = lj.load(*([options.model] if options.model else []), dtype=options.dtype)
    text = (options.text.read_text(encoding="utf-8") if options.text else default_text())[: options.kilobytes * 1000]
    rows = windows(tokenizer.encode(text), options.window)
    rows = rows[: len(rows) // options.batch * options.batch]
    began, parts = time.monotonic(), []
    for start in range(0, len(rows), options.batch):
        batch = rows[start : start + options.batch]
        either = (logits(model.params, batch, config=model.config, kv_dtype=kv) for kv in (options.kv_dtype, None))
        for window, *both in zip(batch, *either, strict=True):
            parts.append(jax.device_get(compared(*both, window[options.window // 2 :])))
    found = summary({name: np.stack([part[name] for part in parts]) for name in parts[0]})
    facts = {
        "model": model.name,
        "dtype": model.dtype.name,
        "kv_dtype": options.kv_dtype,
        "text": str(options.text or f"pydoc_data.topics of Python {sys.version.split()[0]}"),
        "bytes": len(text.encode()),
        "tokens_scored": rows.size // 2,
        "window": options.window,
        "device": jax.devices()[0].device_kind,
        "perplexity": found.reference_perplexity,
        "perplexity_quantised": found.perplexity,
        "relative_change": math.expm1(found.log_ratio),
        "standard_error": found.log_ratio_error,
        "mean_divergence": found.kl,
        "divergence_standard_error": found.kl_error,
        "same_top": found.same_top,
    }
    print(json.dumps(facts, indent=1))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
