"""Reading and writing the folders of adapters that peft writes.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. adapter_model.safetensors holds, behind
"base_model.model." and a module's name, ".lora_A.weight" [r, in], ".lora_B.weight" [out, r], ".lora_magnitude_vector"
[out], and modules that were trained whole under their own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.adapters.adapter import About, Adapter, low_rank_shapes
from llama_jax.adapters.lora_config import CONFIG, WEIGHTS, LoraConfig, read_config
from llama_jax.adapters.targets import Modules, is_saved, modules, targeted
from llama_jax.checkpoint.source import some
from llama_jax.config import LlamaConfig
from llama_jax.convert.safetensors_file import DTYPES, SafetensorsFile
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.params import canonical_specs, unflatten

PREFIX = "base_model.model."
_MEMBERS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "b_bias",
}
_LOW_RANK = re.compile(rf"(?P<module>.*?)\.(?P<member>{'|'.join(re.escape(name) for name in _MEMBERS)})")
_ALIASES = (
    (".block_sparse_moe.", ".mlp."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    (".modules_to_save.default.", "."),
)
_OWN_BASE = "load the adapter with the base that it was trained on, and its folder as peft wrote it"


def load_adapter(folder: str | Path, config: LlamaConfig) -> Adapter:
    """Reads an adapter as peft's `save_pretrained` wrote it; arrays of numpy, in the dtypes of the file.

    Args:
      config: of the base model, as its files have it.

    Raises:
      CheckpointError: a file is missing or damaged, a tensor does not fit the base, is missing, or not finite.
      UnsupportedModel: the adapter is of another kind than LoRA, or uses something that is not computed here.
    """
    folder = Path(folder).expanduser()
    lora = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        others = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}",
            hint=f"{others[0]} is not read; save the adapter with safe_serialization=True"
            if others
            else "copy the adapter's whole folder, as peft's save_pretrained wrote it",
        )
    file = SafetensorsFile(path)
    try:
        tensors = {name: _read(file, name) for name in file.entries}
    finally:
        file.close()
    return _made(tensors, lora, config, path)


def _read(file: SafetensorsFile, name: str) -> np.ndarray:
    entry = file.entries[name]
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{file.path}: tensor {name} is {entry.dtype}", hint=f"save the adapter in {', '.join(DTYPES)}"
        )
    out = np.empty(entry.shape, DTYPES[entry.dtype])
    file.read_into(name, out)
    if not np.isfinite(out.astype(np.float32)).all():
        raise CheckpointError(
            f"{file.path}: tensor {name} has numbers that are NaN or infinite",
            hint="training has diverged; use an earlier state of the adapter",
        )
    return out


def _made(tensors: Mapping[str, np.ndarray], lora: LoraConfig, config: LlamaConfig, path: Path) -> Adapter:
    known, wanted = modules(config), targeted(config, lora)
    wrapped: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{path}: tensor {name} does not begin with {PREFIX}", hint=_OWN_BASE)
        if match := _LOW_RANK.fullmatch(_usual(name.removeprefix(PREFIX))):
            wrapped.setdefault(match["module"], {})[_MEMBERS[match["member"]]] = x
        else:
            whole[_whole(name, x, known, lora, config, path)] = x
    low_rank = {}
    for module, members in wrapped.items():
        leaf = _leaf(module, members, known, config)
        if leaf not in wanted:
            raise CheckpointError(
                f"{path}: {module} has low-rank weights, but is not a module of this model that {CONFIG} targets",
                hint=_OWN_BASE,
            )
        low_rank[leaf] = _checked(leaf, members, lora, wanted[leaf], config, path)
    if missing := wanted.keys() - low_rank.keys():
        raise CheckpointError(
            f"{path} lacks the low-rank weights of {some(wanted[leaf] for leaf in missing)}",
            hint="the file is incomplete, or the adapter was made for a model with fewer layers",
        )
    for name in lora.modules_to_save:
        saved = {leaf for module, leaf in known.whole.items() if is_saved(module, (name,))}
        biases = {spec.name for spec in canonical_specs(config)} & {f"{leaf}.bias" for leaf in saved}
        if not saved or not {f"{leaf}.weight" for leaf in saved} | biases <= whole.keys():
            raise CheckpointError(f"{path} lacks {name}, which {CONFIG} lists in modules_to_save", hint=_OWN_BASE)
    flat = {f"{leaf}.{member}": x for leaf in wanted for member, x in low_rank[leaf].items()}
    scales = tuple((leaf, lora.scale_of(module)) for leaf, module in wanted.items())
    return Adapter(unflatten(flat), unflatten(whole), About(scales, lora.json(), str(path.parent)))


def _usual(name: str) -> str:
    """A name as `targets.modules` has it, whatever wraps the model."""
    for other, usual in _ALIASES:
        name = name.replace(other, usual)
    return name


def _whole(name: str, x: np.ndarray, known: Modules, lora: LoraConfig, config: LlamaConfig, path: Path) -> str:
    """The parameter that a tensor replaces."""
    module, _, member = _usual(name.removeprefix(PREFIX)).replace(".base_layer.", ".").rpartition(".")
    leaf = known.whole.get(module)
    target = f"{leaf}.{member}"
    shapes = {spec.name: spec.shape for spec in canonical_specs(config)}
    shapes.setdefault("lm_head.weight", (config.vocab_size, config.hidden_size))
    trained = member == "weight" or lora.bias != "none" or is_saved(module, lora.modules_to_save)
    if target not in shapes or not trained:
        raise CheckpointError(f"{path}: tensor {name} is of no module of this model", hint=_OWN_BASE)
    if x.shape != shapes[target]:
        hint = _OWN_BASE
        if leaf in ("embed", "lm_head"):
            hint = "the adapter extends the vocabulary; merge it into its base with peft, and convert the result"
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(x.shape)}, the base's is {list(shapes[target])}", hint=hint
        )
    return target


def _leaf(module: str, members: Mapping[str, np.ndarray], known: Modules, config: LlamaConfig) -> str | None:
    """The leaf of a module's low-rank weights; of fused experts, whose parameters are told by their shapes: peft wraps
    one in the other, and names only the wrappers."""
    if module in known.linear:
        return known.linear[module]
    inner, shapes = module.removesuffix(".base_layer"), low_rank_shapes(config)
    for parameter, leaf in known.experts.items():
        _, out, into = shapes[leaf]
        if parameter.rpartition(".")[0] != inner or not {"a", "b"} <= members.keys():
            continue
        if members["a"].shape[-1:] == (into,) and members["b"].shape[:1] == (out,):
            return leaf
    return None


def _checked(
    leaf: str, members: Mapping[str, np.ndarray], lora: LoraConfig, module: str, config: LlamaConfig, path: Path
) -> dict[str, np.ndarray]:
    """The members of a leaf in their canonical shapes."""
    *stack, out, into = low_rank_shapes(config)[leaf]
    rank, count = lora.rank_of(module), stack[0] if stack else 1
    shapes: dict[str, tuple[int, ...]] = {"a": (count * rank, into), "b": (out, rank * count)}
    if lora.dora and not stack and leaf != "embed":
        shapes["magnitude"] = (out,)
    if lora.lora_bias and not stack and leaf != "embed":
        shapes["b_bias"] = (out,)
    if (lora.dora and "magnitude" not in shapes) or (lora.lora_bias and ".moe." in leaf):
        raise UnsupportedModel(
            f"{path}: DoRA and lora_bias of {module} are not computed here",
            hint="merge the adapter into its base with peft (merge_and_unload), and convert the result",
        )
    found = {member: x.shape for member, x in members.items()}
    if found != shapes:
        raise CheckpointError(
            f"{path}: the low-rank weights of {module} have the shapes {_text(found)}; "
            f"the base model and {CONFIG} want {_text(shapes)}",
            hint=_OWN_BASE,
        )
    if not stack:
        return dict(members)
    # a is expert by expert, b rank by rank.
    a, b = members["a"].reshape(count, rank, into), members["b"].reshape(out, rank, count)
    return {"a": a, "b": np.ascontiguousarray(b.transpose(2, 0, 1))}


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{member} {list(shape)}" for member, shape in shapes.items())


def adapters_digest(adapters: str | Mapping[str, str], config: LlamaConfig) -> str:
    """A digest of an adapter, or of several by name. Errors as for `load_adapter`."""
    named = {"": adapters} if isinstance(adapters, str) else adapters
    return ", ".join(f"{name} {load_adapter(folder, config).digest}" for name, folder in sorted(named.items()))
