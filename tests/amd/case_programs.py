"""Cases of operations as programs for the emulated GPU: kernels beside their references."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.operation import Operation
from llama_jax.kernels.lora import add_lora_op
from llama_jax.kernels.quantized_matmul.fused import fused_matmul_op
from llama_jax.kernels.quantized_moe import quantized_moe_op
from llama_jax.kernels.rope import rope_and_store_op

BACKEND = "pallas_triton"
CASES: dict[str, tuple[Operation, str]] = {
    "rope_and_store_dense": (rope_and_store_op, "dense chunk d96 g3"),
    "rope_and_store_paged": (rope_and_store_op, "paged d128"),
    "rope_and_store_interleaved": (rope_and_store_op, "paged chunk d80 interleaved"),
    "rope_and_store_codes": (rope_and_store_op, "codes d64"),
    "rope_and_store_codes_paged": (rope_and_store_op, "codes paged interleaved"),
    "add_lora_qkv": (add_lora_op, "qkv h6 kv2 d32x96 s3 r4, 5 rows"),
    "add_lora_gate": (add_lora_op, "gate 72x200 s4 r8, 3 rows"),
    "add_lora_many_slots": (add_lora_op, "one 40x96 s20 r16, 19 rows"),
    "add_lora_shares": (add_lora_op, "one 24x1100 s3 r5, 70 rows, float16"),
    "fused_gate": (fused_matmul_op, "gate int4_g128 200x1024, 1 rows"),
    "fused_norm": (fused_matmul_op, "norm plain 72x576, 3 rows"),
    "fused_add": (fused_matmul_op, "add int8 136x1024, 5 rows"),
    "quantized_moe_int4_g64_min": (quantized_moe_op, "int4_g64_min e8k2h256i192, 1 tokens"),
    "quantized_moe_int8": (quantized_moe_op, "int8 e5k1h128i320, 7 tokens"),
}
"""Name of a program to an operation and one of its cases."""


def parts(name: str) -> tuple[Callable[..., Any], tuple[np.ndarray, ...], Callable[..., Any]]:
    """The kernel as a function of arrays, these, and the reference as such a function."""
    operation, wanted = CASES[name]
    (case,) = (case for case in operation.cases() if case.name == wanted)
    arrays = jax.tree.map(np.asarray, case.example())

    def run(case: Case, backend: str, *values: Any) -> Any:
        return operation.backends[backend].run(**case.arguments(dict(zip(arrays, values, strict=True))))

    return partial(run, case, BACKEND), tuple(arrays.values()), partial(run, case, "reference")
