"""Memory of a training step on an MI300X, as XLA reports it, against the estimate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.adapters import LoraConfig, new_adapter
from llama_jax.aot import compile_for
from llama_jax.config import preset
from llama_jax.params import abstract_params
from llama_jax.training import Batch, full, gradients, low_rank, step_memory

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

ROWS, LENGTH = 4, 4096


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["products", "none"])
def test_what_a_layer_keeps_for_the_gradient_of_an_adapter(remat: str) -> None:
    """Kept besides, the wide product of every adapter would make it 1.7 times as much with "products"."""
    whole = preset("llama-3.1-8b")
    numbers = jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32)

    def activations(layers: int) -> tuple[int, int]:
        """Bytes by XLA's report, with all that is temporary, and by the estimate."""
        config = whole.replace(layers=whole.layers[:layers])
        params = abstract_params(config, jnp.bfloat16)
        lora = LoraConfig(rank=16, alpha=32, target_modules="all-linear")
        adapter = jax.eval_shape(lambda params: new_adapter(params, config, lora, jax.random.key(0)), params)

        def step(adapter: Any, params: Any, batch: Batch) -> Any:
            return gradients(low_rank(config), adapter, params, batch, remat=remat)

        compilation = compile_for("mi300x", step, (adapter, params, Batch(numbers, numbers, numbers)))
        reported = compilation.compiled.memory_analysis()
        assert reported is not None
        estimate = step_memory(config, rows=ROWS, length=LENGTH, trained=1, frozen=1, itemsize=2, remat=remat, logits=1)
        return reported.temp_size_in_bytes, estimate.activations

    (less, few), (more, many) = activations(2), activations(4)
    assert more - less == pytest.approx(many - few, rel=0.05)


@pytest.mark.slow
def test_what_a_layer_keeps_for_the_gradient_of_all_weights() -> None:
    """With the copy of the weights that is computed with."""
    whole = preset("llama-3.2-1b")
    numbers = jax.ShapeDtypeStruct((1, 8, LENGTH), jnp.int32)

    def kept(layers: int) -> tuple[int, int]:
        config = whole.replace(layers=whole.layers[:layers])
        params = abstract_params(config, jnp.float32)

        def step(params: Any, batch: Batch) -> Any:
            return gradients(full(config, jnp.dtype("bfloat16")), params, None, batch, remat="none")

        compilation = compile_for("mi300x", step, (params, Batch(numbers, numbers, numbers)))
        reported = compilation.compiled.memory_analysis()
        assert reported is not None
        trained = sum(x.size for x in jax.tree.leaves(params))
        estimate = step_memory(
            config, rows=8, length=LENGTH, trained=trained, frozen=0, itemsize=2, remat="none", logits=1
        )
        return reported.temp_size_in_bytes, estimate.activations + estimate.weights

    (less, few), (more, many) = kept(2), kept(4)
    assert more - less == pytest.approx(many - few, rel=0.05)
