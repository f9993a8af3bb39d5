"""One rule for the precision of matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """HIGHEST for float32, so that no GPU rounds its operands to TF32 or bf16 unasked; DEFAULT for the 16-bit types."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
