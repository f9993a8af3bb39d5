"""Meta's checkpoints: numbers as Meta's forward pass has them, configurations as on the hub, everything wrong named."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA, loaded, random_leaves, write_gguf
from torch_writer import torch_save

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.config import LlamaConfig, config_from_hf
from llama_jax.config.presets import preset
from llama_jax.convert import convert, meta, meta_tokenizer
from llama_jax.convert.meta_config import config_dict
from llama_jax.convert.opening import open_source
from llama_jax.errors import CheckpointError, LlamaJaxError, TemplateError, TokenizerError, UnsupportedModel
from llama_jax.library import resolve
from llama_jax.measure import verification
from llama_jax.params import param_specs
from llama_jax.text import chat
from llama_jax.text.tokenizer import load_tokenizer

CASES = [("llama2", 1), ("llama2", 2), ("llama2", 4), ("llama3.1", 2), ("llama3.2", 1)]


FEW_PIECES = Path(__file__).parent / "data" / "tokenizer" / "few_pieces.model"
"""The first 40 pieces of sentencepiece.model that are single characters: no model here has fewer rows."""


@pytest.fixture(scope="session")
def sentencepiece() -> Path:
    return FEW_PIECES


@pytest.fixture
def stored(tmp_path: Path, data: Path, sentencepiece: Path) -> Callable[[str, int], Path]:
    """Puts a stored case together as Meta's folder would be."""

    def make(case: str, shards: int) -> Path:
        folder = tmp_path / case
        shutil.copytree(data / "meta" / case / str(shards), folder)
        shutil.copy(data / "meta" / case / "params.json", folder)
        tokenizer = sentencepiece if case == "llama2" else data / "meta" / "tokenizer.model"
        shutil.copy(tokenizer, folder / "tokenizer.model")
        return folder

    return make


def agrees(path: Path, expected: Path) -> None:
    """The checkpoint's numbers are the expected ones."""
    inputs = verification.read_inputs(expected)
    computed = verification.compute(load_params(path, dtype="float32"), open_checkpoint(path).config, inputs)
    result = verification.compare(computed, inputs, expected)
    assert result.ok, result.reasons
    assert result.greedy_match


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("case", "shards"), CASES)
def test_numbers_are_those_of_metas_forward_pass(
    tmp_path: Path, data: Path, stored: Callable[[str, int], Path], case: str, shards: int
) -> None:
    path = convert(stored(case, shards), tmp_path / "out")
    agrees(path, data / "meta" / case / "expected.npz")
    opened = open_checkpoint(path)
    assert opened.dtype == ("float16" if case == "llama2" else "bfloat16")
    assert opened.config.tie_word_embeddings == (case == "llama3.2")
    assert opened.config.rope.factor == {"llama2": 1, "llama3.1": 8, "llama3.2": 32}[case]
    assert (opened.source.kind, opened.source.name) == ("meta", case)


META_NAMES = {
    "attn_norm": "attention_norm",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.o_proj": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "final_norm": "norm",
    "lm_head": "output",
    "embed": "tok_embeddings",
}


def write_meta(
    folder: Path,
    config: LlamaConfig,
    leaves: Mapping[str, np.ndarray],
    tokenizer: Path,
    *,
    shards: int = 1,
    embed_axis: int = 1,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Writes canonical leaves in Meta's layout: pairs of rope side by side, matrices cut as its layers cut them."""
    folder.mkdir()
    width = config.layers[0].mlp
    assert isinstance(width, int)
    base = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "vocab_size": -1,
        "multiple_of": width,
        "ffn_dim_multiplier": 0.5 * width / (8 * config.hidden_size // 3),
    }
    (folder / "params.json").write_text(json.dumps(base | dict(params or {})))
    if tokenizer.exists():
        shutil.copy(tokenizer, folder / "tokenizer.model")
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(shards)]
    for name, leaf in leaves.items():
        if name.startswith("layers."):
            _, i, short = name.removesuffix(".weight").split(".", 2)
            layer = f"layers.{i}."
        else:
            layer, short = "", name.removesuffix(".weight")
        if short in ("attn.q_proj", "attn.k_proj"):
            heads = config.num_heads if short == "attn.q_proj" else config.num_kv_heads
            leaf = np.stack(np.split(leaf.reshape(heads, -1, leaf.shape[1]), 2, 1), 2).reshape(leaf.shape)
        axis = {"attn.o_proj": 1, "mlp.down_proj": 1, "embed": embed_axis}.get(short, 0)
        for part, piece in zip(parts, [leaf] * shards if leaf.ndim == 1 else np.split(leaf, shards, axis), strict=True):
            part[f"{layer}{META_NAMES[short]}.weight"] = np.ascontiguousarray(piece)
    for rank, part in enumerate(parts):
        torch_save(part, folder / f"consolidated.{rank:02}.pth")


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("embed_axis", [0, 1])
def test_a_golden_model_in_metas_layout(
    tmp_path: Path,
    goldens: Path,
    sentencepiece: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    embed_axis: int,
) -> None:
    monkeypatch.setattr(meta, "_BLOCK_BYTES", 1000)  # several blocks even of these small matrices
    expected = loaded(convert(goldens / "llama2-mha", tmp_path / "hf"))
    config = open_checkpoint(tmp_path / "hf").config
    write_meta(tmp_path / "m", config, expected, sentencepiece, shards=shards, embed_axis=embed_axis)
    path = convert(tmp_path / "m", tmp_path / "out")
    found = loaded(path)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    # Everything but what the golden's config.json says otherwise than Llama 2's.
    assert open_checkpoint(path).config == config.replace(max_position_embeddings=4096, pad_token_id=None)
    if shards == 2 and embed_axis == 1:
        agrees(path, goldens / "llama2-mha" / "expected.npz")


TINY = config_from_hf(LLAMA | {"head_dim": 4})


def write_tiny(folder: Path, tokenizer: Path, *, leaves: Mapping[str, np.ndarray] | None = None, **kwargs: Any) -> None:
    write_meta(folder, TINY, leaves or random_leaves(TINY), tokenizer, **kwargs)


def edit_shard(folder: Path, rank: int, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Rewrites a shard after a change of its tensors."""
    path = folder / f"consolidated.{rank:02}.pth"
    file = meta.TorchFile(path)
    tensors = {}
    for name, entry in file.entries.items():
        tensors[name] = np.empty(entry.shape, meta.DTYPES[entry.dtype])
        file.read_into(name, tensors[name])
    file.close()
    change(tensors)
    torch_save(tensors, path)


def share_output(tensors: dict[str, np.ndarray]) -> None:
    tensors["output.weight"] = tensors["tok_embeddings.weight"]


TIED: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], bool]] = {
    "no output": (lambda t: t.pop("output.weight"), True),
    "one storage": (share_output, True),
    "a copy": (lambda t: t.update({"output.weight": t["tok_embeddings.weight"].copy()}), True),
    "its own": (lambda t: None, False),
    "but for one bit": (
        lambda t: t.update({"output.weight": np.nextafter(t["tok_embeddings.weight"], np.float32(9))}),
        False,
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings(tmp_path: Path, sentencepiece: Path, case: str) -> None:
    change, tied = TIED[case]
    write_tiny(tmp_path / "m", sentencepiece, params={"use_scaled_rope": True})
    edit_shard(tmp_path / "m", 0, change)
    config = open_checkpoint(convert(tmp_path / "m", tmp_path / "out")).config
    assert config.tie_word_embeddings == tied
    assert config.rope.factor == (32.0 if tied else 8.0)


def test_frequencies_in_old_files_are_left_out(tmp_path: Path, sentencepiece: Path) -> None:
    write_tiny(tmp_path / "m", sentencepiece)
    buffers = {
        "rope.freqs": np.ones(2, np.float32),
        "layers.1.attention.inner_attention.rope.freqs": np.ones(2, np.float32),
    }
    edit_shard(tmp_path / "m", 0, lambda t: t.update(buffers))
    assert loaded(convert(tmp_path / "m", tmp_path / "out")).keys() == random_leaves(TINY).keys()


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no shard": (lambda f: [p.unlink() for p in f.glob("*.pth")], r"no consolidated\.00\.pth"),
    "first shard missing": (lambda f: (f / "consolidated.00.pth").unlink(), r"consolidated\.00\.pth is missing"),
    "shard missing": (
        lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"),
        r"consolidated\.01\.pth is missing",
    ),
    "last shard missing": (lambda f: (f / "consolidated.01.pth").unlink(), "tok_embeddings.weight has shape"),
    "shard too many": (
        lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.02.pth"),
        "tok_embeddings.weight has shape",
    ),
    "shard damaged": (
        lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:-100]),
        r"consolidated\.01\.pth: the zip directory",
    ),
    "shard elsewhere": (
        lambda f: (
            (f / "consolidated.01.pth").rename(f.parent / "x.pth")
            and (f / "consolidated.01.pth").symlink_to(f.parent / "x.pth")
        ),
        "leads out of the folder",
    ),
    "tensor missing": (
        lambda f: edit_shard(f, 1, lambda t: t.pop("layers.1.attention.wq.weight")),
        r"consolidated\.01\.pth lacks tensor layers\.1\.attention\.wq\.weight",
    ),
    "tensor unknown": (
        lambda f: edit_shard(f, 0, lambda t: t.update({"layers.0.attention.wq.bias": np.ones(16, np.float32)})),
        r"consolidated\.00\.pth holds tensor layers\.0\.attention\.wq\.bias",
    ),
    "no embedding": (
        lambda f: edit_shard(f, 0, lambda t: t.pop("tok_embeddings.weight")),
        r"lacks tensor tok_embeddings\.weight",
    ),
    "embedding of one dimension": (
        lambda f: edit_shard(f, 0, lambda t: t.update({"tok_embeddings.weight": np.ones(16, np.float32)})),
        r"tok_embeddings\.weight has shape \[16\]",
    ),
    "no output in one shard": (
        lambda f: edit_shard(f, 1, lambda t: t.pop("output.weight")),
        r"consolidated\.01\.pth lacks tensor output\.weight",
    ),
    "shape": (
        lambda f: edit_shard(f, 1, lambda t: t.update({"norm.weight": np.ones(8, np.float32)})),
        r"consolidated\.01\.pth: tensor norm\.weight has shape \[8\].*asks for \[16\]",
    ),
    "dimensions": (
        lambda f: edit_shard(f, 1, lambda t: t.update({"norm.weight": np.ones((16, 1), np.float32)})),
        r"tensor norm\.weight has shape \[16, 1\]",
    ),
    "dtype": (
        lambda f: edit_shard(f, 1, lambda t: t.update({"norm.weight": np.ones(16, np.float16)})),
        r"consolidated\.01\.pth: tensor norm\.weight has dtype F16, in consolidated\.00\.pth F32",
    ),
    "not finite": (
        lambda f: edit_shard(f, 0, lambda t: t.update({"norm.weight": np.full(16, np.nan, np.float32)})),
        "final_norm.weight holds 16 values",
    ),
    "params of another model": (lambda f: edit_params(f, {"n_layers": 3}), "lacks tensor layers.2"),
    "width of another model": (lambda f: edit_params(f, {"multiple_of": 7}), "feed_forward.w1.weight has shape"),
    "size of another model": (lambda f: edit_params(f, {"dim": 32}), r"asks for|params\.json"),
    "vocabulary": (lambda f: edit_params(f, {"vocab_size": 47}), "vocab_size=47, the embedding has 48"),
    "params missing": (lambda f: (f / "params.json").unlink(), "params.json is missing"),
    "params broken": (lambda f: (f / "params.json").write_text("{"), "params.json is not valid JSON"),
    "params no object": (lambda f: (f / "params.json").write_text("[]"), "params.json does not hold"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.model"),
    "large tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(bytes(9 << 20)), "9,437,184 bytes"),
    "tokenizer of Llama 3": (
        lambda f: shutil.copy(Path(__file__).parent / "data" / "meta" / "tokenizer.model", f),
        "384 tokens and 256 control tokens, the model 48",
    ),
}


def edit_params(folder: Path, change: Mapping[str, Any]) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(change)))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_named(tmp_path: Path, sentencepiece: Path, case: str) -> None:
    write_tiny(tmp_path / "m", sentencepiece, shards=2)
    damage, message = WRONG[case]
    damage(tmp_path / "m")
    with pytest.raises((CheckpointError, UnsupportedModel, TokenizerError), match=message) as e:
        convert(tmp_path / "m", tmp_path / "out")
    assert e.value.hint
    assert not (tmp_path / "out").exists()


def test_weights_that_are_integers_are_named(tmp_path: Path, sentencepiece: Path) -> None:
    write_tiny(tmp_path / "m", sentencepiece)
    path = tmp_path / "m" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content.replace(b"torch\nFloatStorage", b"torch\nIntStorage"))
    with pytest.raises(UnsupportedModel, match="has dtype I32"):
        convert(tmp_path / "m", tmp_path / "out")


def test_found_by_name(tmp_path: Path, sentencepiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path / "m", sentencepiece)
    first = resolve(tmp_path / "m", notify=lambda _: None)
    assert open_checkpoint(first).source.kind == "meta"
    assert resolve(tmp_path / "m", notify=lambda _: None) == first
    edit_shard(tmp_path / "m", 0, lambda t: t.update({"norm.weight": np.ones(16, np.float32)}))
    assert resolve(tmp_path / "m", notify=lambda _: None) != first
    # Beside config.json it is a Hugging Face folder, beside a GGUF file alone params.json says nothing.
    write_gguf(tmp_path / "m" / "m.gguf", LLAMA)
    monkeypatch.setattr("llama_jax.convert.gguf_tokenizer.tokenizer_files", lambda metadata: {})
    assert open_checkpoint(resolve(tmp_path / "m", notify=lambda _: None)).source.kind == "gguf"
    (tmp_path / "m" / "m.gguf").unlink()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        convert(tmp_path / "m", tmp_path / "out")


# --- params.json ------------------------------------------------------------------------------------------------------


def params(dim: int, layers: int, heads: int, **keys: Any) -> dict[str, Any]:
    return {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "norm_eps": 1e-5,
        "vocab_size": -1,
        "multiple_of": 256,
    } | keys


GQA70 = {"n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
CODE = {"rope_theta": 1000000.0, "ffn_dim_multiplier": 1.0}
LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True}
GQA8 = {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}
# The params.json of each download; what is left out is absent there.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-1-7b": params(4096, 32, 32, norm_eps=1e-6),
    "llama-1-13b": params(5120, 40, 40, norm_eps=1e-6),
    "llama-1-30b": params(6656, 60, 52, norm_eps=1e-6),
    "llama-1-65b": params(8192, 80, 64),
    "llama-2-7b": params(4096, 32, 32),
    "llama-2-13b": params(5120, 40, 40),
    "llama-2-70b": params(8192, 80, 64) | GQA70,
    "codellama-7b": params(4096, 32, 32) | CODE,
    "codellama-13b": params(5120, 40, 40) | CODE,
    "codellama-34b": params(8192, 48, 64, n_kv_heads=8) | CODE,
    "codellama-70b": params(8192, 80, 64, rope_theta=1000000) | GQA70,
    "llama-3-8b": params(4096, 32, 32) | LLAMA3 | GQA8,
    "llama-3-70b": params(8192, 80, 64) | LLAMA3 | GQA70,
    "llama-3.1-8b": params(4096, 32, 32) | LLAMA31 | GQA8,
    "llama-3.1-70b": params(8192, 80, 64) | LLAMA31 | GQA70,
    "llama-3.1-405b": params(16384, 126, 128) | LLAMA31 | {"multiple_of": 4096, "ffn_dim_multiplier": 1.2},
    "llama-3.2-1b": params(2048, 16, 32) | LLAMA31 | {"ffn_dim_multiplier": 1.5},
    "llama-3.2-3b": params(3072, 28, 24) | LLAMA31 | {"ffn_dim_multiplier": 1.0},
}


def read_params(found: Mapping[str, Any], **changes: Any) -> LlamaConfig:
    facts: dict[str, Any] = {"vocab_size": 128, "tied": False, "dtype": "float32", "bos": 1, "byte_level": False}
    return config_from_hf(config_dict(found, **facts | changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_are_those_of_the_hub(name: str) -> None:
    expected = preset(name)
    facts = {"vocab_size": expected.vocab_size, "tied": expected.tie_word_embeddings, "dtype": expected.dtype}
    byte_level = name.startswith("llama-3")
    bos = 128000 if byte_level else 1
    assert read_params(PUBLISHED[name], **facts, byte_level=byte_level, bos=bos) == expected


SMALL = params(64, 2, 4)
BAD_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "dim missing": ({"dim": None}, "dim is missing"),
    "dim text": ({"dim": "64"}, "dim must be an integer"),
    "dim bool": ({"dim": True}, "dim must be an integer"),
    "dim huge": ({"dim": 10**400}, "dim must be an integer"),
    "dim odd": ({"dim": 66}, "multiple of n_heads=4"),
    "heads": ({"n_heads": 0}, "n_heads must be"),
    "kv heads": ({"n_kv_heads": 3}, "n_kv_heads must be a divisor of n_heads=4"),
    "layers": ({"n_layers": 10**6}, "n_layers must be"),
    "negative layers": ({"n_layers": -1}, "n_layers must be"),
    "epsilon": ({"norm_eps": float("nan")}, "norm_eps must be"),
    "no epsilon": ({"norm_eps": None}, "norm_eps is missing"),
    "theta": ({"rope_theta": float("inf")}, "rope_theta must be"),
    "theta 1": ({"rope_theta": 1.0}, "rope_theta must be"),
    "multiple": ({"multiple_of": 0}, "multiple_of must be"),
    "multiple huge": ({"multiple_of": 2**31 - 1, "ffn_dim_multiplier": 1e6}, "narrower than"),
    "multiplier": ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier must be"),
    "multiplier huge": ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier must be"),
    "scaled": ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false"),
    "factor": ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "rope_scaling_factor must be"),
    "vocabulary": ({"vocab_size": 0}, "vocab_size=0"),
    "vocabulary text": ({"vocab_size": "many"}, "vocab_size must be"),
    "experts": ({"moe_args": {"num_experts": 16}}, "moe_args.*Llama 4"),
    "quantised": ({"quantization_args": {"scheme": "int4"}}, "quantization_args.*bfloat16"),
    "adapters": ({"lora_args": {"rank": 16}}, "lora_args"),
    "vision": ({"vision_chunk_size": 448}, "vision_chunk_size.*vision"),
    "head size": ({"head_dim": 128}, "head_dim"),
    "unknown": ({"new_feature": [1]}, "new_feature"),
    "long name": ({"x" * 10**6: 1}, "xxx"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params_are_named(case: str) -> None:
    change, message = BAD_PARAMS[case]
    with pytest.raises((UnsupportedModel, CheckpointError), match=message) as e:
        read_params(SMALL | change)
    assert e.value.hint
    assert len(str(e.value)) < 600


def test_params_that_change_nothing() -> None:
    neutral = {
        "max_seq_len": 2048,
        "max_batch_size": 32,
        "vision_chunk_size": -1,
        "moe_args": None,
        "use_qk_norm": False,
    }
    assert read_params(SMALL | neutral) == read_params(SMALL)
    assert read_params(SMALL | {"use_scaled_rope": True, "rope_scaling_factor": 16}).rope.factor == 16


@given(
    st.dictionaries(
        st.sampled_from([*SMALL, "n_kv_heads", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "moe_args"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_params_are_an_error_or_a_model(change: dict[str, Any], tied: bool, byte_level: bool) -> None:
    try:
        config = read_params(SMALL | change, tied=tied, byte_level=byte_level)
    except LlamaJaxError:
        return
    assert config.hidden_size == config.num_heads * config.head_dim


@given(st.data())
def test_any_params_file_is_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    write_tiny(folder, sentencepiece, leaves=ONES)
    raw = bytearray((folder / "params.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "params.json").write_bytes(raw)
    try:
        source = open_source(folder)
    except LlamaJaxError:
        return
    for spec in param_specs(source.config):
        assert source.read(spec).shape == spec.shape
    source.close()


ONES = {spec.name: np.ones(spec.shape, np.float32) for spec in param_specs(TINY)}


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_tiktoken(tmp_path: Path, data: Path, stored: Callable[[str, int], Path]) -> None:
    path = convert(stored("llama3.1", 2), tmp_path / "out")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 384 + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (384, 385)
    for row in json.loads((data / "meta" / "tokenizer_ids.json").read_text()):
        text = row["text"]
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == row["plain"], text
        assert tokenizer.encode(text, add_special_tokens=False) == row["special"], text
        if row["special"][:1] != [384]:
            assert tokenizer.encode(text) == [384, *row["special"]]
        assert tokenizer.decode(row["plain"]) == text


def test_the_files_beside_the_weights(tmp_path: Path, stored: Callable[[str, int], Path]) -> None:
    folder = stored("llama3.1", 2)
    (folder / "LICENSE").write_text("terms")
    (folder / "checklist.chk").write_text("0  consolidated.00.pth")
    path = convert(folder, tmp_path / "out")
    assert sorted(p.name for p in path.iterdir() if p.is_file()) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "llama_jax.json",
        "model.lock.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    # <|eom_id|> and <|eot_id|> end a turn.
    assert open_checkpoint(path).generation_config == {"bos_token_id": 384, "eos_token_id": [385, 392, 393]}
    with pytest.raises(TemplateError, match="chat template") as e:
        chat.encode_chat(load_tokenizer(path), [{"role": "user", "content": "hello"}])
    assert e.value.hint
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<|eot_id|>")
    ids = chat.encode_chat(load_tokenizer(convert(folder, tmp_path / "chat")), [{"role": "user", "content": "a"}])
    assert ids == [64, 393]


def test_sentencepiece_is_copied(tmp_path: Path, stored: Callable[[str, int], Path], sentencepiece: Path) -> None:
    folder = stored("llama2", 1)
    path = convert(folder, tmp_path / "out")
    assert (path / "tokenizer.model").read_bytes() == sentencepiece.read_bytes()
    assert not (path / "tokenizer.json").exists()
    assert load_tokenizer(path).bos_token_id == 1
    assert open_checkpoint(path).generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    # Meta's script puts one tokenizer above the folders of all sizes.
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    again = convert(folder, tmp_path / "again")
    assert (again / "tokenizer.model").read_bytes() == sentencepiece.read_bytes()


def test_control_tokens_have_the_ids_of_the_hub() -> None:
    """tokenizer_config.json of meta-llama/Meta-Llama-3-8B and meta-llama/Llama-3.1-8B, ids less 128000."""
    first, later = (meta_tokenizer.special_tokens(llama31=new) for new in (False, True))
    assert len(first) == len(later) == 256
    for i, token in {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|reserved_special_token_2|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|reserved_special_token_4|>",
        9: "<|eot_id|>",
        10: "<|reserved_special_token_5|>",
        255: "<|reserved_special_token_250|>",
    }.items():
        assert first[i] == token
    for i, token in {
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        11: "<|reserved_special_token_3|>",
        255: "<|reserved_special_token_247|>",
    }.items():
        assert later[i] == token


def test_merges_are_every_way_to_make_a_token() -> None:
    ranked = [b"a", b"b", b"ab", b"ba", b"aba", b"abab"]
    assert meta_tokenizer.merges(ranked) == [
        (b"a", b"b"),
        (b"b", b"a"),
        (b"a", b"ba"),
        (b"ab", b"a"),
        (b"ab", b"ab"),
        (b"aba", b"b"),
    ]


def test_a_token_that_no_merge_makes(tmp_path: Path) -> None:
    """tiktoken takes a piece that is a token as it is; the ids are tiktoken's."""
    ranked = [*(bytes([b]) for b in range(256)), b"xyz", b"ab"]
    for name, content in meta_tokenizer.tokenizer_files(ranked, llama31=True, context=64).items():
        (tmp_path / name).write_text(content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("xyz\nxyzz\nabxyz") == [258, 256, 10, 120, 121, 122, 122, 10, 257, 120, 121, 122]


def ranks(lines: Callable[[list[bytes]], Any]) -> bytes:
    found = (Path(__file__).parent / "data" / "meta" / "tokenizer.model").read_bytes().splitlines()
    return b"\n".join(lines(found) or found)


BAD_RANKS: dict[str, tuple[bytes, str]] = {
    "cut": (ranks(lambda x: x[:200]), "one of the 256 bytes is missing"),
    "gap": (ranks(lambda x: [*x[:300], *x[301:]]), "have gaps"),
    "rank twice": (ranks(lambda x: [*x[:300], x[299]]), "line 301"),
    "token twice": (ranks(lambda x: [*x, b"IQ== 384"]), "a token stands twice"),
    "no rank": (ranks(lambda x: [*x, b"IQ=="]), "line 385"),
    "huge rank": (ranks(lambda x: [*x, b"IQ== 99999999"]), "line 385"),
    "no base64": (ranks(lambda x: [*x, b"I!== 384"]), "line 385"),
    "bad padding": (ranks(lambda x: [*x, b"IQ= 384"]), "line 385"),
    "empty token": (ranks(lambda x: [*x, b" 384"]), "line 385"),
    "long token": (ranks(lambda x: [*x, b"QUFB" * 1000 + b" 384"]), "line 385"),
    "not text": (ranks(lambda x: [*x, b"\xff\xfe"]), "line 385"),
}


@pytest.mark.parametrize("case", BAD_RANKS)
def test_damaged_rank_files_are_named(case: str) -> None:
    raw, message = BAD_RANKS[case]
    assert meta_tokenizer.is_rank_file(raw)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model.*{message}"):
        meta_tokenizer.read_ranks(raw, name="tokenizer.model")


def test_rank_files_are_told_from_sentencepiece(data: Path, sentencepiece: Path) -> None:
    assert meta_tokenizer.is_rank_file((data / "meta" / "tokenizer.model").read_bytes())
    assert meta_tokenizer.is_rank_file(b"IQ== 0\r\nIg== 1\r\n")
    for raw in (sentencepiece.read_bytes(), b"", b"\n", b"IQ==", b"{}"):
        assert not meta_tokenizer.is_rank_file(raw)
    assert meta_tokenizer.read_ranks(ranks(lambda x: x) + b"\r\n\r\n", name="x")


@given(st.data())
def test_any_rank_file_is_an_error_or_a_tokenizer(data: st.DataObject) -> None:
    raw = bytearray(ranks(lambda x: x))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        ranked = meta_tokenizer.read_ranks(bytes(raw), name="tokenizer.model")
    except TokenizerError:
        return
    assert len(set(ranked)) == len(ranked) >= 256


def test_dtypes(stored: Callable[[str, int], Path]) -> None:
    source = open_source(stored("llama3.1", 2))
    assert {source.dtype(spec) for spec in param_specs(source.config)} == {BFLOAT16}
    source.close()
