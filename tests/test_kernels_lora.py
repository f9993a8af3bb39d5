"""Low-rank adapters in slots, against numpy, and within a model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, tiny_config

from llama_jax.config import LayerSpec
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.lora import add_lora, add_lora_op, pallas_triton
from llama_jax.kernels.pallas import tile_width
from llama_jax.model.adapters import MEMBERS, empty_slots
from llama_jax.model.fuse import fuse_params
from llama_jax.model.transformer import forward
from llama_jax.params import flatten, unflatten
from llama_jax.targets import find


@pytest.mark.parametrize("rows", [2, 7])
def test_against_numpy(rows: int) -> None:
    """Keys and values of two heads; ids of no slot, of none, and more slots than rows, which are gathered."""
    rng, slots, rank, inner = np.random.default_rng(0), 6, 3, 20
    out = rng.standard_normal((rows, 1, 2, 4, 8))
    x = rng.standard_normal((rows, 1, inner))
    a, b = rng.standard_normal((2, slots, rank, inner)), rng.standard_normal((2, slots, rank, 16))
    scale, ids = rng.random((2, slots)), np.asarray([2, 9, 0, -1, 5, 1, 2])[:rows, None]
    members = [
        dict(zip(MEMBERS, (jnp.asarray(m, jnp.float32) for m in each), strict=True))
        for each in zip(a, b, scale, strict=True)
    ]
    found = add_lora(
        *(jnp.asarray(m, jnp.float32) for m in (out, x)), members, jnp.asarray(ids), parts=((2, 3), (3, 4))
    )
    for row, slot in enumerate(ids[:, 0]):
        if 0 < slot < slots:
            for n in range(2):
                out[row, 0, :, 2 + n] += (scale[n, slot] * (x[row, 0] @ a[n, slot].T) @ b[n, slot]).reshape(2, 8)
    np.testing.assert_allclose(found, out, atol=2e-5)


def test_shares_of_a_sum() -> None:
    """Three programs share a sum of seven steps, and a tile has fewer columns than heads are wide."""
    case = next(case for case in add_lora_op.cases() if case.name.startswith("qkv h6"))
    arguments = case.arguments(case.example())
    tiles = pallas_triton.Tiles(rows=16, inner=16, splits=3, num_warps=1, num_stages=1, cols=16, expand_warps=1)
    found = jax.jit(partial(pallas_triton.run, tiles=tiles, interpret=True, parts=arguments.pop("parts")))
    arguments.pop("activation")
    wanted = np.asarray(add_lora_op.backends["reference"].run(**arguments, parts=case.static["parts"]), np.float32)
    difference = np.abs(np.asarray(found(**arguments), np.float32) - wanted)
    assert difference.max() < 0.01 * np.abs(wanted).max()
    assert np.abs(np.asarray(arguments["out"], np.float32) - wanted).max() > 0.3 * np.abs(wanted).max()


@pytest.mark.parametrize("rank", [8, 16, 64, 512])
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_steps_fit_into_shared_memory(rank: int, rows: int) -> None:
    target = find("h100")
    sizes = {"rows": rows, "inner": 4096, "slots": 3, "rank": rank, "projections": 3}
    tiles = pallas_triton.default_tiles(target, **sizes)
    assert tiles.num_stages * (tiles.rows + 3 * tile_width(rank)) * tiles.inner * 2 < 0.9 * target.lds_bytes


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj", "up_proj")])
def test_logits_of_a_model(targets: tuple[str, ...] | None) -> None:
    """The kernels with slots of every projection, and of some, against the reference; one row has no adapter."""
    config = tiny_config(LayerSpec(mlp=96), hidden_size=64)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fuse_params(random_params(config), config))
    slots = flatten(empty_slots(config, slots=4, rank=4, targets=targets, dtype="bfloat16"))
    noise = {
        name: (jax.random.normal(jax.random.key(n), x.shape) * 0.3).astype(x.dtype)
        for n, (name, x) in enumerate(slots.items())
    }
    tokens, ids = random_tokens(config, 4, 3), jnp.asarray([[3], [0], [1], [3]])
    logits = {}
    for backend in ("reference", "pallas_interpret"):
        with using(add_lora=backend):
            logits[backend] = np.asarray(
                forward(params, config, tokens, adapters=unflatten(noise), adapter_ids=ids)[0], np.float32
            )
    without = np.asarray(forward(params, config, tokens)[0], np.float32)
    difference = np.abs(logits["pallas_interpret"] - logits["reference"])
    changed = np.abs(logits["reference"] - without).max(axis=(1, 2))
    assert changed[1] == 0
    assert changed[[0, 2, 3]].min() > 10 * difference.max()
    assert any(c.operation == "add_lora" and c.backend == "pallas_interpret" for c in report())
