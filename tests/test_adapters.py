"""Adapters in slots, beside `test_model` (merged weights, names, gradients) and `eight_devices_generate` (meshes)."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, error, in_slots, merge_adapters, random_adapters, random_params, random_tokens, run

from llama_jax.errors import RequestError
from llama_jax.model import forward
from llama_jax.model.adapters import _put, empty_slots, put_adapter
from llama_jax.model.fuse import fuse_params
from llama_jax.params import Params, flatten, projection_names, unflatten

CONFIG = TINY["sigmoid-moe"]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [3, 12], ids=["few slots", "many slots"])
@pytest.mark.parametrize("fused", [False, True], ids=["canonical", "fused"])
def test_a_mixed_batch_equals_separate_calls(slots: int, fused: bool) -> None:
    """Each row its own adapter, or none: as weights with which that row's adapter has been merged. With many slots for
    few rows they are gathered, else all are multiplied."""
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 3, 5)
    adapters = [random_adapters(CONFIG, seed=seed) for seed in range(1, slots)]
    layout = fuse_params(params, CONFIG) if fused else params
    ids = jnp.array([[2], [0], [1]], jnp.int32)
    logits, _ = run(layout, CONFIG, tokens, adapters=in_slots(*adapters), adapter_ids=ids)
    by_token, _ = run(layout, CONFIG, tokens, adapters=in_slots(*adapters), adapter_ids=jnp.tile(ids, (1, 5)))
    for row, slot in enumerate([2, 0, 1]):
        merged = params if slot == 0 else merge_adapters(params, adapters[slot - 1])
        expected, _ = run(merged, CONFIG, tokens[row : row + 1])
        assert error(logits[row : row + 1], expected) < 2e-5
        assert error(by_token[row : row + 1], expected) < 2e-5


@pytest.mark.slow
def test_ids_of_tokens() -> None:
    """Texts packed in one row, each with an adapter of its own; and of these the logits at some places."""
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 1, 7)
    adapters = [random_adapters(CONFIG, seed=seed) for seed in (1, 2)]
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2]])
    ids = jnp.array([[1, 1, 1, 0, 0, 2, 2]])
    more = {"segment_ids": segments, "adapters": in_slots(*adapters), "adapter_ids": ids}
    logits, _ = run(params, CONFIG, tokens, **more)
    for start, stop, merged in ((0, 3, merge_adapters(params, adapters[0])), (3, 5, params)):
        expected, _ = run(merged, CONFIG, tokens[:, start:stop])
        assert error(logits[:, start:stop], expected) < 2e-5
    some, _ = run(params, CONFIG, tokens, **more, logits_at=jnp.array([[6, 2]]))
    assert error(some, logits[:, jnp.array([6, 2])]) < 1e-5


@pytest.mark.parametrize("slots", [2, 12])
def test_slot_zero_and_ids_out_of_range_are_no_adapter(slots: int) -> None:
    """Exactly, though there is noise in slot 0."""
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 5)
    expected, _ = run(params, CONFIG, tokens)
    adapters = in_slots(*[random_adapters(CONFIG)] * (slots - 1))
    for first, second in ((0, 0), (-1, slots)):
        ids = jnp.array([[first], [second]])
        np.testing.assert_array_equal(run(params, CONFIG, tokens, adapters=adapters, adapter_ids=ids)[0], expected)


def test_logits_stay_in_float32_where_the_head_has_slots() -> None:
    """In a model of 16 bits too: those of a token without an adapter are exactly what they are without slots."""
    config = TINY["tied-mqa"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    tokens, rng = random_tokens(config, 2, 5), np.random.default_rng(0)
    members = {"a": rng.standard_normal((2, 16)), "b": rng.standard_normal((40, 2)), "scale": 0.5}
    slots = empty_slots(config, slots=2, rank=2, targets=("lm_head",), dtype="bfloat16")
    slots = put_adapter(slots, 1, {"lm_head": members})
    plain, _ = run(params, config, tokens)
    found, _ = run(params, config, tokens, adapters=slots, adapter_ids=jnp.array([[0], [1]]))
    np.testing.assert_array_equal(found[0], plain[0])
    assert error(found[1], plain[1]) > 0.1
    assert (found[1] != found[1].astype(jnp.bfloat16)).any()


def test_slots_are_filled_and_replaced_without_compiling() -> None:
    params, tokens, traces = random_params(CONFIG), random_tokens(CONFIG, 2, 5), 0

    @jax.jit
    def call(slots: Params, ids: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return forward(params, CONFIG, tokens, adapters=slots, adapter_ids=ids)[0]

    slots = empty_slots(CONFIG, slots=4, rank=3)
    shapes = {member: (x.shape, x.dtype) for member, x in slots["layers"]["0"]["attn"]["v_proj"].items()}
    assert shapes == {
        "a": ((4, 3, CONFIG.hidden_size), jnp.dtype(CONFIG.dtype)),
        "b": ((4, 3, CONFIG.kv_dim), jnp.dtype(CONFIG.dtype)),
        "scale": ((4,), jnp.float32),
    }
    plain, _ = run(params, CONFIG, tokens)
    assert error(call(slots, jnp.array([[1], [3]])), plain) < 1e-5
    compiled = None
    for slot, rank, seed in ((1, 3, 1), (3, 2, 2), (1, 1, 3)):
        adapter = random_adapters(CONFIG, rank=rank, seed=seed)
        del adapter["layers"]["0"]["attn"]["v_proj"]  # nothing may stay there of the adapter before
        slots = put_adapter(slots, slot, adapter)
        expected, _ = run(merge_adapters(params, adapter), CONFIG, tokens)
        assert error(call(slots, jnp.full((2, 1), slot, jnp.int32)), expected) < 2e-5
        compiled = compiled or _put._cache_size()
        assert _put._cache_size() == compiled
    assert traces == 1


def test_targets() -> None:
    slots = empty_slots(CONFIG, slots=2, rank=4, targets=("q_proj", "layers.0.moe.shared.down_proj"), dtype="bfloat16")
    assert {n.rpartition(".")[0] for n in flatten(slots)} == {
        "layers.0.attn.q_proj",
        "layers.1.attn.q_proj",
        "layers.0.moe.shared.down_proj",
    }
    assert slots["layers"]["0"]["attn"]["q_proj"]["a"].dtype == jnp.bfloat16
    whole = empty_slots(CONFIG, slots=2, rank=4)
    assert {n.rpartition(".")[0] for n in flatten(whole)} == set(projection_names(CONFIG))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"slots": 1, "rank": 4}, "slots"),
        ({"slots": 2, "rank": 0}, "rank"),
        ({"slots": 2, "rank": 4, "targets": ("router",)}, "targets"),
        ({"slots": 2, "rank": 4, "targets": ()}, "targets"),
    ],
)
def test_slots_of_no_use(options: dict, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        empty_slots(CONFIG, **options)
    assert caught.value.param == param
    assert caught.value.hint


def test_adapters_that_do_not_fit_a_slot() -> None:
    slots = empty_slots(CONFIG, slots=3, rank=2, targets=("q_proj",))
    sound = {"a": np.ones((2, 16)), "b": np.ones((32, 2)), "scale": 1.0}
    name = "layers.0.attn.q_proj"
    for slot, tree, says in (
        (0, {name: sound}, "slot 0 of 3"),
        (3, {name: sound}, "slot 3 of 3"),
        (1, {"layers.0.attn.k_proj": sound}, "has no slots"),
        (1, {name: {"a": sound["a"], "b": sound["b"]}}, "has no slots, or not"),
        (1, {name: sound | {"c": 1.0}}, "has no slots, or not"),
        (1, {name: sound | {"a": np.ones((3, 16)), "b": np.ones((32, 3))}}, "r up to 2"),
        (1, {name: sound | {"a": np.ones((2, 15))}}, re.escape("a [r, 16]")),
        (1, {name: sound | {"b": np.ones((31, 2))}}, re.escape("b [32, r]")),
        (1, {name: sound | {"scale": np.ones(2)}}, "a scalar"),
        # Zero times these is NaN, which would reach rows of other slots.
        (1, {name: sound | {"a": np.full((2, 16), np.nan)}}, re.escape(f"{name}.a has numbers that are NaN")),
        (1, {name: sound | {"b": np.full((32, 2), np.inf)}}, re.escape(f"{name}.b has numbers that are NaN")),
        (1, {name: sound | {"scale": 1e39}}, re.escape(f"{name}.scale has numbers that are NaN")),
    ):
        with pytest.raises(RequestError, match=says) as caught:
            put_adapter(slots, slot, unflatten(tree))
        assert caught.value.hint
    put_adapter(slots, 1, unflatten({name: sound}))
    slots = empty_slots(CONFIG, slots=3, rank=2, targets=("q_proj",), more=("gain",))
    for gain in (np.ones(31), np.ones(1), np.float32(1)):  # the last two would be broadcast
        with pytest.raises(RequestError, match=re.escape("other members [32]")):
            put_adapter(slots, 1, unflatten({name: sound | {"gain": gain}}))
    for dtype, largest in (("float16", 7e4), ("bfloat16", 1e39)):
        slots = empty_slots(CONFIG, slots=3, rank=2, targets=("q_proj",), dtype=dtype, more=("shift",))
        with pytest.raises(RequestError, match=f"infinite in {dtype}"):
            put_adapter(slots, 1, unflatten({name: sound | {"b": np.full((32, 2), largest)}}))


def test_arguments_of_forward_that_do_not_fit() -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 5)
    slots, ids = in_slots(random_adapters(CONFIG)), jnp.ones((2, 1), jnp.int32)
    other = flatten(slots)
    wide = unflatten(other | {"layers.0.attn.q_proj.a": jnp.ones((2, 2, 17))})
    more = unflatten(other | {"layers.0.attn.q_proj.scale": jnp.ones(3)})
    lone = unflatten({name: leaf for name, leaf in other.items() if name != "layers.0.attn.q_proj.b"})
    for adapters, given, param in (
        (slots, None, "adapter_ids"),
        (None, ids, "adapter_ids"),
        (slots, ids[:, :0], "adapter_ids"),
        (slots, ids[:1], "adapter_ids"),
        (slots, ids.astype(jnp.float32), "adapter_ids"),
        (wide, ids, "adapters"),
        (more, ids, "adapters"),
        (lone, ids, "adapters"),
        (random_adapters(CONFIG), ids, "adapters"),
    ):
        with pytest.raises(RequestError) as caught:
            forward(params, CONFIG, tokens, adapters=adapters, adapter_ids=given)
        assert caught.value.param == param
        assert caught.value.hint


def test_programs_name_their_layers() -> None:
    """Every block, in the optimised program's metadata, though equal layers were traced once."""
    config = TINY["sigmoid-moe"].replace(layers=TINY["sigmoid-moe"].layers * 2)
    lowered = run.lower(random_params(config), config, random_tokens(config, 1, 4))
    text = str(lowered.as_text())
    assert len(re.findall(r"func\.func private @_layer", text)) == 3  # the first has nothing to add before its norm
    names = set(re.findall(r'op_name="jit\(forward\)/([^"]*)"', str(lowered.compile().as_text())))
    for layer, kind in enumerate(("moe", "mlp") * 2):
        for block in ("attn_norm", "attn", "mlp_norm", kind):
            wanted = f"layers.{layer}/jit(_layer)/{block}/"
            assert any(name.startswith(wanted) for name in names), wanted
    for block in ("embed", "final_norm", "logits"):
        assert any(name.startswith(f"{block}/") for name in names), block
