"""Tests that need eight devices; `test_load_sharded.py` runs them in a process of its own, on simulated ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_chat_model import write_chat_model
from tiny_models import DTYPES, LLAMA, write_hf

from llama_jax.checkpoint import array_store, leaf_builder, load_params, open_checkpoint
from llama_jax.checkpoint.build import load_source
from llama_jax.checkpoint.format import TensorInfo
from llama_jax.checkpoint.leaf_builder import LeafBuilder, fill
from llama_jax.convert import convert
from llama_jax.convert.opening import open_source
from llama_jax.generation import batch_generate
from llama_jax.layout import param_sharding
from llama_jax.loading import load
from llama_jax.params import flatten

FAMILIES = ("llama3.1-rope", "qwen2-bias", "mixtral-moe", "llama4-text", "smollm2-odd-heads", "llama-mqa")
MESHES = {
    "tensor=8": ((8,), ("tensor",)),
    "data=2, tensor=4": ((2, 4), ("data", "tensor")),
    "data=8": ((8,), ("data",)),
}


def mesh_of(name: str) -> Mesh:
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def assert_shards(leaf: jax.Array, whole: np.ndarray) -> None:
    """Every device holds its own part, bit for bit, and nothing more."""
    assert leaf.shape == whole.shape
    assert leaf.dtype == whole.dtype
    assert len(leaf.addressable_shards) == 8 if isinstance(leaf.sharding, NamedSharding) else 1
    for shard in leaf.addressable_shards:
        assert shard.data.devices() == {shard.device}
        assert shard.data.shape == leaf.sharding.shard_shape(leaf.shape)
        assert bits(shard.data) == bits(whole[shard.index])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A golden's folder and its checkpoint."""
    source = GOLDENS / request.param
    return source, convert(source, tmp_path_factory.mktemp("sharded") / "model")


@pytest.mark.parametrize("mesh", MESHES)
def test_same_leaves_as_on_one_device(family: tuple[Path, Path], mesh: str) -> None:
    source, path = family
    whole = flatten(load_params(path))
    assert {len(leaf.devices()) for leaf in whole.values()} == {1}
    config = open_checkpoint(path).config
    sharding = param_sharding(config, mesh_of(mesh))
    leaves = flatten(load_params(path, sharding=sharding))
    opened = open_source(source)
    direct = flatten(load_source(opened, sharding=sharding))
    opened.close()
    assert leaves.keys() == whole.keys() == direct.keys()
    for name, leaf in leaves.items():
        assert_shards(leaf, np.asarray(whole[name]))
        assert_shards(direct[name], np.asarray(whole[name]))
    split = [leaf for leaf in leaves.values() if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (mesh != "data=8")


@pytest.mark.parametrize("blocks", [(1 << 20, 1 << 20), (1000, 300)], ids=["whole", "pieces"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")],
)
def test_casts_equal_astype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, wanted: str, blocks: tuple[int, int]
) -> None:
    monkeypatch.setattr(leaf_builder, "BLOCK_BYTES", blocks[0])
    monkeypatch.setattr(leaf_builder, "READ_BYTES", blocks[1])
    leaves = write_hf(tmp_path / "hf", LLAMA | {"dtype": stored})
    path = convert(tmp_path / "hf", tmp_path / "model")
    sharding = param_sharding(open_checkpoint(path).config, mesh_of("data=2, tensor=4"))
    for name, leaf in flatten(load_params(path, dtype=wanted, sharding=sharding)).items():
        assert_shards(leaf, leaves[name].astype(DTYPES[wanted]))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], PartitionSpec]:
    """A shape and how it is split over a mesh of data=2, tensor=4."""
    sizes = {None: 1, "data": 2, "tensor": 4, ("data", "tensor"): 8}
    axes: list[Any] = draw(st.sampled_from([[], ["data"], ["tensor"], ["data", "tensor"], [("data", "tensor")]]))
    rank = draw(st.integers(max(1, len(axes)), 3))
    split = draw(st.permutations([*axes, *[None] * (rank - len(axes))]))
    return tuple(sizes[a] * draw(st.integers(1, 6)) for a in split), PartitionSpec(*split)


@given(
    layouts(),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([None, *sorted(DTYPES)]),
    st.integers(1, 400),
    st.integers(1, 400),
)
def test_any_layout(
    layout: tuple[tuple[int, ...], PartitionSpec], stored: str, wanted: str | None, block: int, read: int
) -> None:
    shape, spec = layout
    tensor = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[stored])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaf_builder, "BLOCK_BYTES", block)
        patch.setattr(leaf_builder, "READ_BYTES", read)
        dtype = None if wanted is None else jnp.dtype(wanted)
        builder = LeafBuilder(TensorInfo(shape, stored, ""), dtype, NamedSharding(mesh_of("data=2, tensor=4"), spec))
        rows = 0
        for taken in builder.blocks():
            assert taken.start == rows
            assert taken.wanted
            rows += len(taken.rows)
            fill(taken, tensor)
        assert rows == shape[0]
        assert_shards(builder.result(), tensor if wanted is None else tensor.astype(DTYPES[wanted]))


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where eight devices hold the same."""
    write_hf(tmp_path / "hf", LLAMA)
    path = convert(tmp_path / "hf", tmp_path / "model")
    checkpoint, read = open_checkpoint(path), []
    original = array_store._read
    monkeypatch.setattr(
        array_store, "_read", lambda where, skip, out: (read.append(out.nbytes), original(where, skip, out))
    )
    for mesh in MESHES:
        read.clear()
        load_params(path, sharding=param_sharding(checkpoint.config, mesh_of(mesh)))
        assert sum(n for n in read if n != 20) == checkpoint.nbytes  # 20 bytes of index stand behind each chunk


class PartOfMesh:
    """A sharding of which this process has some devices only, as one of several processes sees it."""

    def __init__(self, whole: NamedSharding, devices: set[jax.Device]):
        self._whole, self._devices = whole, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[jax.Device, Any]:
        return {d: i for d, i in self._whole.devices_indices_map(shape).items() if d in self._devices}


@pytest.mark.parametrize(("spec", "share"), [(("tensor", None), 0.25), ((None, "tensor"), 1.0)])
def test_a_process_wants_only_the_rows_of_its_devices(spec: tuple[Any, ...], share: float) -> None:
    """Parts of rows are read as whole rows."""
    whole = NamedSharding(mesh_of("tensor=8"), PartitionSpec(*spec))
    mine = PartOfMesh(whole, {jax.devices()[2], jax.devices()[3]})
    builder = LeafBuilder(TensorInfo((64, 16), "float32", ""), None, mine)  # type: ignore[arg-type]
    wanted = [(b.start, b.start + len(b.rows)) for b in builder.blocks() if b.wanted]
    assert sum(stop - start for start, stop in wanted) == 64 * share
    if share < 1:
        assert wanted[0][0] == 16
        assert wanted[-1][1] == 32


def test_generation_on_a_mesh(tmp_path: Path) -> None:
    """The same tokens, from parameters that stay where they are."""
    folder = write_chat_model(tmp_path / "tiny", layers=2)
    plain, tokenizer = load(folder)
    prompts = ["The quick", "a"]
    expected = [o.outputs[0].token_ids for o in batch_generate(plain, tokenizer, prompts, max_tokens=6)]
    for convert_first in (True, False):
        mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
        model, _ = load(folder, mesh=mesh, convert=convert_first)
        assert model.mesh is not None
        assert model.mesh.devices.tolist() == mesh.devices.tolist()
        weight = model.params["layers"]["0"]["attn"]["qkv_proj"]["weight"]
        assert {shard.data.shape[0] for shard in weight.addressable_shards} == {model.config.num_kv_heads // 2}
        found = [o.outputs[0].token_ids for o in batch_generate(model, tokenizer, prompts, max_tokens=6)]
        assert found == expected


def test_a_mesh_without_the_axis_holds_copies_and_fuses(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "tiny", layers=2)
    model, _ = load(folder, mesh=mesh_of("data=8"))
    leaf = model.params["layers"]["0"]["attn"]["qkv_proj"]["weight"]
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.devices()) == 8


def test_other_places(tmp_path: Path) -> None:
    """A device, a sharding for all leaves, a default device that only the calling thread knows."""
    leaves = write_hf(tmp_path / "hf", LLAMA | {"dtype": "bfloat16"})
    path = convert(tmp_path / "hf", tmp_path / "model")
    third = jax.devices()[3]
    for where in (third, jax.sharding.SingleDeviceSharding(third)):
        for name, leaf in flatten(load_params(path, sharding=where, dtype="float32")).items():
            assert leaf.devices() == {third}
            assert leaf.committed
            assert bits(leaf) == bits(leaves[name].astype(np.float32))
    with jax.default_device(third):
        loaded = flatten(load_params(path))
    assert {d for leaf in loaded.values() for d in leaf.devices()} == {third}
    assert not any(leaf.committed for leaf in loaded.values())
    assert os.environ["XLA_FLAGS"]
    assert ml_dtypes.bfloat16 == leaves["embed.weight"].dtype
