"""Loading: several devices and processes, part of a tree, no conversion, files that change meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tensorstore as ts
from click.testing import CliRunner
from helpers import GOLDENS, on_eight_devices, simulated
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec
from orbax.checkpoint import v1 as ocp
from tiny_chat_model import write_chat_model
from tiny_models import LLAMA, LLAMA4, MIXTRAL, hf_tensors, random_leaves, write_gguf, write_hf

from llama_jax.checkpoint import array_store, leaf_builder, load_params, open_checkpoint, save
from llama_jax.checkpoint.array_store import open_arrays
from llama_jax.checkpoint.build import load_source
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.opening import opened
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.generation import batch_generate
from llama_jax.layout import partition_spec
from llama_jax.loading import load
from llama_jax.params import flatten, param_specs, unflatten
from llama_jax.sharding import RuledMesh, Rules

CONFIG = config_from_hf(LLAMA)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def loaded_bits(params: Any) -> dict[str, bytes]:
    return {name: bits(leaf) for name, leaf in flatten(params).items()}


# --- Several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices.py", "-m", "")


PROCESS = """
import sys
import jax, numpy as np
address, rank, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=rank)
from llama_jax.checkpoint import array_store, load_params, open_checkpoint
from llama_jax.layout import param_sharding
from llama_jax.params import flatten
whole = flatten(load_params(path, sharding=jax.local_devices()[0]))
checkpoint, original, read = open_checkpoint(path), array_store._read, []
array_store._read = lambda where, skip, out: (read.append(out.nbytes), original(where, skip, out))
mesh = jax.make_mesh((2, 4), ("tensor", "data"))  # each process has all of one half
sharding = param_sharding(checkpoint.config, mesh)
for verify in (True, False):
    read.clear()
    for name, leaf in flatten(load_params(path, sharding=sharding, verify=verify)).items():
        assert len(leaf.addressable_shards) == 4 and leaf.shape == whole[name].shape
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[name])[shard.index])
    print("read", sum(n for n in read if n != 20), checkpoint.nbytes)  # without the index behind each chunk
"""


@pytest.mark.slow
def test_two_processes_read_what_their_devices_keep(tmp_path: Path) -> None:
    path = save(tmp_path / "model", unflatten(random_leaves(CONFIG)), CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = simulated(4)
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(rank), str(path)], env=env, stdout=-1, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for output in outputs:
        verified, unverified = ([int(n) for n in line.split()[1:]] for line in output.splitlines() if "read" in line)
        assert verified[0] == verified[1]  # a digest covers whole tensors
        rows_split = sum(s.size for s in param_specs(CONFIG) if _split(s.name) == PartitionSpec("tensor", None)) * 4
        assert unverified[0] == unverified[1] - rows_split // 2


def _split(name: str, mesh: tuple[int, ...] = (2,), config: Any = CONFIG) -> PartitionSpec:
    spec = next(s for s in param_specs(config) if s.name == name)
    return partition_spec(spec, config, AbstractMesh(mesh, ("tensor", "data")[: len(mesh)]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("layers.0.attn.q_proj.weight", 4, ("tensor", None)),
        ("layers.0.attn.o_proj.weight", 4, (None, "tensor")),
        ("layers.0.attn.k_proj.weight", 2, ("tensor", None)),
        ("layers.0.attn.k_proj.weight", 4, (None, None)),  # two heads of eight rows: heads are never cut
        ("layers.0.attn_norm.weight", 2, (None,)),
        ("layers.0.moe.experts.gate_proj.weight", 3, (None, "tensor", None)),  # every expert's width
        ("layers.0.moe.experts.gate_proj.weight", 8, (None, "tensor", None)),
        ("layers.0.moe.experts.gate_proj.weight", 5, (None, None, None)),
        ("layers.0.moe.experts.down_proj.weight", 8, (None, None, "tensor")),
        ("layers.0.moe.router.weight", 3, (None, None)),
        ("embed.weight", 8, ("tensor", None)),
        ("embed.weight", 5, (None, None)),
        ("lm_head.weight", 2, ("tensor", None)),
    ],
)
def test_rules(name: str, size: int, expected: tuple[str | None, ...]) -> None:
    assert _split(name, (size,), config_from_hf(MIXTRAL)) == PartitionSpec(*expected)


def test_other_rules() -> None:
    spec = next(s for s in param_specs(CONFIG) if s.name == "layers.0.attn.q_proj.weight")
    mesh = AbstractMesh((4, 2), ("x", "y"))
    ruled = RuledMesh(mesh, Rules({"q_heads": "x", "embed": "y"}))
    assert partition_spec(spec, CONFIG, ruled) == PartitionSpec("x", "y")  # type: ignore[arg-type]
    assert partition_spec(spec, CONFIG, mesh) == PartitionSpec(None, None)  # type: ignore[arg-type]


# --- Part of a tree ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("part") / "model", unflatten(random_leaves(CONFIG)), CONFIG)


ALL = {s.name for s in param_specs(CONFIG)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"without": "lm_head.*"}, ALL - {"lm_head.weight"}),
        ({"only": "lm_head.weight"}, {"lm_head.weight"}),
        ({"only": ["layers.0.*", "embed.weight"]}, {n for n in ALL if n.startswith(("layers.0.", "embed"))}),
        (
            {"only": "layers.1.*", "without": ["*norm*"]},
            {n for n in ALL if n.startswith("layers.1.") and "norm" not in n},
        ),
        ({"only": "layers.[01].attn.[qk]_proj.*"}, {n for n in ALL if ".q_proj." in n or ".k_proj." in n}),
        ({}, ALL),
    ],
)
def test_partial_load(checkpoint: Path, options: dict[str, Any], expected: set[str]) -> None:
    leaves, steps = random_leaves(CONFIG), []
    found = loaded_bits(load_params(checkpoint, **options, progress=lambda *step: steps.append(step)))
    assert found == {name: bits(leaves[name]) for name in expected}
    assert steps[-1][:2] == (sum(leaves[n].nbytes for n in expected),) * 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"only": "layers.2.*"}, "only"),
        ({"only": ["embed.weight", "lm-head"]}, "only"),
        ({"without": "lm_head"}, "without"),
        ({"only": []}, "only"),
        ({"only": "embed.*", "without": "*"}, "only"),
    ],
)
def test_patterns_that_fit_nothing(checkpoint: Path, options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_params(checkpoint, **options)
    assert caught.value.param == param
    assert caught.value.hint


# --- Where bytes stand ------------------------------------------------------------------------------------------------


@given(st.data())
def test_rows_of_any_chunks(data: st.DataObject) -> None:
    """Chunks that cut any dimension, and do not divide it."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunk = [data.draw(st.integers(1, n + 1)) for n in shape]
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    with tempfile.TemporaryDirectory() as folder:
        write_zarr(Path(folder), {"a.weight": array}, chunk, [{"name": "bytes", "configuration": {"endian": "little"}}])
        found = open_arrays(Path(folder))["a.weight"]
        out = np.empty((stop - start, *shape[1:]), np.float32)
        found.read_rows(start, out)
    np.testing.assert_array_equal(out, array[start:stop])


def write_zarr(
    folder: Path, arrays: dict[str, np.ndarray], chunk: list[int], codecs: list[dict[str, Any]], **config: int
) -> None:
    base = {"driver": "file", "path": f"{folder}/"}
    for name, array in arrays.items():
        metadata = {
            "shape": list(array.shape),
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": codecs,
        }
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": config}
        store = ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True).result()
        store.write(array).result()


def test_an_index_of_several_levels(tmp_path: Path) -> None:
    """A B+tree of small nodes."""
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    arrays = {f"layers.{i}.weight": np.full((4, 8), i + 1, np.float32) for i in range(40)}
    write_zarr(tmp_path, arrays, [2, 8], plain, max_decoded_node_bytes=900, max_inline_value_bytes=40)
    found = open_arrays(tmp_path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        out = np.empty((3, 8), np.float32)
        found[name].read_rows(1, out)
        np.testing.assert_array_equal(out, array[1:])


def test_tensors_of_zeros(tmp_path: Path) -> None:
    """They stand on disk like all others."""
    leaves = {name: np.zeros_like(leaf) for name, leaf in random_leaves(CONFIG).items()}
    path = save(tmp_path / "model", unflatten(leaves), CONFIG)
    assert loaded_bits(load_params(path)) == {n: bits(a) for n, a in leaves.items()}


def test_compressed_checkpoints_are_read_too(checkpoint: Path, tmp_path: Path) -> None:
    """As Orbax writes them by default; this program does not."""
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    metadata = ocp.metadata(path / "params").custom_metadata
    shutil.rmtree(path / "params")
    with ocp.Context():
        ocp.save(path / "params", unflatten(random_leaves(CONFIG)), custom_metadata=metadata)
    assert {a.chunks for a in open_arrays(open_checkpoint(path).arrays_path).values()} == {None}
    assert loaded_bits(load_params(path)) == {n: bits(a) for n, a in random_leaves(CONFIG).items()}


def test_every_flipped_bit_of_a_data_file_is_noticed(tmp_path: Path) -> None:
    """Whether it lies in a tensor, in the index behind its chunk, or in the store's own index."""
    checkpoint = save(tmp_path / "model", unflatten(random_leaves(CONFIG)), CONFIG)
    state = open_checkpoint(checkpoint).arrays_path
    spans = [span for a in open_arrays(state).values() for span in (a.chunks or {}).values() if isinstance(span, tuple)]
    file = max((path for path, _, _ in spans), key=lambda p: p.stat().st_size)
    data = file.read_bytes()
    used = [range(offset, offset + size) for path, offset, size in spans if path == file]
    places = [place for span in used for place in (span[0], span[len(span) // 2], *span[-20:])]
    for place_ in places[:: max(1, len(places) // 60)]:
        flipped = bytearray(data)
        flipped[place_] ^= 1 << (place_ % 8)
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"tensor \S+ (has digest|cannot be read)"):
            load_params(checkpoint)
    file.write_bytes(data)
    load_params(checkpoint)


@pytest.mark.parametrize("file", ["../outside", "d/../../outside", "/etc/passwd", "%2E%2E/outside"])
def test_an_index_that_points_outside(tmp_path: Path, file: str) -> None:
    for reference in (f"value::{file}:0:10", f"value:{file}/:x:0:10"):
        with pytest.raises(ValueError, match="outside"):
            array_store._location(tmp_path, reference)
    with pytest.raises(ValueError, match="malformed"):
        array_store._location(tmp_path, "value::d/x:0")


def test_only_the_rows_that_are_wanted_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is one chunk on disk, which tensorstore would read whole."""
    read: list[int] = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(len(buffers[0])) or original(fd, buffers, at))
    array = open_arrays(open_checkpoint(checkpoint).arrays_path)["embed.weight"]
    assert array.chunk_shape == array.shape
    out = np.empty((3, 16), np.float32)
    array.read_rows(20, out)
    np.testing.assert_array_equal(out, random_leaves(CONFIG)["embed.weight"][20:23])
    assert read == [3 * 16 * 4]


# --- Files that change while they are read ----------------------------------------------------------------------------


@pytest.fixture
def interfere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None], int], None]:
    """interfere(action, n) has `action` happen before the n-th read of the data of a tensor."""
    state: dict[str, Any] = {"left": 0, "action": None}
    original = os.preadv

    def preadv(*args: Any) -> int:
        if state["action"] is not None:
            state["left"] -= 1
            if state["left"] <= 0:
                action, state["action"] = state["action"], None
                action()
        return original(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    # Several reads a tensor, on one thread, so that the moment is the same each time.
    monkeypatch.setattr(leaf_builder, "READ_BYTES", 256)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    return lambda action, n: state.update(action=action, left=n)


def largest(folder: Path, pattern: str) -> Path:
    return max((p for p in folder.rglob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("share", [0, 0.3, 0.6])
@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "gguf"])
def test_a_file_that_is_cut_short_while_it_loads(
    tmp_path: Path, checkpoint: Path, interfere: Callable[..., None], kind: str, share: float
) -> None:
    """No SIGBUS: an error that names the tensor and the file."""
    if kind == "checkpoint":
        path = shutil.copytree(checkpoint, tmp_path / "copy")
        file = largest(path / "params" / "state", "d/*")
    elif kind == "safetensors":
        write_hf(tmp_path / "hf", LLAMA)
        path, file = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
    else:
        path = file = tmp_path / "model.gguf"
        write_gguf(file, LLAMA, quantisation=gguf.GGMLQuantizationType.F16)
    cut = int(share * file.stat().st_size)

    def run() -> None:
        if kind == "checkpoint":
            load_params(path)
        else:
            with opened(path) as source:
                load_source(source)

    run()
    interfere(lambda: os.truncate(file, cut), 3)
    with pytest.raises(CheckpointError, match=r"tensor \S+|changed while") as caught:
        run()
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_checkpoint_that_is_replaced_while_it_loads(tmp_path: Path, interfere: Callable[..., None]) -> None:
    """By `convert --overwrite`: the files of the old one are gone."""
    path = save(tmp_path / "model", unflatten(random_leaves(CONFIG)), CONFIG)
    other = unflatten(random_leaves(CONFIG, seed=1))
    interfere(lambda: save(path, other, CONFIG, overwrite=True), 3)
    with pytest.raises(CheckpointError, match=r"tensor \S+ cannot be read"):
        load_params(path)
    assert loaded_bits(load_params(path)) == loaded_bits(other)


def test_a_source_that_is_written_to_while_it_loads(tmp_path: Path, interfere: Callable[..., None]) -> None:
    """Of the same size, so that only its time tells."""
    write_hf(tmp_path / "hf", LLAMA)
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    interfere(lambda: file.write_bytes(data), 3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while"), opened(tmp_path / "hf") as source:
        load_source(source)


# --- Without conversion -----------------------------------------------------------------------------------------------


def direct(path: Path, **options: Any) -> dict[str, bytes]:
    with opened(path) as source:
        return loaded_bits(load_source(source, **options))


@pytest.mark.parametrize("case", ["llama-bf16-sharded", "llama-f16", "mixtral-moe", "llama4-scout-like"])
def test_direct_load_equals_conversion(tmp_path: Path, case: str) -> None:
    path = convert(GOLDENS / case, tmp_path / "model")
    assert direct(GOLDENS / case) == loaded_bits(load_params(path))
    assert direct(GOLDENS / case, dtype="bfloat16") == loaded_bits(load_params(path, dtype="bfloat16"))


@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL], ids=["dense", "experts"])
def test_direct_load_of_gguf(tmp_path: Path, hf: dict[str, Any]) -> None:
    hf = hf | {"hidden_size": 32, "head_dim": 8, "intermediate_size": 32}
    write_gguf(tmp_path / "m.gguf", hf, quantisation=gguf.GGMLQuantizationType.Q8_0)
    with opened(tmp_path / "m.gguf") as source:
        leaves = {s.name: source.read(s) for s in param_specs(source.config)}
        path = save(tmp_path / "model", unflatten(leaves), source.config)
    assert direct(tmp_path / "m.gguf") == loaded_bits(load_params(path))
    assert direct(tmp_path / "m.gguf", only="layers.0.*").keys() < direct(tmp_path / "m.gguf").keys()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_direct_load_refuses_what_conversion_refuses(tmp_path: Path, value: float) -> None:
    config = config_from_hf(LLAMA4)
    leaves = hf_tensors(config, random_leaves(config))
    leaves["model.layers.1.self_attn.o_proj.weight"].flat[5] = value
    write_hf(tmp_path / "hf", LLAMA4, tensors=leaves)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.o_proj\.weight holds 1 values") as caught:
        direct(tmp_path / "hf")
    assert str(tmp_path / "hf") in caught.value.message
    assert direct(tmp_path / "hf", verify=False)
    assert direct(tmp_path / "hf", without="layers.1.attn.*")
    del leaves["model.norm.weight"]
    write_hf(tmp_path / "hf", LLAMA4, tensors=leaves)
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.norm\.weight"):
        direct(tmp_path / "hf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_load_without_conversion(tmp_path: Path, cache: Path, kind: str) -> None:
    """The same model, tokenizer and template; nothing is written anywhere."""
    folder = write_chat_model(tmp_path / "models" / "tiny", temperature=0.6)
    path = folder
    if kind == "gguf":
        path = folder.parent / "tiny.gguf"
        write_chat_gguf(path, json.loads((folder / "config.json").read_text()))
    before, said = snapshot(folder.parent), []
    model, tokenizer = load(path, convert=False, notify=said.append, dtype="float32")
    assert said == []
    assert not cache.exists()
    assert snapshot(folder.parent) == before
    converted, other = load(path, notify=said.append, dtype="float32")
    assert cache.exists()
    assert loaded_bits(model.params) == loaded_bits(converted.params)
    assert model.config == converted.config.replace(dtype=model.config.dtype)
    assert model.generation_config == converted.generation_config
    assert model.name == str(path)
    assert tokenizer.chat_templates == other.chat_templates
    text = "Hello <|im_start|> world"
    assert tokenizer.encode(text) == other.encode(text)
    answers = [batch_generate(m, t, ["The"], max_tokens=4)[0] for m, t in ((model, tokenizer), (converted, other))]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
    again, _ = load(cache / "models" / os.listdir(cache / "models")[0], convert=False, dtype="float32")
    assert loaded_bits(again.params) == loaded_bits(model.params)


def write_chat_gguf(path: Path, hf: dict[str, Any]) -> None:
    """A GGUF file with a tokenizer."""
    metadata = json.loads((Path(__file__).parent / "data" / "tokenizer" / "byte_level_gguf.json").read_text())

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, *args: Any, **kwargs: Any) -> None:
            self.add_tokenizer_model(metadata["tokenizer.ggml.model"])
            self.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
            self.add_token_list(metadata["tokenizer.ggml.tokens"])
            self.add_token_types(metadata["tokenizer.ggml.token_type"])
            self.add_token_merges(metadata["tokenizer.ggml.merges"])
            super().write_header_to_file(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(path, hf)


def test_no_convert_on_the_command_line(tmp_path: Path, cache: Path) -> None:
    from llama_jax.cli import cli

    folder = write_chat_model(tmp_path / "tiny")
    args = ["generate", "The", "-m", str(folder), "--max-tokens", "3", "--json"]
    found = []
    for extra in (["--no-convert"], []):
        result = CliRunner().invoke(cli, [*args, *extra, "--quiet"])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["token_ids"])
        assert (cache / "models").exists() == (extra == [])
    assert found[0] == found[1]
