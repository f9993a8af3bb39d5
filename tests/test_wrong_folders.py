"""Folders that hold no model: each error says what they hold, and what to do with that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA, assert_equal, refusal, write_gguf, write_hf

from llama_jax.convert import convert
from llama_jax.errors import CheckpointError, ModelNotFound, UnsupportedModel
from llama_jax.library import find, locate
from llama_jax.library.configs import find_config

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 16), np.float32)}


def write_adapter(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base-model"} | config
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(LORA, folder / "adapter_model.safetensors")


def files(*names: str) -> Callable[[Path], None]:
    """Makes a folder with files of these names; one that ends in a slash is a folder."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in names:
            path = folder / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(b"{}")

    return make


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["nothing", "config.json", "optimizer.pt", "tokenizer.json"])
def test_an_adapter(tmp_path: Path, beside: str) -> None:
    write_adapter(tmp_path / "a")
    if beside != "nothing":
        (tmp_path / "a" / beside).write_text(json.dumps(LLAMA))
    error = refusal(tmp_path / "a", UnsupportedModel)
    assert error.message == f"{tmp_path / 'a'} holds a LoRA adapter of org/base-model, not a model"
    assert "merge_and_unload()" in error.hint
    assert repr(str(tmp_path / "a")) in error.hint
    for look in (find, locate):  # with a config.json there is something to plan with
        if beside != "config.json":
            with pytest.raises(UnsupportedModel, match="holds a LoRA adapter"):
                look(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"base_model_name_or_path": None}, "LoRA adapter whose base model it does not name", "merge_and_unload"),
        ({"peft_type": "IA3"}, "a IA3 adapter of org/base-model", "merge_and_unload"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adapter", "cannot be merged"),
    ],
)
def test_other_adapters(tmp_path: Path, config: dict[str, Any], message: str, hint: str) -> None:
    write_adapter(tmp_path / "a", **config)
    error = refusal(tmp_path / "a", UnsupportedModel)
    assert message in error.message
    assert hint in error.hint


def test_adapters_without_a_readable_config(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(b"\xff")
    assert "LoRA adapter" in refusal(tmp_path / "a", UnsupportedModel).message
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert "LoRA adapter" in refusal(tmp_path / "a", UnsupportedModel).message


def test_an_adapter_of_mlx(tmp_path: Path) -> None:
    files("adapters.safetensors", "0000100_adapters.safetensors")(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": "org/b"}))
    error = refusal(tmp_path / "a", UnsupportedModel)
    assert "LoRA adapter of org/b" in error.message
    assert "mlx_lm.fuse" in error.hint


def test_an_adapter_among_the_weights(tmp_path: Path) -> None:
    """Saved by a trainer under the name of a whole model."""
    write_hf(tmp_path / "a", LLAMA)
    save_file(load_file(tmp_path / "a" / "model.safetensors") | LORA, tmp_path / "a" / "model.safetensors")
    assert "merge_and_unload()" in refusal(tmp_path / "a", UnsupportedModel).hint


def test_full_weights_and_a_leftover_adapter(tmp_path: Path) -> None:
    leaves = write_hf(tmp_path / "a", LLAMA)
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"")
    assert_equal(convert(tmp_path / "a", tmp_path / "out"), leaves)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_gguf_files_that_are_no_models(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"general.type": kind})
    assert "not a model" in refusal(tmp_path / "m.gguf", UnsupportedModel).message


# --- Checkpoints of trainers ------------------------------------------------------------------------------------------

DEEPSPEED = ("global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "zero_to_fp32.py")
TRAINERS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "state alone": (
        ("optimizer.pt", "trainer_state.json", "scheduler.pt"),
        "state of a training run",
        "save_pretrained",
    ),
    "state, config": (
        ("config.json", "training_args.bin", "rng_state_0.pth"),
        "state of a training",
        "save_pretrained",
    ),
    "deepspeed": ((*DEEPSPEED, "config.json"), "DeepSpeed", "zero_to_fp32.py"),
    "deepspeed's step": (("mp_rank_00_model_states.pt",), "DeepSpeed", "zero_to_fp32.py"),
    "fsdp": (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata"), "FSDP", "accelerate merge-weights"),
    "fsdp's shards": (("__0_0.distcp", "__1_0.distcp", ".metadata"), "FSDP", "accelerate merge-weights"),
    "megatron": (("iter_0000100/", "latest_checkpointed_iteration.txt"), "Megatron", "Hugging Face folder"),
    "lightning": (("epoch=0-step=100.ckpt",), "Lightning", "save_pretrained"),
    "tensorflow": (("config.json", "tf_model.h5"), "another framework", "safetensors"),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_checkpoints_of_trainers(tmp_path: Path, case: str) -> None:
    names, message, hint = TRAINERS[case]
    files(*names)(tmp_path / "t")
    error = refusal(tmp_path / "t", UnsupportedModel)
    assert message in error.message
    assert hint in error.hint


def test_a_folder_of_checkpoints(tmp_path: Path) -> None:
    files("checkpoint-500/trainer_state.json", "checkpoint-1000/trainer_state.json", "runs/")(tmp_path / "t")
    leaves = write_hf(tmp_path / "t" / "checkpoint-1000", LLAMA)
    error = refusal(tmp_path / "t", ModelNotFound)
    assert error.message == f"{tmp_path / 't'} holds no model itself, but checkpoint-1000, checkpoint-500"
    assert error.hint == f"give {tmp_path / 't' / 'checkpoint-1000'}"
    assert_equal(convert(error.hint.removeprefix("give "), tmp_path / "out"), leaves)


def test_the_folder_of_the_hub_s_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name"
    write_hf(folder / "snapshots" / ("a" * 40), LLAMA)
    files("blobs/", "refs/main")(folder)
    assert refusal(folder, ModelNotFound).hint == f"give {folder / 'snapshots' / ('a' * 40)}"


# --- Incomplete, and mixed up -----------------------------------------------------------------------------------------


def test_folders_without_weights(tmp_path: Path) -> None:
    files("config.json")(tmp_path / "c")
    assert "has neither model.safetensors" in refusal(tmp_path / "c", CheckpointError).message
    files()(tmp_path / "e")
    assert "it is empty" in refusal(tmp_path / "e", ModelNotFound).message
    files("README.md", "data.csv")(tmp_path / "x")
    assert "it holds README.md, data.csv" in refusal(tmp_path / "x", ModelNotFound).message
    for find_it in (find, locate):
        with pytest.raises(ModelNotFound, match="it is empty"):
            find_it(tmp_path / "e")


def test_a_folder_with_only_a_config_can_be_planned(tmp_path: Path) -> None:
    files()(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(LLAMA))
    assert find_config(str(tmp_path / "c")).vocab_size == 48


def test_weights_without_config(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    (tmp_path / "hf" / "config.json").unlink()
    error = refusal(tmp_path / "hf", CheckpointError)
    assert error.message.endswith("config.json is missing")
    assert "get what is missing" in error.hint


def test_missing_parts_are_counted(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=4)
    for n in (2, 4):
        (tmp_path / "hf" / f"model-{n:05}-of-00004.safetensors").unlink()
    message = "model-00002-of-00004.safetensors is missing, and 1 more of the 4 files that model.safetensors.index.json"
    assert message in refusal(tmp_path / "hf", CheckpointError).message
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    assert "2 of the 4 parts of a model, and not their index" in refusal(tmp_path / "hf", CheckpointError).message


def test_parts_that_were_mixed_up(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=3)
    one, two = (tmp_path / "hf" / f"model-{n:05}-of-00003.safetensors" for n in (1, 2))
    shutil.copy(two, one)
    error = refusal(tmp_path / "hf", CheckpointError)
    assert "by its tensors it is model-00002-of-00003.safetensors" in error.message
    assert "get model-00001-of-00003.safetensors" in error.hint


def test_a_part_given_as_a_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=2)
    error = refusal(tmp_path / "hf" / "model-00002-of-00002.safetensors", UnsupportedModel)
    assert error.hint == f"give the folder: {tmp_path / 'hf'}"
