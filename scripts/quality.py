"""Measures what quantising costs the default model: docs/measured/quality-*.json, a line a scheme.

    python scripts/quality.py --text lcet10.txt --calibration alice29.txt int8:rtn int4_g64_min:gptq
    python scripts/quality.py ... --rotated int4_g32_min:rtn
    python scripts/quality.py --docs

Each scheme is a layout and a method; the output projection is in int8 throughout, so that layers alone differ. What a
file holds already is not measured again; `--docs` writes the table of docs/quantization.md from the files. That page
names the texts, which are in the source archive of brotli 1.2.1.
`--rotated` measures a model with the same logits whose weights lie on no grid (`rotated`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.measure import quality
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params
from llama_jax.params import Params
from llama_jax.plan.costs import held_bytes
from llama_jax.quantized.methods import METHODS

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
PAGE = MEASURED.parent / "quantization.md"
BEGIN, END = "<!-- begin quality -->", "<!-- end quality -->"
TEXT = slice(20_000, 122_000)
"""Bytes of the text that are measured, behind its table of contents."""
CALIBRATION_WINDOWS = 16
"""Windows of the calibration text that are used, from its beginning."""


def rotated(model: Model, seed: int = 0) -> Model:
    """A model of the same logits whose hidden states are turned by a random orthogonal matrix.

    Gains of norms are multiplied into the projections behind them, since a rotation does not commute with them, and the
    output projection has a weight of its own.
    """
    width = model.config.hidden_size
    normal = np.random.default_rng(seed).normal(size=(width, width))
    turn = jnp.asarray(np.linalg.qr(normal)[0], jnp.float32)

    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def reads(leaf: Params, norm: Params) -> Params:
        return leaf | {"weight": times(leaf["weight"] * norm["weight"], turn)}

    def writes(leaf: Params) -> Params:
        return leaf | {"weight": times(turn.T, leaf["weight"])}

    def layer(old: Params) -> Params:
        attn, mlp = dict(old["attn"]), dict(old["mlp"])
        attn |= {name: reads(attn[name], old["attn_norm"]) for name in ("q_proj", "k_proj", "v_proj")}
        mlp |= {name: reads(mlp[name], old["mlp_norm"]) for name in ("gate_proj", "up_proj")}
        attn["o_proj"], mlp["down_proj"] = writes(attn["o_proj"]), writes(mlp["down_proj"])
        return {"attn_norm": ones, "attn": attn, "mlp_norm": ones, "mlp": mlp}

    ones = {"weight": jnp.ones(width, jnp.float32)}
    params = {
        "embed": {"weight": times(model.params["embed"]["weight"], turn)},
        "layers": {name: layer(old) for name, old in model.params["layers"].items()},
        "final_norm": ones,
        "lm_head": reads(model.params["embed"], model.params["final_norm"]),
    }
    return replace(model, params=params, config=model.config.replace(tie_word_embeddings=False))


def table(measured: Path) -> str:
    """The rows of a file as a table, by layout, and of each layout by method."""
    facts = json.loads(measured.read_text(encoding="utf-8"))
    lines = [
        f"**{facts['model']}**, {facts['windows'][0]} windows of {facts['windows'][1]} tokens: perplexity "
        f"{facts['schemes'][0]['reference_perplexity']:.3f} in float32.",
        "",
        "| Weights | Method | MB | Perplexity | log of its ratio | Divergence | Same token, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    methods, plain = list(METHODS), {row["weights"]: row for row in facts["schemes"] if row["method"] == "rtn"}
    for row in sorted(facts["schemes"], key=lambda row: (-row["bytes"], row["weights"], methods.index(row["method"]))):
        rise = f"{row['log_ratio']:.4f} ± {row['log_ratio_error']:.4f}"
        base = plain.get(row["weights"])
        if base is not None and base is not row:
            rise += f" ({row['log_ratio'] / base['log_ratio']:.2f} of rtn's)"
        lines.append(
            f"| `{row['weights']}` | {row['method']} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.3f} | {rise} "
            f"| {row['kl']:.4f} ± {row['kl_error']:.4f} | {100 * row['same_top']:.1f} |"
        )
    return "\n".join(lines)


def section() -> str:
    """The tables of docs/quantization.md."""
    return "\n\n".join(table(path) for path in sorted(MEASURED.glob("quality-*.json"), reverse=True))


def with_section(page: str) -> str:
    """A page with the measurements between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}"


def main() -> None:
    """Measures schemes, and writes what was measured after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="LAYOUT:METHOD")
    parser.add_argument("--text", type=Path, help="what is predicted")
    parser.add_argument("--calibration", type=Path, help="what calibrated methods see")
    parser.add_argument("--rotated", action="store_true", help="the rotated model")
    parser.add_argument("--windows", type=int, help="only the first N windows of the text")
    parser.add_argument("--docs", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--out", type=Path, help="by default docs/measured/quality-[rotated-]smollm2-135m.json")
    given = parser.parse_args()
    if given.docs:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if not (given.schemes and given.text and given.calibration):
        parser.error("schemes, --text and --calibration are needed, or --docs")
    text, calibration = given.text.read_bytes(), given.calibration.read_bytes()
    model, tokenizer = lj.load(fuse=False, dtype="float32", weights="float")
    if given.rotated:
        model = rotated(model)
    tokens = quality.windows(tokenizer.encode(text[TEXT].decode("latin-1")))[: given.windows]
    seen = quality.windows(tokenizer.encode(calibration.decode("latin-1")))[:CALIBRATION_WINDOWS]
    facts = {
        "model": "SmolLM2-135M-Instruct" + (", rotated" if given.rotated else ""),
        "text": [given.text.name, hashlib.sha256(text).hexdigest(), TEXT.start, TEXT.stop],
        "calibration": [given.calibration.name, hashlib.sha256(calibration).hexdigest(), seen.size],
        "windows": list(tokens.shape),
        "lm_head": "int8",
    }
    name = f"quality-{'rotated-' if given.rotated else ''}smollm2-135m.json"
    out: Path = given.out or MEASURED / name
    rows: list[dict[str, Any]] = []
    if out.exists():
        stored = json.loads(out.read_text(encoding="utf-8"))
        rows = stored.pop("schemes")
        if stored != facts:
            raise SystemExit(f"{out} holds measurements of {stored}, not of {facts}")
    done = {(row["weights"], row["method"]) for row in rows}
    left = [pair for pair in (tuple(scheme.split(":")) for scheme in given.schemes) if pair not in done]
    reference = quality.refer(model, tokens) if left else None
    for weights, method in left:
        began = time.monotonic()
        small = lj.quantize(model, weights, method=method, calibration=seen if METHODS[method].calibrated else None)
        quantised_s = time.monotonic() - began
        size = held_bytes(small.config, 2)
        params, config = dequantize_params(small.params, small.config, jnp.float32)
        assert reference is not None
        found = quality.compare(replace(small, params=params, config=config), reference)
        rows.append({"weights": weights, "method": method, "bytes": size} | dataclasses.asdict(found))
        out.write_text(json.dumps(facts | {"schemes": rows}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows[-1]), f"{quantised_s:.0f} s to quantise, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
