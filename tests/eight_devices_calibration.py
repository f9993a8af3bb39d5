"""Quantising on eight devices; `test_calibration.py` runs these tests in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY, error, random_params, random_tokens, run
from test_calibration import TEXT, layout, weight
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.checkpoint import open_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.convert.quantizing import QuantizedSource
from llama_jax.errors import RequestError
from llama_jax.layout import param_sharding
from llama_jax.model import calibration
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.params import flatten, param_specs, unflatten
from llama_jax.quantized import awq, gptq, hqq, nearest
from llama_jax.recipe import recipe
from llama_jax.sharding import ONE_DEVICE, RowSplit, make_mesh, on

MESH = "data=2,tensor=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("calibration") / "tiny", layers=2)


def test_rows_and_copies() -> None:
    """Rows that do not divide are filled up; a copy is whole everywhere; one device changes nothing."""
    devices = RowSplit.over(make_mesh(MESH))
    for x in (np.arange(30.0).reshape(10, 3), jnp.arange(30.0).reshape(10, 3)):
        split = devices.split(x)
        assert [shard.data.shape for shard in split.addressable_shards] == [(2, 3)] * 8
        np.testing.assert_array_equal(split, np.concatenate([x, np.zeros((6, 3))]))
    assert len(devices.copy({"a": jnp.ones(3)})["a"].addressable_shards) == 8
    assert RowSplit.over(make_mesh("tensor=1")) == RowSplit.over(None) == ONE_DEVICE


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_the_command_gives_what_one_device_gives(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor, bit for bit where no sum depends on the number of devices; and each has a part of the work."""
    blocks: list[int] = []
    split = RowSplit.split
    monkeypatch.setattr(
        RowSplit, "split", lambda self, x: (blocks.append(len((y := split(self, x)).sharding.device_set)), y)[1]
    )
    args = ["--weights", "int4_g8", "--method", method, "--json"]
    if method in ("gptq", "awq"):
        (tmp_path / "prose.txt").write_text(TEXT)
        args += ["--calibration", str(tmp_path / "prose.txt")]
    found = []
    for path, more in (
        (tmp_path / "one", []),
        (tmp_path / "eight", ["--mesh", MESH]),
        (tmp_path / "auto", ["--mesh", "auto"]),
    ):
        blocks.clear()
        done = CliRunner().invoke(cli, ["quantize", str(folder), str(path), *args, *more])
        assert done.exit_code == 0, done.output
        assert set(blocks) == {8 if more else 1}
        digests = {name: info.digest for name, info in open_checkpoint(path).tensors.items()}
        found.append((digests, json.loads(done.stdout)["errors"]))
    (one, errors), *others = found
    for digests, own in others:
        assert digests.keys() == one.keys()
        same = sum(digests[name] == one[name] for name in one)
        assert same == len(one) if method in ("rtn", "hqq") else same > 0.8 * len(one)
        assert own == pytest.approx(errors, rel=1e-3)


@pytest.mark.parametrize("name", ["int4_g32_min", "int4_g32", "int8"])
def test_rows_are_rounded_without_a_message(name: str) -> None:
    """Each device finds the codes of its rows by itself, and keeps them."""
    where, devices = layout(name), RowSplit.over(make_mesh(MESH))
    rows, gram = devices.split(weight(250, 64)), devices.copy(jnp.eye(64))
    for lowered in (
        nearest.encode.lower(where, rows),
        hqq.encode.lower(where, rows),
        gptq.encode.lower(where, rows, gram),
        awq.encode.lower(where, rows, gram),
    ):
        program = lowered.compile()
        assert not re.search(r"all-|collective-", program.as_text())
        assert {len(way.device_set) for way in jax.tree.leaves(program.output_shardings)} == {8}
        assert not any(way.is_fully_replicated for way in jax.tree.leaves(program.output_shardings))


def test_rows_of_the_text_are_shared() -> None:
    """Nine rows, of which eight devices would have four each: the Gram matrices are those of all nine, no more."""
    config, tokens = TINY["biased"], np.asarray(random_tokens(TINY["biased"], 9, 6))
    params, devices = random_params(config), RowSplit.over(make_mesh(MESH))
    hidden = calibration.embedded(params["embed"], tokens, devices)
    assert [len(part) for part in hidden] == [9]
    names = ["attn_in", "attn_heads", "mlp_hidden"]
    layer = params["layers"]["0"]
    grams = calibration._grams(layer, config, 0, hidden, names, devices)
    expected = calibration._grams(layer, config, 0, calibration.embedded(params["embed"], tokens), names, ONE_DEVICE)
    for name in names:
        assert grams[name].sharding.is_fully_replicated
        assert error(grams[name], expected[name]) < 1e-6


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["biased", "tied-mqa"])
def test_a_model_on_a_mesh(name: str, method: str) -> None:
    """The codes of one device, in the places of the model's layout; a repeated head may have other scales."""
    config, mesh = TINY[name], make_mesh("data=4,tensor=2")
    params, tokens = random_params(config), np.asarray(random_tokens(config, 4, 6))
    where, flat = param_sharding(config, mesh), flatten(params)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(config)})
    arranged, split = arrange(placed, config, mesh, fuse=False)
    options: dict[str, Any] = {"group": 4, "method": method, "calibration": tokens}
    small = lj.quantize(Model(arranged, split, mesh), "int4", **options)
    alone = lj.quantize(Model(params, config), "int4", **options)
    expected, _ = run(alone.params, alone.config, tokens)
    with on(mesh):
        found, _ = run(small.params, small.config, tokens)
    original, _ = run(params, config, tokens)
    assert error(found, original) < 1.2 * error(expected, original)
    if split == config:
        assert error(found, expected) < 2e-5
    wanted = param_sharding(small.config, mesh)
    for spec in param_specs(small.config):
        assert flatten(small.params)[spec.name].sharding.is_equivalent_to(wanted(spec), len(spec.shape))


def test_refused(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli, ["quantize", str(folder), str(tmp_path / "q"), "--weights", "int4", "--mesh", "data=9"]
    )
    assert done.exit_code != 0
    assert "a mesh of data=9 needs 9 devices; there are 8" in done.output
    with pytest.raises(RequestError, match="nothing is quantised") as caught:
        convert(folder, tmp_path / "q", mesh=make_mesh(MESH))
    assert caught.value.param == "mesh"
    assert not list(tmp_path.iterdir())


def test_devices_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(MESH)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(RequestError, match="devices of 1 other process"):
        RowSplit.over(mesh)


def test_blocks_grow_with_the_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a leaf of several blocks each device gets as many rows as one device would have: fewer, longer steps."""
    from llama_jax.convert import casting
    from llama_jax.convert.opening import open_model
    from llama_jax.recipe import schemes

    monkeypatch.setattr(casting, "_BLOCK_BYTES", 1 << 8)
    sizes: list[tuple[int, ...]] = []
    split = RowSplit.split
    monkeypatch.setattr(RowSplit, "split", lambda self, x: (sizes.append(x.shape), split(self, x))[1])
    read = []
    for devices in (ONE_DEVICE, RowSplit.over(make_mesh(MESH))):
        sizes.clear()
        source = open_model(folder)
        small = QuantizedSource(source, schemes(source.config, recipe("int4_g8")), devices=devices)
        specs = [s for s in param_specs(small.config) if s.leaf == "layers.0.mlp.up_proj"]
        read.append([small.read(spec) for spec in specs])
        source.close()
        read[-1].append(np.asarray(len(sizes)))
    *one, blocks = read[0]
    *eight, fewer = read[1]
    assert int(fewer) == -(-int(blocks) // 8) < int(blocks)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)
