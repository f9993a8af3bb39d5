"""Attention of packed tokens on an emulated GPU: prompts and decoding rows in one call, over pages."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_attention_packed import packed_call

from amd.harness import compile_on
from llama_jax.kernels.attention import (
    KeysValues,
    Places,
    Rule,
    Visibility,
    attention,
    attention_reference,
    decode_attention,
    flash_attention,
)
from llama_jax.kernels.attention.records import SCHEMES
from llama_jax.kernels.rope.coding import quantise

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

BF16_STEP = 2.0**-8


# Caches in fp8 are left to XLA on this chip (`llama_jax/kernels/table`).
BY_KERNELS = [scheme for scheme in SCHEMES if not scheme.startswith("fp8")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visibility", "scheme"),
    [(Visibility(), ""), (Visibility("sliding", 20), ""), *((Visibility(), scheme) for scheme in BY_KERNELS)],
    ids=["full", "sliding", *BY_KERNELS],
)
def test_a_mixed_call_agrees_with_the_cpu(visibility: Visibility, scheme: str) -> None:
    """Two chunks, three rows with one token, one with none, padding; pages of 64 slots, tokens in any order."""
    call = packed_call(
        *((1, 25, 0, 1, 12, 1), (100, 60, 5, 0, 9, 127)),
        length=48,
        capacity=128,
        page_size=64,
        head_dim=64,
        shuffled=True,
    )
    rule = Rule(visibility, 0.125, chunk_rows=2)
    kv = replace(call.kv, k=jnp.asarray(call.kv.k, jnp.bfloat16), v=jnp.asarray(call.kv.v, jnp.bfloat16))
    if scheme:
        (k, k_scale), (v, v_scale) = map(quantise, (kv.k, kv.v), SCHEMES[scheme])
        kv = KeysValues(k, v, kv.page_table, k_scale, v_scale)
    q = jnp.asarray(call.q, jnp.bfloat16)

    def packed(q: jax.Array, kv: KeysValues, places: Places) -> jax.Array:
        return attention(q, kv, places, rule, backend="pallas_triton")

    got, report = compile_on("gfx942", packed, q, kv, call.places).run(q, kv, call.places)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, kv)
    want = attention_reference(q.astype(jnp.float32), exact, call.places, rule)
    got = np.asarray(got, np.float32)
    assert np.isfinite(got).all()
    difference = np.abs(got - want)[0, call.real].max()
    assert difference < 2 * BF16_STEP * np.abs(want).max()
    assert (got[0, ~call.real] == 0).all()
    for operation in (decode_attention, flash_attention):
        assert any(name.startswith(operation.name) for name in report.kernels), dict(report.kernels)
