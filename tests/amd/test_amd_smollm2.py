"""The default model, SmolLM2-135M, generates on emulated GPUs what it generates on the CPU. Takes minutes."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amd.emulator import Options
from amd.harness import ARCHS, compile_on
from amd.test_amd_model import assert_launched, named
from llama_jax.cache import DenseCache
from llama_jax.kernels.attention import decode_attention, flash_attention
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.norm import add_rms_norm_op
from llama_jax.kernels.quantized_matmul import quantized_matmul_op
from llama_jax.loading import load
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.text.tokenizer import Tokenizer

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [
    pytest.mark.amd,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

TOKENS = 4
PROMPT = "The opposite of hot is cold. The opposite of up is"
"""More tokens than count as decoding; and the likeliest token leads the next one by 0.2 or more at every step."""
# Races are looked for in the tests of smaller programs; here that would double the time.
OPTIONS = Options(check_races=False)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("arch", "weights"), [("gfx942", "stored"), *((arch, "float") for arch in ARCHS)])
def test_greedy_tokens(smollm2: tuple[Model, Tokenizer], arch: str, weights: str) -> None:
    """Four tokens in bfloat16, through the Pallas kernels where there are some; with weights in the four and eight bits
    that they are stored in, the same as with decoded ones."""
    model, tokenizer = smollm2
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    decoded, plain = params, model.config
    if weights == "stored":
        model, _ = load(dtype="bfloat16", weights="stored")
        params = model.params
        assert {name for _, name in model.config.schemes} == {"int4_g32_min", "int8_g32"}
    cfg = model.config
    ids = tokenizer.encode(PROMPT)
    tokens, positions = np.array([ids], np.int32), np.arange(len(ids), dtype=np.int32)[None]

    def prefill(cfg, params, tokens, positions):  # type: ignore[no-untyped-def]
        cache = DenseCache.create(cfg, 1, 64, jnp.bfloat16)
        last = jnp.full((1, 1), tokens.shape[1] - 1, jnp.int32)
        logits, cache = forward(params, cfg, tokens, positions, cache, logits_at=last)
        return jnp.argmax(logits[:, 0], -1).astype(jnp.int32), cache

    def step(cfg, params, token, position, cache):  # type: ignore[no-untyped-def]
        logits, cache = forward(params, cfg, token[:, None], position[:, None], cache)
        return jnp.argmax(logits[:, 0], -1).astype(jnp.int32), cache

    with using(**named("reference")):
        next_on_cpu = jax.jit(partial(step, plain))
        token, cache = jax.jit(partial(prefill, plain))(decoded, tokens, positions)
        expected = [int(token[0])]
        for n in range(len(ids), len(ids) + TOKENS - 1):
            token, cache = next_on_cpu(decoded, token, np.full(1, n, np.int32), cache)
            expected.append(int(token[0]))

    kernels: Counter[str] = Counter()
    with using(**named("pallas_triton")):
        began = time.process_time()
        (token, cache), report = compile_on(arch, partial(prefill, cfg), params, tokens, positions).run(
            params, tokens, positions, options=OPTIONS
        )
        kernels += report.kernels
        print(f"prefill on {arch}: {report.wave_instructions / 1e6:.1f} M wave instructions")
        got = [int(token[0])]
        next_on_amd = compile_on(arch, partial(step, cfg), params, token, np.full(1, 0, np.int32), cache)
        for n in range(len(ids), len(ids) + TOKENS - 1):
            (token, cache), report = next_on_amd.run(params, token, np.full(1, n, np.int32), cache, options=OPTIONS)
            kernels += report.kernels
            got.append(int(token[0]))
            print(f"decode step on {arch}: {report.wave_instructions / 1e6:.1f} M wave instructions")
    print(f"{tokenizer.decode(got)!r} in {time.process_time() - began:.0f} s of processor time")
    assert got == expected
    quantised = (quantized_matmul_op,) if weights == "stored" else ()
    for operation in (flash_attention, decode_attention, add_rms_norm_op, *quantised):
        if "pallas_triton" in operation.backends:
            assert_launched(kernels, operation)
