"""Hugging Face folders to checkpoints: every layout gives the same leaves, everything wrong is named beforehand."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import DTYPES, LLAMA, LLAMA4, MIXTRAL, assert_equal, hf_tensors, loaded, random_leaves, write_hf

from llama_jax.checkpoint import is_checkpoint, open_checkpoint, verify
from llama_jax.checkpoint.values import count_nonfinite
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.safetensors_file import SafetensorsFile
from llama_jax.errors import (
    CheckpointError,
    LlamaJaxError,
    ModelNotFound,
    RequestError,
    StorageError,
    UnsupportedModel,
)

GOLDENS = sorted(p.name for p in (Path(__file__).parent / "data" / "goldens").iterdir() if p.is_dir())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL, LLAMA4], ids=["dense", "experts", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_shards_and_dtypes(tmp_path: Path, hf: dict[str, Any], dtype: str, shards: int) -> None:
    leaves = write_hf(tmp_path / "hf", hf | {"dtype": dtype}, shards=shards)
    path = convert(tmp_path / "hf", tmp_path / "out")
    assert_equal(path, leaves)
    opened = open_checkpoint(path)
    assert opened.dtype == dtype
    assert opened.config == config_from_hf(hf | {"dtype": dtype})
    assert opened.generation_config == {"eos_token_id": [2, 3]}
    assert (path / "tokenizer.json").read_text() == "{}"
    assert verify(path).ok


@pytest.mark.parametrize("case", GOLDENS)
def test_checkpoints_written_by_transformers(tmp_path: Path, goldens: Path, case: str) -> None:
    """Every number of the source arrives, once: the sorted values of all tensors are the same."""
    source: dict[str, np.ndarray] = {}
    for file in (goldens / case).glob("*.safetensors"):
        source |= load_file(file)
    leaves = loaded(convert(goldens / case, tmp_path / "out"))

    def ordered(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return np.sort(np.concatenate([a.reshape(-1).astype(np.float32) for a in arrays.values()]))

    assert sum(a.size for a in leaves.values()) == sum(a.size for a in source.values())
    np.testing.assert_array_equal(ordered(leaves), ordered(source))
    np.testing.assert_array_equal(leaves["embed.weight"], source["model.embed_tokens.weight"])


def test_fused_experts_as_llama4_multiplies_them(tmp_path: Path, goldens: Path) -> None:
    """`Llama4TextExperts.forward` of transformers: gate, up = (x @ gate_up_proj[e]).chunk(2, -1)."""
    source = load_file(goldens / "llama4-text" / "model.safetensors")
    leaves = loaded(convert(goldens / "llama4-text", tmp_path / "out"))
    fused = source["model.layers.0.feed_forward.experts.gate_up_proj"]
    down = source["model.layers.0.feed_forward.experts.down_proj"]
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal(fused.shape[1], np.float32), rng.standard_normal(down.shape[1], np.float32)
    for e in range(len(fused)):
        gate, up = np.split(x @ fused[e], 2)
        for name, expected in (("gate", gate), ("up", up)):
            weight = leaves[f"layers.0.moe.experts.{name}_proj.weight"][e]
            np.testing.assert_allclose(weight @ x, expected, rtol=1e-4, atol=1e-5)
        weight = leaves["layers.0.moe.experts.down_proj.weight"][e]
        np.testing.assert_allclose(weight @ h, h @ down[e], rtol=1e-4, atol=1e-5)


def test_fused_experts_as_mixtral_keeps_them_in_memory(tmp_path: Path) -> None:
    """`MixtralExperts` of transformers 5: gate_up_proj [expert, 2 * mlp, embed], down_proj [expert, embed, mlp]."""
    leaves = random_leaves(config_from_hf(MIXTRAL))
    tensors = {n: a for n, a in hf_tensors(config_from_hf(MIXTRAL), leaves).items() if "block_sparse_moe" not in n}
    for i in range(2):
        moe, hf = f"layers.{i}.moe", f"model.layers.{i}.mlp"
        gate, up = (leaves[f"{moe}.experts.{n}_proj.weight"] for n in ("gate", "up"))
        tensors[f"{hf}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{hf}.experts.down_proj"] = leaves[f"{moe}.experts.down_proj.weight"]
        tensors[f"{hf}.gate.weight"] = leaves[f"{moe}.router.weight"]
    write_hf(tmp_path / "hf", MIXTRAL, tensors=tensors)
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_text_model_of_a_multimodal_checkpoint(tmp_path: Path, prefix: str) -> None:
    hf = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": LLAMA4}
    leaves = random_leaves(config_from_hf(hf))
    tensors = {}
    for name, array in hf_tensors(config_from_hf(hf), leaves).items():
        if prefix == "language_model.":
            tensors[prefix + name] = array
        else:
            tensors[prefix + name.removeprefix("model.") if name.startswith("model.") else name] = array
    for name in ("vision_model.patch.weight", "multi_modal_projector.linear_1.weight", "model.vision_tower.x.bias"):
        tensors[name] = np.zeros(3, np.float32)
    write_hf(tmp_path / "hf", hf, tensors=tensors)
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


def test_other_towers_are_unknown_in_a_text_model(tmp_path: Path) -> None:
    tensors = hf_tensors(config_from_hf(LLAMA), random_leaves(config_from_hf(LLAMA)))
    write_hf(tmp_path / "hf", LLAMA, tensors=tensors | {"vision_model.x": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"holds tensor vision_model\.x"):
        convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("case", ["without", "equal", "differs", "only head"])
def test_tied_embeddings(tmp_path: Path, case: str) -> None:
    hf = LLAMA | {"tie_word_embeddings": True}
    leaves = random_leaves(config_from_hf(hf))
    tensors = hf_tensors(config_from_hf(hf), leaves)
    embed = tensors["model.embed_tokens.weight"]
    if case != "without":
        tensors["lm_head.weight"] = embed + (case == "differs")
    if case == "only head":
        del tensors["model.embed_tokens.weight"]
    write_hf(tmp_path / "hf", hf, tensors=tensors)
    if case == "differs":
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            convert(tmp_path / "hf", tmp_path / "out")
    else:
        assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = hf_tensors(config_from_hf(LLAMA), leaves := random_leaves(config_from_hf(LLAMA)))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_hf(tmp_path / "hf", LLAMA, tensors=tensors)
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_dtype(tmp_path: Path, dtype: str) -> None:
    leaves = write_hf(tmp_path / "hf", LLAMA)
    path = convert(tmp_path / "hf", tmp_path / "out", dtype=dtype)
    assert_equal(path, {n: a.astype(DTYPES[dtype]) for n, a in leaves.items()})
    assert open_checkpoint(path).config.dtype == dtype


def test_bad_dtype(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    with pytest.raises(RequestError, match="int4"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="int4")


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    tensors = hf_tensors(config_from_hf(LLAMA), random_leaves(config_from_hf(LLAMA)))
    tensors["model.norm.weight"] = np.full(16, 7e4, np.float32)
    write_hf(tmp_path / "hf", LLAMA, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight holds 16 values that are too large for float16"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="float16")
    convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")


def test_licence_and_files(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    (tmp_path / "hf" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: none\n")
    (tmp_path / "hf" / "LICENSE").write_text("terms")
    (tmp_path / "hf" / "modeling_evil.py").write_text("raise SystemExit")
    path = convert(tmp_path / "hf", tmp_path / "out", name="org/name", revision="abc")
    source = open_checkpoint(path).source
    assert (source.kind, source.name, source.revision, source.licence) == (
        "huggingface",
        "org/name",
        "abc",
        "apache-2.0",
    )
    assert sorted(p.name for p in path.iterdir()) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "llama_jax.json",
        "model.lock.json",
        "params",
        "tokenizer.json",
    ]


def test_progress_counts_bytes(tmp_path: Path) -> None:
    leaves = write_hf(tmp_path / "hf", LLAMA)
    steps: list[tuple[int, int, str]] = []
    convert(tmp_path / "hf", tmp_path / "out", progress=lambda *s: steps.append(s))
    total = sum(a.nbytes for a in leaves.values())
    assert sorted(name for *_, name in steps) == sorted(leaves)
    assert [done for done, *_ in steps] == sorted(done for done, *_ in steps)
    assert steps[-1][:2] == (total, total)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_weights(tmp_path: Path, dtype: str, value: float) -> None:
    hf = LLAMA | {"dtype": dtype}
    tensors = hf_tensors(config_from_hf(hf), random_leaves(config_from_hf(hf)))
    bad = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    bad[3, 4] = bad[0, 0] = value
    write_hf(tmp_path / "hf", hf, tensors=tensors | {"model.layers.1.mlp.up_proj.weight": bad})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 2 values that are NaN or inf"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "hf", tmp_path / "out", allow_nonfinite=True)
    assert loaded(tmp_path / "out")["layers.1.mlp.up_proj.weight"].tobytes() == bad.tobytes()


@given(st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), max_size=50), st.sampled_from(sorted(DTYPES)))
def test_count_nonfinite(values: list[float], dtype: str) -> None:
    array = np.array(values, np.float32).astype(DTYPES[dtype])
    assert count_nonfinite(array) == int((~np.isfinite(array.astype(np.float32))).sum())


# --- sources that are wrong -------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def write_header(header: dict[str, Any] | bytes, data: bytes = b"") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)

    return write


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NORM = "model.norm.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (change_tensors(lambda t: t.pop(NORM)), r"lacks tensor model\.norm\.weight"),
    "unknown tensor": (change_tensors(lambda t: t.update(odd=t[NORM])), r"model\.safetensors holds tensor odd"),
    "bias without config": (
        change_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]})),
        r"self_attn\.q_proj\.bias",
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({NORM: t[NORM][:-1]})),
        r"model\.norm\.weight has shape \[15\], config\.json asks for \[16\]",
    ),
    "transposed weight": (
        change_tensors(lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)})),
        r"lm_head\.weight has shape \[16, 48\]",
    ),
    "wrong dtype": (change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})), r"has dtype F64"),
    "truncated data": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 10),
        "it is truncated",
    ),
    "truncated header": (lambda f: os.truncate(f / "model.safetensors", 40), "does not fit a file of 40"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty \(0 bytes\)"),
    "trailing bytes": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"12345"),
        "5 bytes follow the last tensor",
    ),
    "huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20), "does not fit"),
    "not UTF-8": (write_header(b"\xff\xfe{}"), "not valid JSON"),
    "deep JSON": (write_header(b"[" * 200_000), "not valid JSON"),
    "header is a list": (write_header(b"[]"), "not a JSON object"),
    "doubled name": (write_header(b'{"a": 1, "a": 2}'), "a name stands twice"),
    "negative size": (write_header({NORM: entry([-16], 0, 64)}, bytes(64)), "entry of tensor model.norm.weight"),
    "float size": (write_header({NORM: entry([16.0], 0, 64)}, bytes(64)), "entry of tensor model.norm.weight"),
    "boolean offset": (write_header({NORM: entry([0], False, 0)}), "entry of tensor model.norm.weight"),
    "unknown dtype": (write_header({NORM: entry([16], 0, 64, "F31")}, bytes(64)), "entry of tensor model.norm.weight"),
    "size and shape disagree": (write_header({NORM: entry([15], 0, 64)}, bytes(64)), "60 bytes, but takes up 64"),
    "shape overflows": (write_header({NORM: entry([2**40, 2**40], 0, 64)}, bytes(64)), "but takes up 64"),
    "gap": (write_header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "tensor b begins at byte"),
    "overlap": (write_header({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)), "tensor b begins at byte"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "broken generation config": (lambda f: (f / "generation_config.json").write_text("[1]"), "generation_config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sources_are_named(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    damage, message = WRONG[case]
    damage(tmp_path / "hf")
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as e:
        convert(tmp_path / "hf", tmp_path / "out")
    assert e.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


def outside(folder: Path, name: str) -> None:
    """Moves a shard out of the folder and makes the index point to it."""
    shard = "model-00002-of-00003.safetensors"
    (folder / shard).rename(folder.parent / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {t: name if f == shard else f for t, f in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def link_outside(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(folder.parent / "outside.safetensors")


def overlapping_shards(folder: Path) -> None:
    first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)


SHARDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "path with ..": (lambda f: outside(f, "../outside.safetensors"), "leads out of the folder"),
    "absolute path": (lambda f: outside(f, str(f.parent / "outside.safetensors")), "leads out of the folder"),
    "link out of the folder": (link_outside, "leads out of the folder"),
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "00002-of-00003.safetensors is missing",
    ),
    "truncated shard": (
        lambda f: os.truncate(f / "model-00003-of-00003.safetensors", 3000),
        "00003-of-00003.*truncated",
    ),
    "index promises too much": (
        edit_index(lambda i: i["weight_map"].update(odd="model-00001-of-00003.safetensors")),
        "lacks tensor odd, which",
    ),
    "tensor in two shards": (overlapping_shards, "stands both in"),
    "no weight_map": (edit_index(lambda i: i.pop("weight_map")), "no valid weight_map"),
    "weight_map of numbers": (edit_index(lambda i: i.update(weight_map={"a": 1})), "no valid weight_map"),
}


@pytest.mark.parametrize("case", SHARDED)
def test_wrong_shards_are_named(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=3)
    damage, message = SHARDED[case]
    damage(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out") and p.is_dir()]


def test_snapshots_of_the_hub_cache_are_links_to_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    leaves = write_hf(snapshot, LLAMA)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    assert_equal(convert(snapshot, tmp_path / "out"), leaves)


def test_experts_of_two_dtypes(tmp_path: Path) -> None:
    tensors = hf_tensors(config_from_hf(MIXTRAL), random_leaves(config_from_hf(MIXTRAL)))
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    write_hf(tmp_path / "hf", MIXTRAL, tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"{name} has dtype bfloat16, its sibling"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_destination(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(StorageError, match="exists"):
        convert(tmp_path / "hf", tmp_path / "out")
    new = write_hf(tmp_path / "hf2", LLAMA, seed=1)
    assert_equal(convert(tmp_path / "hf2", tmp_path / "out", overwrite=True), new)
    with pytest.raises(StorageError, match="not a checkpoint of llama_jax"):
        convert(tmp_path / "hf", tmp_path / "hf2", overwrite=True)
    assert (tmp_path / "hf2" / "model.safetensors").exists()


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file or folder"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedModel, match="a part of a model's folder"):
        convert(tmp_path / "weights.pth", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UnsupportedModel, match="not a GGUF file"):
        convert(tmp_path / "notes.txt", tmp_path / "out")
    write_hf(tmp_path / "hf", LLAMA)
    out = convert(tmp_path / "hf", tmp_path / "out")
    assert is_checkpoint(out)
    with pytest.raises(UnsupportedModel, match="converted checkpoint already"):
        convert(out, tmp_path / "out2")


@given(st.data())
def test_any_damage_of_a_safetensors_file_is_an_error_or_harmless(tmp_path_factory: Any, data: st.DataObject) -> None:
    """No exception but ours, and no read outside the file, whatever byte is changed and wherever the file ends."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}, folder / "x.safetensors"
    )
    raw = bytearray((folder / "x.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.safetensors").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        file = SafetensorsFile(folder / "x.safetensors")
    except LlamaJaxError:
        return
    for name, found in file.entries.items():
        out = np.empty(found.nbytes, np.uint8)
        file.read_into(name, out)
        assert out.tobytes() == bytes(raw[found.offset : found.offset + found.nbytes])
    file.close()


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    """With a mapped file this would kill the process."""
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 500)
    with pytest.raises(CheckpointError, match="ends within tensor a"):
        file.read_into("a", np.empty(1000, np.float32))
    file.close()
