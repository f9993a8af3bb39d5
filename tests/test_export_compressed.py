"""`llama-jax export --to compressed-tensors`: the bytes that the format's own library writes, and back."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from test_convert_quantized import DATA
from tiny_chat_model import write_chat_model
from tiny_models import MIXTRAL, write_hf

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.convert.export import export_compressed, export_hf
from llama_jax.errors import UnsupportedModel
from llama_jax.params import flatten
from llama_jax.recipe import recipe


@pytest.mark.parametrize("case", ["ct-int4-group", "ct-int4-group-asymmetric"])
def test_the_bytes_of_the_formats_own_library(case: str, tmp_path: Path) -> None:
    """tests/data/quantized was written by compressed-tensors; kept, and exported again, it is the same."""
    path = convert(DATA / case, tmp_path / "kept")
    made = export_compressed(path, tmp_path / "again")
    found, expected = (load_file(folder / "model.safetensors") for folder in (made.path, DATA / case))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("weight_shape"):
            assert found[name].tolist() == tensor.tolist()
            continue
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
    settings, own = (
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (made.path, DATA / case)
    )
    for name in ("quant_method", "format", "ignore"):
        assert settings[name] == own[name]
    group = settings["config_groups"]["group_0"]
    assert group["weights"].items() >= own["config_groups"]["group_0"]["weights"].items()
    assert group["targets"] == ["Linear"]


@pytest.mark.parametrize("weights", ["int4_g8", "int4_g8_zero", "int8", "int8_g8", "int8_g8_zero"])
def test_there_and_back(weights: str, tmp_path: Path) -> None:
    """An export is read back as it was made: codes, scales, zeros, several layouts in one model, a leaf left alone."""
    folder = write_chat_model(tmp_path / "tiny")
    path = convert(folder, tmp_path / "q", recipe=recipe(weights, lm_head="int8", ignore="*.k_proj"))
    done = CliRunner().invoke(cli, ["export", str(path), str(tmp_path / "ct"), "--to", "compressed-tensors"])
    assert done.exit_code == 0, done.output
    back = convert(tmp_path / "ct", tmp_path / "back")
    assert dict(open_checkpoint(back).config.schemes) == dict(open_checkpoint(path).config.schemes)
    expected, found = flatten(load_params(path)), flatten(load_params(back))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert found["layers.0.attn.k_proj.weight"].dtype == jnp.bfloat16


def test_refused(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "tiny")
    for wanted, says in (
        (recipe("int4", group=8), "int4_g8_min"),
        (recipe("fp8"), "stored as fp8"),
        (None, "no weights"),
    ):
        path = convert(folder, tmp_path / "q", recipe=wanted, overwrite=True)
        with pytest.raises(UnsupportedModel, match=says) as caught:
            export_compressed(path, tmp_path / "ct")
        assert caught.value.hint
        assert not (tmp_path / "ct").exists()
    path = convert(DATA / "gptq-int4-act-order", tmp_path / "q", overwrite=True)
    with pytest.raises(UnsupportedModel, match=r"stored as int4_g32_zero.*_ordered, which"):
        export_compressed(path, tmp_path / "ct")
    export_hf(path, tmp_path / "hf")  # which decodes


def test_routed_experts_are_refused(tmp_path: Path) -> None:
    """Plain ones too: the format's readers know them by other names."""
    write_hf(tmp_path / "moe", MIXTRAL)
    path = convert(tmp_path / "moe", tmp_path / "q", recipe=recipe("int8", ignore="*.moe.*"))
    with pytest.raises(UnsupportedModel, match="routed experts") as caught:
        export_compressed(path, tmp_path / "ct")
    assert "--to hf" in str(caught.value.hint)
