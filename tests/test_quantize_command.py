"""`llama-jax quantize`, `load(weights=)`, `show` and `plan` of quantised models."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from test_convert_quantized import DATA
from tiny_chat_model import write_chat_model
from tiny_models import LLAMA, write_hf

from llama_jax.checkpoint import load_params, open_checkpoint, verify, write
from llama_jax.checkpoint.build import load_source
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.convert.export import export_gguf, export_hf
from llama_jax.convert.opening import open_source
from llama_jax.convert.verify import verify_source
from llama_jax.disk import size_text
from llama_jax.errors import RequestError
from llama_jax.layout import check
from llama_jax.loading import load
from llama_jax.model.fuse import fuse_params
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.params import flatten
from llama_jax.recipe import recipe
from llama_jax.targets import find


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("quantize") / "tiny", layers=2)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return convert(folder, folder.with_name("plain"))


def run(*args: object) -> Any:
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done


def test_the_same_as_in_memory(folder: Path, plain: Path, tmp_path: Path) -> None:
    """From the folder and from its checkpoint: what `quantize_params` makes, the rest in bfloat16; verified."""
    args = ("--weights", "int4", "--group", 8, "--ignore", "*.o_proj")
    done = run("quantize", folder, tmp_path / "a", *args, "--json")
    facts = json.loads(done.stdout)
    assert facts["weights"] == "int4_g8_min"
    assert 0.01 < facts["errors"]["layers.0.mlp.up_proj"] < 0.2
    assert "layers.1.attn.o_proj" not in facts["errors"]
    lines = run("quantize", plain, tmp_path / "b", *args).stderr
    assert "layers.1: error 0." in lines
    assert f"Converting {plain} ({size_text(open_checkpoint(plain).nbytes)}) to " in lines
    assert "Warning" not in lines
    config, wanted = open_checkpoint(plain).config, recipe("int4", group=8, ignore=["*.o_proj"])
    expected, stored = quantize_params(load_params(plain), config, wanted)
    for path, source in ((tmp_path / "a", folder), (tmp_path / "b", plain)):
        assert verify(path).ok
        assert verify_source(path, source).ok
        assert dict(open_checkpoint(path).config.schemes) == dict(stored.schemes)
        for name, leaf in flatten(load_params(path)).items():
            wanted_leaf = flatten(expected)[name]
            kept = wanted_leaf.dtype if name.rpartition(".")[2] != "weight" else jnp.bfloat16
            np.testing.assert_array_equal(leaf, wanted_leaf.astype(kept))


def test_what_was_stopped_resumes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is missing is quantised again; the result and its errors are those of one run."""
    wanted, whole, found = recipe("int8"), dict[str, float](), dict[str, float]()
    once = convert(folder, tmp_path / "once", recipe=wanted, quantised=whole.__setitem__)
    monkeypatch.setattr(write, "BATCH_BYTES", 1 << 12)

    def stop(done: int, total: int, name: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "twice", recipe=wanted, progress=stop)
    from llama_jax.convert import quantizing

    encoded = []
    original = quantizing.QuantizedSource._encoded
    monkeypatch.setattr(
        quantizing.QuantizedSource, "_encoded", lambda self, leaf: (encoded.append(leaf), original(self, leaf))[1]
    )
    twice = convert(folder, tmp_path / "twice", recipe=wanted, quantised=found.__setitem__)
    assert 0 < len(encoded) < len(whole)
    assert found == whole
    digests = [{name: info.digest for name, info in open_checkpoint(p).tensors.items()} for p in (once, twice)]
    assert digests[0] == digests[1]


def test_load(folder: Path, plain: Path, tmp_path: Path) -> None:
    """As it is stored, decoded, and quantised on the way; on a CPU decoded where nobody says."""
    path = convert(plain, tmp_path / "int8", recipe=recipe("int8"))
    stored, _ = load(path, weights="stored")
    decoded, _ = load(path)
    on_the_way, _ = load(folder, weights="int8")
    assert stored.params["layers"]["0"]["attn"]["qkv_proj"].keys() == {"int8", "scales"}
    assert not decoded.config.schemes
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(decoded.params))
    params, config = dequantize_params(load_params(path, dtype="float32"), open_checkpoint(path).config, "float32")
    for name, leaf in flatten(fuse_params(params, config)).items():
        np.testing.assert_array_equal(leaf, flatten(decoded.params)[name])
    for name in ("int8", "scales"):
        leaf = on_the_way.params["layers"]["1"]["mlp"]["down_proj"][name]
        np.testing.assert_array_equal(leaf, stored.params["layers"]["1"]["mlp"]["down_proj"][name])
    # What is quantised already is decoded first.
    again, _ = load(path, weights="int4_g8")
    assert dict(again.config.schemes)["layers.0.attn.q_proj"] == "int4_g8"
    with pytest.raises(RequestError, match="'int7' names no layout"):
        load(path, weights="int7")


@pytest.mark.parametrize("case", ["fp8-tensor", "ct-two-groups"])
def test_joint_projections_of_unequal_parts(case: str, tmp_path: Path) -> None:
    """A scale of each tensor becomes one of each row, so that projections join; unlike layouts stay apart."""
    path = convert(DATA / case, tmp_path / "m")
    config, params = open_checkpoint(path).config, load_params(path)
    attn = fuse_params(params, config)["layers"]["0"]["attn"]
    if case == "fp8-tensor":
        scales = np.asarray(attn["qkv_proj"]["scales"])
        assert len({scales[:, :-2].max(), scales[:, -2].max(), scales[:, -1].max()}) > 1
    layouts = {scheme for leaf, scheme in config.schemes if ".attn." in leaf and "o_proj" not in leaf}
    assert ("qkv_proj" in attn) == (len(layouts) == 1)


def test_scales_keep_their_dtype(tmp_path: Path) -> None:
    """Whatever the model computes in: a head cast without its scales would be noise."""
    path = convert(DATA / "gptq-int4", tmp_path / "m")
    params = load_params(path, dtype="bfloat16")
    leaf = params["layers"]["0"]["mlp"]["up_proj"]
    assert (leaf["scales"].dtype, leaf["zeros"].dtype) == (jnp.float32, jnp.int8)
    assert params["final_norm"]["weight"].dtype == jnp.bfloat16


def test_exports_decode(plain: Path, tmp_path: Path) -> None:
    path = convert(plain, tmp_path / "fp8", recipe=recipe("fp8", lm_head="bf16"), dtype="float32")
    export_hf(path, tmp_path / "hf")
    back = convert(tmp_path / "hf", tmp_path / "back")
    params, _ = dequantize_params(load_params(path), open_checkpoint(path).config, "float32")
    for name, leaf in flatten(load_params(back)).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name])


@pytest.mark.parametrize(("weights", "kind"), [("int4_g32_min", "q4_1"), ("int8_g32", "q8_0")])
def test_gguf_has_the_same_codes(weights: str, kind: str, tmp_path: Path) -> None:
    """Also those of HQQ, which need not fill the range. In Hugging Face's folders they are decoded in float32."""
    write_hf(tmp_path / "hf", LLAMA | {"hidden_size": 32, "intermediate_size": 64})
    (tmp_path / "hf" / "tokenizer.json").unlink()
    path = convert(
        tmp_path / "hf", tmp_path / "q", recipe=recipe(weights, lm_head=weights, embed=weights, method="hqq")
    )
    assert export_gguf(path, tmp_path / "m.gguf").dtype == kind
    export_hf(path, tmp_path / "floats", dtype="float32")
    expected = flatten(load_params(path))
    with closing(open_source(tmp_path / "m.gguf", dequantize=False)) as source:
        schemes, found = dict(source.config.schemes), flatten(load_source(source))
    assert schemes["layers.0.attn.q_proj"] == weights
    for name, leaf in expected.items():
        if schemes.get(name.rpartition(".")[0]) == weights:
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    floats, _ = dequantize_params(load_params(path), open_checkpoint(path).config, "float32")
    back = flatten(load_params(convert(tmp_path / "floats", tmp_path / "back")))
    leaf = "layers.0.attn.q_proj.weight"
    np.testing.assert_array_equal(back[leaf], flatten(floats)[leaf])


def test_show_and_plan(plain: Path, tmp_path: Path) -> None:
    path = convert(plain, tmp_path / "m", recipe=recipe("int4", group=8, lm_head="bf16"))
    facts = json.loads(run("show", path, "--json").stdout)
    assert any("int4 in groups of 8, with minima" in how for how in facts["weights"])
    assert facts["bytes"] == open_checkpoint(path).nbytes == facts["memory_bytes"]["bfloat16"]
    source = json.loads(run("show", DATA / "awq", "--json").stdout)
    assert source["weights"][0].endswith("int4 in groups of 32, with zeros")
    planned = json.loads(run("plan", path, "--target", "mi300x", "--json").stdout)
    assert planned["memory"]["weights"] == facts["bytes"]
    anew = json.loads(run("plan", plain, "--target", "mi300x", "--weights", "int4", "--group", "8", "--json").stdout)
    assert anew["memory"]["weights"] < planned["memory"]["weights"]
    refused = CliRunner().invoke(cli, ["plan", str(plain), "--target", "mi300x", "--group", "8"])
    assert refused.exit_code == 2


@pytest.mark.slow
def test_70b_on_two_cards_of_24_gb() -> None:
    args = ("--target", "rx7900xtx", "--devices", 2, "--weights", "int4", "--embed", "int8", "--memory-fraction", 0.9)
    facts = json.loads(run("plan", "llama-3.1-70b", *args, "--json").stdout)
    # 80 layers of 855,638,016 weights in 4.5 bits, embedding and head in 8, scales of rows, norms in 16.
    bits = 80 * 855_638_016 * 4.5 + 2 * 128_256 * (8192 * 8 + 32) + 161 * 8192 * 16
    split = 161 * 8192 * 16  # norms are whole on each device
    assert facts["memory"]["weights"] == (bits - split) / 16 + split / 8
    assert facts["fits"]


@pytest.mark.slow
def test_8b_in_8_gb() -> None:
    """A cache of 8192 tokens in int8, and all of it; in bfloat16 the weights alone take twice as much."""
    args = ("--target", "rx7900xtx", "--context", 8192, "--memory-fraction", 8e9 / find("rx7900xtx").memory)
    small = ("--weights", "int4", "--embed", "int8", "--kv-dtype", "int8")
    facts = json.loads(run("plan", "llama-3.1-8b", *args, *small, "--json").stdout)
    assert facts["fits"]
    assert 6e9 < facts["memory"]["peak"] < 6.5e9
    assert CliRunner().invoke(cli, ["plan", "llama-3.1-8b", *map(str, args)]).exit_code == 6


def test_groups_that_a_split_would_cut() -> None:
    """Of 11008 inputs in groups of 128, four devices would have 21.5 groups each."""
    from llama_jax.config import preset

    config = preset("llama-2-7b")
    stored = config.replace(schemes=(("layers.0.mlp.down_proj", "int4_g128"),))
    with pytest.raises(RequestError, match=r"128 of its 11008 .*2752 each, 21\.5 groups"):
        check(stored, {"tensor": 4})
    check(stored.replace(schemes=(("layers.0.mlp.down_proj", "int4_g64"),)), {"tensor": 4})
