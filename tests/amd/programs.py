"""Programs of the kinds that a language model is made of, with inputs, and how far an emulated chip may differ.

Tolerances are shares of the largest absolute value that is expected. A bfloat16 result rounded once in either place
may differ by one step, 2^-8 of its own size; several roundings on the way allow a few of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from amd import case_programs
from llama_jax.kernels.norm import add_rms_norm_reference, pallas_triton
from llama_jax.kernels.norm.tiles import Tiles
from llama_jax.kernels.quantized_matmul import pallas_triton as quantized_matmul_triton
from llama_jax.kernels.quantized_matmul import quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.decoding import decoded
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.quantized import codes, layout_named
from llama_jax.quantized.nearest import encode

BF16, F32 = jnp.bfloat16, np.float32
ONE_STEP = 2.0**-8


@dataclass(frozen=True)
class Example:
    """A function, its arguments, and the largest error as a share of the largest value; 0 means equal.

    Attributes:
      reference: what the CPU computes instead, where the function itself does not run there.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    tolerance: float = 0.0
    reference: Callable[..., Any] | None = None

    def expected(self) -> Any:
        return (self.reference or self.f)(*map(jnp.asarray, self.args))


def normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def integers(low: int, high: int, *shape: int, dtype: Any = np.int32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).integers(low, high, shape).astype(dtype)


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    d = x.shape[-1]
    angles = positions[:, None] / (10000 ** (jnp.arange(0, d, 2) / d))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(F32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def blocks(x: jax.Array, up: jax.Array, down: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    def block(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        norm = jax.lax.rsqrt(jnp.mean(x.astype(F32) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype)
        return x + (jax.nn.silu(x * norm * gain @ up) @ down).astype(x.dtype), None

    x, _ = jax.lax.scan(block, x, None, length=3)
    return jax.nn.softmax(x.astype(F32), -1), x


def cross_entropy_gradient(logits: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1))

    return jax.grad(loss)(logits)


def gradients(attention: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (attention(q, k, v).astype(F32) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def pallas_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """JAX's own Pallas kernel, forward and backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention

    sizes = attention.BlockSizes(block_q=64, block_k=64, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)
    return attention.mha(q, k, v, segment_ids=None, causal=True, sm_scale=0.125, block_sizes=sizes, interpret=interpret)


def add_norm_gradients(run: Callable[..., Any], x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
    """Sum and norm, and the gradients of both by all arguments."""

    def loss(*args: jax.Array) -> tuple[jax.Array, Any]:
        total, normed = run(*args, eps=1e-5)
        return (total.astype(F32) * normed.astype(F32)).sum(), (total, normed)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, delta, weight)


def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(jax.random.wrap_key_data(key), logits)


def transcendental(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x) + jnp.tanh(x) + jnp.log1p(jnp.exp(x)) + jnp.sqrt(abs(x)) + abs(x) ** 3.3


def float8_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.dot(x, y, preferred_element_type=jnp.float32)


def exact_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(F32), y.astype(F32), precision="highest")


QUANTISED = (("int4_g64_min", 1), ("int4_g32_zero", 16), ("int8", 16), ("fp8_g128", 1))
"""Layouts of weights (`llama_jax.quantized`) and rows of x, multiplied by plain operations."""
QUANTISED_BY_KERNELS = (
    ("int4_g64_min", 1),
    ("int8_g32", 1),
    ("int8", 5),
    ("int4_g32_zero", 40),
    ("int4_g128_min", 16),
    ("int4_g32_min", 1),
)
""".. and by kernels, to rounding in float32."""


def decoded_by_kernel(name: str) -> Example:
    """A weight in few bits decoded by the kernel, to the bit."""
    layout = layout_named(name)
    assert layout is not None
    members = jax.tree.map(np.asarray, encode(layout, normal(40, 704, dtype=F32)))

    def kernel(*arrays: jax.Array) -> jax.Array:
        return decoded(Weight.of(layout, dict(zip(members, arrays, strict=True))), BF16, interpret=False)

    def plain(*arrays: jax.Array) -> jax.Array:
        return codes.decode(layout, dict(zip(members, arrays, strict=True)), BF16)

    return Example(kernel, tuple(members.values()), 0, plain)


def quantised(name: str, rows: int, run: Callable[..., Any], tolerance: float) -> Example:
    """A product with a weight in few bits, against that with the decoded weight."""
    layout = layout_named(name)
    assert layout is not None
    members = jax.tree.map(np.asarray, encode(layout, normal(96, 256, dtype=F32)))

    def product(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return run(x, dict(zip(members, arrays, strict=True)), layout=layout, dtype=F32)

    def decoded(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return exact_matmul(x, codes.decode(layout, dict(zip(members, arrays, strict=True)), F32).T)

    return Example(product, (normal(rows, 256), *members.values()), tolerance, decoded)


def of_case(name: str) -> Example:
    """A kernel on a case of its operation."""
    run, arrays, reference = case_programs.parts(name)
    return Example(run, arrays, 3 * ONE_STEP, reference)


def examples() -> dict[str, Callable[[], Example]]:
    """By name; the inputs are made when an example is asked for."""
    eight_bits = partial(integers, -127, 127, dtype=np.int8)
    return {
        "rope": lambda: Example(rope, (normal(16, 4, 64), np.arange(16, dtype=np.int32) * 37), ONE_STEP),
        "embed": lambda: Example(lambda table, ids: table[ids], (normal(512, 64), integers(0, 512, 16))),
        "sample": lambda: Example(sample, (normal(4, 512, dtype=F32), np.array([1, 2], np.uint32))),
        "top_k": lambda: Example(lambda x: jax.lax.top_k(x, 8), (normal(4, 512, dtype=F32),)),
        "argmax": lambda: Example(lambda x: jnp.argmax(x, -1), (normal(4, 512, dtype=F32),)),
        "cumsum": lambda: Example(lambda x: jnp.cumsum(x, -1), (normal(4, 512, dtype=F32),), 1e-6),
        "sort": lambda: Example(lambda x: jnp.sort(x, -1), (normal(4, 512, dtype=F32),)),
        "matmul_f32": lambda: Example(
            lambda x, y: jnp.matmul(x, y, precision="highest"),
            (normal(64, 64, dtype=F32), normal(64, 64, dtype=F32, seed=1)),
            1e-6,
        ),
        "matmul_f16": lambda: Example(
            jnp.matmul, (normal(64, 64, dtype=np.float16), normal(64, 64, dtype=np.float16, seed=1)), 2.0**-11
        ),
        "matmul_bf16": lambda: Example(jnp.matmul, (normal(64, 96), normal(96, 64, seed=1)), ONE_STEP),
        "matmul_i8": lambda: Example(
            lambda x, y: jax.lax.dot(x, y, preferred_element_type=jnp.int32),
            (eight_bits(64, 64), eight_bits(64, 64, seed=1)),
        ),
        **{
            f"matmul_{kind}": lambda dtype=dtype: Example(
                float8_matmul, (normal(64, 64, dtype=dtype), normal(64, 64, dtype=dtype, seed=1)), 1e-6, exact_matmul
            )
            for kind, dtype in (("fp8_ocp", jnp.float8_e4m3fn), ("fp8_fnuz", jnp.float8_e4m3fnuz))
        },
        "int8_weights": lambda: Example(
            lambda x, w, scale: (x @ w.astype(BF16)) * scale,
            (normal(16, 256), eight_bits(256, 128), (normal(128) / 100).astype(BF16)),
            2 * ONE_STEP,
        ),
        **{
            f"{name}_product": partial(quantised, name, rows, quantized_matmul_reference, ONE_STEP)
            for name, rows in QUANTISED
        },
        **{
            f"{name}_kernel": partial(quantised, name, rows, quantized_matmul_triton.run, 1e-4)
            for name, rows in QUANTISED_BY_KERNELS
        },
        **{
            f"{name}_decoded": partial(decoded_by_kernel, name)
            for name in ("int4_g64_min", "int4_g32_zero", "int8_g32")
        },
        "cache_update": lambda: Example(
            lambda cache, x, at: jax.lax.dynamic_update_slice(cache, x, (0, at, 0, 0)),
            (normal(2, 64, 2, 64), normal(2, 1, 2, 64), np.int32(7)),
        ),
        "scatter": lambda: Example(
            lambda cache, x, at: cache.at[jnp.arange(2), at].set(x),
            (normal(2, 64, 2, 64), normal(2, 2, 64), np.array([3, 60], np.int32)),
        ),
        "cross_entropy": lambda: Example(
            cross_entropy_gradient, (normal(16, 512, dtype=F32), integers(0, 512, 16)), 1e-6
        ),
        "transcendental": lambda: Example(transcendental, (normal(1024, dtype=F32),), 1e-6),
        "attention": lambda: Example(
            partial(jax.nn.dot_product_attention, is_causal=True),
            (normal(1, 64, 4, 64), normal(1, 64, 2, 64, seed=1), normal(1, 64, 2, 64, seed=2)),
            ONE_STEP,
        ),
        "pallas_gradients": lambda: Example(
            partial(gradients, pallas_attention),
            tuple(normal(1, 128, 1, 64, seed=n) for n in range(3)),
            3 * ONE_STEP,
            reference=partial(gradients, partial(pallas_attention, interpret=True)),
        ),
        "add_rms_norm": lambda: Example(
            partial(pallas_triton.run, eps=1e-5),
            (normal(3, 5, 320), normal(3, 5, 320, seed=1), normal(320)),
            ONE_STEP,
            reference=partial(add_rms_norm_reference, eps=1e-5),
        ),
        "add_rms_norm_gradients": lambda: Example(
            partial(add_norm_gradients, partial(pallas_triton.run, tiles=Tiles(4, 2))),
            (normal(7, 96), normal(7, 96, seed=1), normal(96)),
            2 * ONE_STEP,
            reference=partial(add_norm_gradients, add_rms_norm_reference),
        ),
        **{name: partial(of_case, name) for name in case_programs.CASES},
        "scan": lambda: Example(
            blocks,
            (normal(16, 64), (normal(64, 128) / 8).astype(BF16), (normal(128, 64) / 11).astype(BF16), normal(64)),
            3 * ONE_STEP,
        ),
    }
