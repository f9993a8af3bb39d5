"""Quantised sources that keep their precision: the same numbers as decoded ones, to the bit, in fewer bytes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from test_convert_quantized import DATA, LABELS
from tiny_models import LLAMA, write_gguf

from llama_jax.checkpoint import load_params, open_checkpoint, verify
from llama_jax.checkpoint.build import load_source
from llama_jax.checkpoint.source import ModelSource
from llama_jax.convert import convert
from llama_jax.convert.export.gguf import export_gguf
from llama_jax.convert.gguf_layouts import EXACT, blocks, layout_of, members
from llama_jax.convert.opening import open_model, open_source
from llama_jax.convert.verify import verify_source
from llama_jax.params import canonical_specs, flatten
from llama_jax.quantized import codes, nearest
from llama_jax.recipe import recipe
from llama_jax.schemes import scheme_named

KEPT = {
    "awq": {"int4_g32_zero"},
    "bnb-int8": {"int8"},
    "ct-fp8-block": {"fp8_g32"},
    "ct-fp8-channel": {"fp8"},
    "ct-fp8-tensor": {"fp8"},
    "ct-int4-group": {"int4_g32"},
    "ct-int4-group-asymmetric": {"int4_g32_zero"},
    "ct-int3-channel-asymmetric": {"int4_zero"},
    "ct-int8-channel": {"int8"},
    "ct-int8-tensor-asymmetric": {"int8_zero"},
    "ct-two-groups": {"int4_g32", "int8"},
    "fbgemm-fp8": {"fp8"},
    "fp8-block": {"fp8_g16"},
    "fp8-tensor": {"fp8"},
    "gptq-int2": {"int4_g16_zero"},
    "gptq-int3": {"int4_g32_zero"},
    "gptq-int4": {"int4_g32_zero"},
    "gptq-int4-act-order": {"int4_g32_zero_ordered"},
    "gptq-int8": {"int8_zero"},
}
"""Layouts of what is kept; other cases are decoded, and say so."""


def decoded(source: ModelSource) -> dict[str, np.ndarray]:
    """Every leaf by its name in Hugging Face's files, in the config's dtype, as a device decodes it."""
    leaves, schemes, found = flatten(load_source(source)), dict(source.config.schemes), {}
    for spec in canonical_specs(source.config):
        leaf = leaves.get(spec.name)
        if leaf is None:
            scheme = scheme_named(schemes[spec.leaf])
            leaf = scheme.decode({name: leaves[f"{spec.leaf}.{name}"] for name in scheme.members}, source.config.dtype)
        found[spec.hf] = np.asarray(leaf)
    return found


@pytest.mark.parametrize("case", LABELS)
def test_weights_are_those_of_the_library(case: str) -> None:
    """Bit for bit, by the digests of what the libraries that define the formats decode."""
    expected = json.loads((DATA / case / "expected.json").read_text())
    with closing(open_source(DATA / case, dequantize=False)) as source:
        kinds = {re.sub("_b?f[0-9]+", "", name) for _, name in source.config.schemes}
        found = decoded(source)
        notes = " ".join(source.notes)  # type: ignore[attr-defined]
    assert kinds == KEPT.get(case, set())
    assert ("Decoded to" in notes) == (case not in KEPT)
    assert {name: hashlib.sha256(a.tobytes()).hexdigest()[:16] for name, a in found.items()} == expected


@pytest.mark.parametrize("case", ["awq", "ct-int4-group", "fp8-block"])
def test_checkpoints_keep_them(case: str, tmp_path: Path) -> None:
    """Converted, verified against the source, and a new quantisation of it."""
    told: list[str] = []
    kept = convert(DATA / case, tmp_path / "kept", notify=told.append)
    plain = convert(DATA / case, tmp_path / "plain", dequantize=True)
    assert open_checkpoint(kept).nbytes < open_checkpoint(plain).nbytes
    assert not open_checkpoint(plain).config.schemes
    for path in (kept, plain):
        assert verify(path).ok
        assert verify_source(path, DATA / case).ok
    assert not verify_source(plain, DATA / "fp8-tensor").ok
    again = decoded(open_model(kept))
    for name, weight in decoded(open_model(plain)).items():
        np.testing.assert_array_equal(again[name], weight)
    floats = flatten(load_source(open_model(kept, dequantize=True)))
    assert floats["layers.0.mlp.up_proj.weight"].dtype == jnp.float32
    anew = convert(kept, tmp_path / "anew", recipe=recipe("int8"))
    assert verify_source(anew, kept).ok
    assert dict(open_checkpoint(anew).config.schemes)["layers.0.mlp.up_proj"] == "int8"


MEASURED = """
import resource, sys
from pathlib import Path
from llama_jax.checkpoint import write
from llama_jax.convert import convert, leaves

leaves.AHEAD_BYTES = write.BATCH_BYTES = int(sys.argv[3])
convert(Path(sys.argv[1]), Path(sys.argv[2]) / "warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[4]), Path(sys.argv[2]) / "large")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_of_a_conversion_is_that_of_a_layer(tmp_path: Path) -> None:
    """Four layers with a quarter of Llama-3.1-70B's widths, in GPTQ's act order: less than one layer in bfloat16."""
    hidden, width, kv = 2048, 7168, 256
    hf = json.loads((DATA / "gptq-int4-act-order" / "config.json").read_text())
    hf |= {"hidden_size": hidden, "intermediate_size": width, "num_attention_heads": 16, "head_dim": 128}
    hf |= {"num_key_value_heads": kv // 128, "num_hidden_layers": 4, "vocab_size": 64}
    hf["quantization_config"]["group_size"] = 128
    attn = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shapes = {f"self_attn.{name}": shape for name, shape in attn.items()}
    shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    rng, one = np.random.default_rng(0), np.ones(hidden, np.float16)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((64, hidden)).astype(np.float16)}
    tensors["model.norm.weight"] = one
    for i in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = one
        for name, (out, inner) in shapes.items():
            stem, groups = f"model.layers.{i}.{name}", inner // 128
            tensors[f"{stem}.qweight"] = rng.integers(-(2**31), 2**31, (inner // 8, out), np.int32)
            tensors[f"{stem}.qzeros"] = rng.integers(-(2**31), 2**31, (groups, out // 8), np.int32)
            tensors[f"{stem}.scales"] = np.full((groups, out), 0.01, np.float16)
            tensors[f"{stem}.g_idx"] = rng.permutation(np.arange(inner, dtype=np.int32) // 128)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    layer = 2 * sum(out * inner for out, inner in shapes.values())
    args = [DATA / "gptq-int4-act-order", tmp_path / "out", 1 << 24, folder]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < layer
    stored = open_checkpoint(tmp_path / "out" / "large")
    assert set(dict(stored.config.schemes).values()) == {"int4_g128_zero_ordered"}
    assert stored.nbytes < 0.27 * 4 * layer + 2**20


WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True}

MIXTURE = WIDE | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


GGUF_KEPT = {
    Kind.Q4_0: "int4_g32",
    Kind.Q4_1: "int4_g32_min",
    Kind.Q5_0: "int8_g32",
    Kind.Q5_1: "int8_g32_min",
    Kind.Q8_0: "int8_g32",
    Kind.Q2_K: "int4_g16_min_f32",
    Kind.Q3_K: "int4_g16_f32",
    Kind.Q4_K: "int4_g32_min_f32",
    Kind.Q5_K: "int8_g32_min_f32",
    Kind.Q6_K: "int8_g16_f32",
    Kind.MXFP4: "int8_g32_bf16",
}


@pytest.mark.parametrize("kind", GGUF_KEPT, ids=lambda kind: kind.name)
def test_codes_of_gguf_are_the_packages(kind: Kind) -> None:
    """To the bit, with every code, scale and minimum that a block can have."""
    rng, (block, size) = np.random.default_rng(kind), gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (64, 3 * size), np.uint8)
    layout = layout_of(kind)
    assert layout is not None
    assert layout.name == GGUF_KEPT[kind]
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    stored = members(raw, kind)
    found = np.asarray(codes.decode(layout, {name: jnp.asarray(m) for name, m in stored.items()}, jnp.float32))
    assert found.shape == (64, 3 * block)
    assert {name: m.dtype for name, m in stored.items()} == {
        name: m.dtype for name, m in nearest.encode(layout, jnp.zeros((1, block))).items()
    }
    # XLA on a CPU has no subnormal numbers.
    normal = np.isfinite(expected) & (np.abs(expected) >= 2.0**-100)
    assert normal.mean() > 0.5
    np.testing.assert_array_equal(found[normal], expected[normal])
    if kind in EXACT:
        np.testing.assert_array_equal(blocks(stored, kind), raw)


@pytest.mark.usefixtures("without_tokenizer")
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("hf", [WIDE, MIXTURE], ids=["dense", "experts"])
def test_gguf(kind: Kind, hf: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the gguf package decodes them, rows of rotated heads in our order, stacks of experts among them; and back."""
    write_gguf(tmp_path / "m.gguf", hf, quantisation=kind)
    with closing(open_source(tmp_path / "m.gguf")) as source:
        plain = decoded(source)
    name = {Kind.Q4_0: "int4_g32", Kind.Q4_1: "int4_g32_min", Kind.Q8_0: "int8_g32"}[kind]
    with closing(open_source(tmp_path / "m.gguf", dequantize=False)) as source:
        kept = {leaf for leaf, stored in source.config.schemes if stored == name}
        assert {"layers.0.attn.q_proj", "layers.1.attn.k_proj"} <= kept
        for leaf, weight in decoded(source).items():
            np.testing.assert_array_equal(weight, plain[leaf])
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert load_params(path, dtype="bfloat16")["layers"]["0"]["attn"]["q_proj"]["scales"].dtype == jnp.float16
    bits = 8 * gguf.GGML_QUANT_SIZES[kind][1] / 32
    q_proj = [info for n, info in open_checkpoint(path).tensors.items() if n.startswith("layers.0.attn.q_proj")]
    assert 8 * sum(info.nbytes for info in q_proj) == bits * 64 * 64
    monkeypatch.setattr("llama_jax.convert.export.gguf.tokenizer_metadata", lambda *_: ({}, []))
    assert export_gguf(path, tmp_path / "back.gguf").dtype == kind.name.lower()
    before, after = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{x}.gguf").tensors} for x in ("m", "back"))
    for n, tensor in before.items():
        if tensor.tensor_type == kind and "gate_inp" not in n:  # routers are exported in float32
            assert (after[n].tensor_type, after[n].data.tobytes()) == (kind, tensor.data.tobytes()), n
