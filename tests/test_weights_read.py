"""Compiler options of products with a model's weights: how they are decoded, and who computes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_config

from llama_jax import recipe as recipes
from llama_jax.config import LlamaConfig
from llama_jax.decode import weights_read
from llama_jax.decode.weights_read import DECODED_ROWS, MOST_ROWS, PROMPT_ROWS, weight_options
from llama_jax.kernels.quantized_matmul import quantized_matmul_reference
from llama_jax.quantized import layout_named
from llama_jax.quantized.nearest import encode
from llama_jax.targets import find

WIDTH = 4096


def quantised(weights: str) -> LlamaConfig:
    config = tiny_config()
    return config.replace(schemes=recipes.schemes(config, recipes.recipe(weights, lm_head="bfloat16")))


@pytest.mark.parametrize("target", ["mi300x", "h100"])
def test_options_are_for_few_rows_and_integers_in_groups(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    grouped = quantised("int4_g8_min")
    assert weight_options(grouped, 1) == {}  # a CPU
    monkeypatch.setattr(weights_read, "current", lambda: find(target))
    (flag,) = weight_options(grouped, MOST_ROWS)
    assert weight_options(quantised("int8_g8"), 1) == {flag: True}
    assert jax.jit(lambda x: x + 1, compiler_options={flag: True})(1) == 2  # this jaxlib has it
    assert weight_options(grouped, MOST_ROWS + 1) == {}
    for whole_rows in (tiny_config(), quantised("int8"), quantised("fp8"), quantised("fp8_g8")):
        assert weight_options(whole_rows, 1) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{flag}=false")
    assert weight_options(grouped, 1) == {}


def test_the_library_alone_computes_products_of_many_rows_on_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = tiny_config()
    assert weight_options(plain, 4096) == {}  # a CPU
    monkeypatch.setattr(weights_read, "current", lambda: find("h200"))
    assert weight_options(plain, DECODED_ROWS - 1) == weight_options(plain, 512, library=PROMPT_ROWS) == {}
    (flag,) = weight_options(plain, DECODED_ROWS)
    assert weight_options(plain, PROMPT_ROWS, library=PROMPT_ROWS) == {flag: False}
    assert jax.jit(lambda x: x + 1, compiler_options={flag: False})(1) == 2  # this jaxlib has it
    assert weight_options(quantised("int8"), 4096) == {}  # Triton decodes within the product
    monkeypatch.setattr(weights_read, "current", lambda: find("mi300x"))
    assert weight_options(plain, 4096) == {}


@pytest.mark.amd
@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4_g64_min", "int8_g32"])
def test_the_weight_is_not_written_on_amd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary memory holds the decoded weight without the options, and much less with them."""
    from llama_jax.aot.compilation import compile_for

    layout, target = layout_named(name), find("mi300x")
    assert layout is not None
    members = jax.eval_shape(lambda w: encode(layout, w), jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32))
    x = jax.ShapeDtypeStruct((1, WIDTH), jnp.bfloat16)
    monkeypatch.setattr(weights_read, "current", lambda: target)

    def temporary(rows: int) -> int:
        made = compile_for(
            target,
            lambda x, members: quantized_matmul_reference(x, members, layout=layout),
            (x, members),
            compiler_options=weight_options(quantised(name.replace("64", "8").replace("32", "8")), rows),
        )
        return int(made.compiled.memory_analysis().temp_size_in_bytes)

    assert temporary(MOST_ROWS + 1) >= 2 * WIDTH * WIDTH
    assert temporary(1) < WIDTH * WIDTH / 10
