"""The model in a folder, or, where it holds none, an error that names what it is instead and what to do with that."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from llama_jax.checkpoint.format import CONFIG, PARAMS, is_checkpoint, open_checkpoint
from llama_jax.checkpoint.wrong_file import GGUF, other_format, read_head, refuse, wrong_file
from llama_jax.convert.adapters import adapter_error, is_adapter
from llama_jax.errors import CheckpointError, LlamaJaxError, ModelNotFound, UnsupportedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""One file of weights, or the index of several, by format; the first that exists wins."""
META = "params.json"

MISSING = "get what is missing from where the other files came"

_CAN = "a Hugging Face folder, a folder of Meta or a GGUF file can be converted"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
_PART = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})\.(safetensors|bin)")
_PIECE = re.compile(r"(.+\.gguf)(?:\.part\d+of\d+|\.part[-_]?[a-z]{1,2}|-split-[a-z])", re.IGNORECASE)
_MAX_ENTRIES = 10_000
_OUT = "then convert OUT, with the model's config.json and tokenizer beside the weights"

_TRAINERS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"zero_to_fp32\.py|global_step\d+|.*_(?:model|optim)_states\.pt"),
        "a training checkpoint of DeepSpeed, whose weights are spread over its ranks",
        "put them together with the script that DeepSpeed puts there, or into the folder above: "
        f"`python zero_to_fp32.py FOLDER OUT`; {_OUT}",
    ),
    (
        re.compile(r".*\.distcp|pytorch_model_fsdp_\d+"),
        "a distributed checkpoint of PyTorch (FSDP), whose weights are spread over its ranks",
        f"put them together with `accelerate merge-weights FOLDER OUT`, FOLDER being that of the .distcp files; {_OUT}",
    ),
    (
        re.compile(r"latest_checkpointed_iteration\.txt|iter_\d{7}|mp_rank_\d\d(?:_\d+)?"),
        "a training checkpoint of Megatron",
        "make a Hugging Face folder of it with Megatron's own converter, and convert that",
    ),
    (
        re.compile(r".*\.(?:ckpt|nemo)"),
        "a training checkpoint of Lightning or NeMo",
        "load it in the program that trained it, save the model with `save_pretrained`, and convert that folder",
    ),
    (
        re.compile(r"tf_model\.h5|flax_model\.msgpack|.*\.onnx|rust_model\.ot"),
        "weights for another framework",
        "use the model's safetensors or PyTorch weights",
    ),
    (
        re.compile(r"(?:optimizer|scheduler|training_args|rng_state\w*|random_states\w*)\.\w+|trainer_state\.json"),
        "the state of a training run without the model's weights",
        "save the model itself with `save_pretrained` or `trainer.save_model()`, and convert that folder",
    ),
)
"""Names that only trainers and other frameworks write, what a folder with them holds, and what to do."""


def model_in(path: Path) -> Path:
    """The path to open: itself, or the GGUF file of a folder that holds no other weights.

    A folder with a config.json and no weights passes, since there is use for that alone.

    Raises:
      LlamaJaxError: it is a folder with no model, or with several; says what it holds.
    """
    if not path.is_dir() or is_checkpoint(path) or has_weights(path):
        return path
    if len(files := _gguf_models(path)) == 1:
        return files[0]
    if (path / PARAMS).is_dir():
        open_checkpoint(path)  # ours, but unfinished or stripped: it says what is wrong
    if any((path / name).exists() for name in (CONFIG, META)):
        return path
    raise no_model(path)


def has_weights(path: Path) -> bool:
    """Returns whether a folder holds the weights of a Hugging Face model, or the index of their files."""
    return any((path / name).exists() for layout in LAYOUTS for name in layout)


def no_model(path: Path) -> LlamaJaxError:
    """The error for a folder without weights that can be read: what it holds, and what to do with it."""
    from llama_jax.checkpoint.source import some

    entries = _entries(path)
    names = [p.name for p in entries]
    if is_adapter(names):
        return adapter_error(path)
    if inner := _models_below(entries):
        return ModelNotFound(
            f"{path} holds no model itself, but {some([p.relative_to(path).as_posix() for p in inner])}",
            hint=f"give {inner[-1]}",
        )
    for pattern, what, hint in _TRAINERS:
        if found := [name for name in names if pattern.fullmatch(name)]:
            return UnsupportedModel(f"{path} holds {what} ({some(found)})", hint=hint)
    if parts := [name for name in names if _PART.fullmatch(name)]:
        stem, count, kind = _PART.fullmatch(parts[0]).groups()  # type: ignore[union-attr]
        index = f"{stem}.{kind}.index.json"
        return CheckpointError(
            f"{path} has {len(parts)} of the {int(count)} parts of a model, and not their index {index}",
            hint=MISSING,
        )
    if any(re.fullmatch(r"consolidated\.\d\d\.pth", name) for name in names):
        if META in names:
            return UnsupportedModel(
                f"{path} has a {CONFIG} beside Meta's own files", hint=f"take {CONFIG} away to read them as Meta's"
            )
        return CheckpointError(f"{path / META} is missing", hint=MISSING)
    for error in filter(None, map(_piece_error, entries)):
        return error
    if len(files := _gguf_models(path)) > 1:
        held = some([file.name for file in files])
        return ModelNotFound(f"{path} holds {len(files)} GGUF models: {held}", hint=f"give one of them: {files[0]}")
    wanted = [name for layout in LAYOUTS for name in layout]
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if (path / CONFIG).is_file():
        lacking = f"{path} has neither {', '.join(wanted[:-1])} nor {wanted[-1]}"
        if weights:
            return CheckpointError(
                lacking, hint=f"it holds {some(weights)}: if these are the weights, give them such a name; {_CAN}"
            )
        return CheckpointError(lacking, hint=MISSING)
    shown = f"it holds {some(names)}" if names else "it is empty"
    return ModelNotFound(f"{path} holds no model (no {CONFIG}, {META} or GGUF file); {shown}", hint=_CAN)


def is_gguf(path: Path) -> bool:
    """Returns whether a file should be read as GGUF, by its name or its first bytes."""
    return path.suffix.lower() == ".gguf" or (read_head(path)[0].startswith(GGUF) and not _PIECE.fullmatch(path.name))


def no_model_file(path: Path) -> LlamaJaxError:
    """The error for a file that is given as a model but is not a GGUF file."""
    if (error := _piece_error(path)) is not None:
        return error
    if path.suffix in _WEIGHTS or path.name in (CONFIG, META, INDEX):
        folder = path.absolute().parent
        return UnsupportedModel(f"{path} is a part of a model's folder", hint=f"give the folder: {folder}")
    head, size = read_head(path)
    refuse(path, wrong_file(head, size, "any") or other_format(head))
    return UnsupportedModel(
        f"{path} is not a GGUF file", hint="give the folder that holds config.json or params.json, or a .gguf file"
    )


def _piece_error(path: Path) -> CheckpointError | None:
    """The error for a piece of a file that was cut at some byte to be uploaded; None for any other file's name."""
    found = _PIECE.fullmatch(path.name)
    if found is None:
        return None
    whole = path.with_name(found[1])
    pieces = [p for p in _entries(path.parent) if _PIECE.fullmatch(p.name) and p.name.startswith(found[1])]
    command = shlex.join(["cat", *(str(p) for p in sorted(pieces, key=_numbered))])
    return CheckpointError(
        f"{path} is a piece of {whole.name}, which was cut without regard to what is in it",
        hint=f"put all of its pieces together, in their order: `{command} > {shlex.quote(str(whole))}`",
    )


def _models_below(entries: Sequence[Path]) -> list[Path]:
    """The folders just below, or among the snapshots of the hub's cache, that hold weights or an adapter."""
    folders = [p for p in entries if p.is_dir()]
    for snapshots in (p for p in folders if p.name == "snapshots"):
        folders = _entries(snapshots)
    return sorted((p for p in folders if _holds_some(p)), key=_numbered)


def _holds_some(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = [p.name for p in _entries(path)]
    whole = has_weights(path) or is_checkpoint(path) or is_adapter(names) or META in names
    return whole or any(name.lower().endswith(".gguf") for name in names) or path.name.startswith("checkpoint-")


def _numbered(path: Path) -> list[str]:
    """Sort key for names with numbers in them: checkpoint-1000 comes after checkpoint-500."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _gguf_models(path: Path) -> list[Path]:
    """The GGUF models of a folder, each by its first file."""
    files = [p for p in _entries(path) if p.suffix.lower() == ".gguf" and p.is_file()]
    if not files:
        return []
    # Imported here, since it brings jax, which finding a model that has been converted does not need.
    from llama_jax.convert.gguf_parts import models_of

    return models_of(files)


def _entries(path: Path) -> list[Path]:
    """Files and folders in a folder, by name, the hidden ones left out."""
    try:
        return sorted(p for p, _ in zip(path.iterdir(), range(_MAX_ENTRIES), strict=False) if p.name[0] != ".")
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", hint="check its permissions") from e
