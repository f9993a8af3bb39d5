"""Which backend runs: named ones work or raise, and a choice is part of what jit keeps apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch import Backend, Operation, using

OP = Operation(
    "double",
    {
        "reference": Backend(lambda x: x * 2),
        "fast": Backend(lambda x: x * 3),  # another number, so that a test sees which one ran
        "even": Backend(lambda x: x * 4, lambda target, x: "odd length" if x.shape[0] % 2 else None),
    },
)


def test_named_backends() -> None:
    x = jnp.ones(2)
    assert OP(x)[0] == 2
    assert OP(x, backend="fast")[0] == 3
    assert OP(x, backend="even")[0] == 4
    for name in ("", "Reference", "none"):
        with pytest.raises(KernelError, match="has no backend") as caught:
            OP(x, backend=name)
        assert "reference" in caught.value.hint
    with pytest.raises(KernelError, match="odd length"):
        OP(jnp.ones(3), backend="even")


def test_using_is_part_of_the_cache_key() -> None:
    run = jax.jit(OP)
    x = jnp.ones(2)
    assert run(x)[0] == 2
    with using(double="fast"):
        assert run(x)[0] == 3
        with using(double="even", other="fast"):
            assert run(x)[0] == 4
        assert run(x)[0] == 3
    assert run(x)[0] == 2
    with using(double="even"), pytest.raises(KernelError, match="odd length"):
        run(jnp.ones(3))
