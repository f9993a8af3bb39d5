"""`LoraConfig`: the adapter_config.json of a LoRA adapter.

Format: https://huggingface.co/docs/peft/package_reference/lora (peft 0.21). What changes the numbers and is not
computed here is refused by its name; what concerns training or peft alone is kept as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError, UnsupportedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_MAX_BYTES = 1 << 24
_MAX_FACTOR = 1e38
"""Of an alpha: about the largest float32."""
_ANEW = "copy the adapter's folder anew, as peft's save_pretrained wrote it"

_READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "target_parameters",
        "bias",
        "lora_bias",
        "task_type",
        "init_lora_weights",
        "ensure_weight_tying",
    ]
)
_OF_NO_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "fan_in_fan_out",
    ]
)
"""Keys that change nothing of what a trained adapter of linear layers computes. fan_in_fan_out is for layers that store
[in, out], and peft ignores it for others."""
_UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, ...) take something out of it."""


@dataclass(frozen=True)
class LoraConfig:
    """The modules that an adapter changes, and by which factors. Fields are those of peft's `LoraConfig`.

    Attributes:
      rank, alpha: of leaves that no pattern names; the factor is alpha / rank, with rslora alpha / sqrt(rank).
      target_modules: ends of modules' names in the Hugging Face model ("q_proj"), a regular expression that matches
        whole names, or "all-linear".
      rank_pattern, alpha_pattern: (pattern, value); the first that matches the end of a name holds.
      modules_to_save: ends of names of modules that are trained whole.
      target_parameters: ends of names of fused experts' weights.
      extra: other keys of the file, which are kept.
    """

    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    dora: bool = False
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def rank_of(self, module: str) -> int:
        """Rank of a module's low-rank weights."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of its low-rank product."""
        alpha, rank = float(_by_pattern(self.alpha_pattern, module, self.alpha)), self.rank_of(module)
        return alpha / (rank**0.5 if self.rslora else rank)

    def json(self) -> str:
        """Contents of its adapter_config.json."""
        whole = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            **self.extra,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": _listed(self.target_modules),
            "exclude_modules": _listed(self.exclude_modules) or None,
            "layers_to_transform": None if self.layers_to_transform is None else list(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern) or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": list(self.modules_to_save) or None,
            "target_parameters": list(self.target_parameters) or None,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
        }
        return json.dumps(whole, indent=2, sort_keys=True)


def read_config(folder: Path) -> LoraConfig:
    """Reads a folder's adapter_config.json.

    Raises:
      CheckpointError: it is missing, or damaged.
      UnsupportedModel: the adapter is of another kind than LoRA, or uses something that is not computed here.
    """
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        found = json.loads(raw.decode("utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{folder} has no {CONFIG}",
            hint="give the folder that peft's save_pretrained wrote, with adapter_config.json in it",
        ) from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}", hint="check the path and its permissions") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON ({e})", hint=_ANEW) from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint=_ANEW)
    return parse_config(found, path)


def parse_config(found: Mapping[str, Any], path: Path | str = CONFIG) -> LoraConfig:
    """A `LoraConfig` from the contents of an adapter_config.json; errors as for `read_config`."""
    _refuse_unsupported(found, path)

    def typed(key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = found.get(key)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{path}: {key} is {value!r:.100}", hint=_ANEW)
        return value

    def names(key: str) -> tuple[str, ...]:
        values = typed(key, (list, tuple), ())
        if not all(isinstance(value, str) for value in values):
            raise CheckpointError(f"{path}: {key} is {values!r:.100}, no list of names", hint=_ANEW)
        return tuple(values)

    def names_or_pattern(key: str) -> tuple[str, ...] | str:
        value = found.get(key)
        if not isinstance(value, str):
            return names(key)
        _check_pattern(value, key, path)
        return value

    def pattern(key: str, kinds: tuple[type, ...]) -> tuple[tuple[str, Any], ...]:
        pairs = tuple(typed(key, (dict,), {}).items())
        for name, value in pairs:
            _check_pattern(name, key, path)
            if type(value) not in kinds or not 0 < value < _MAX_FACTOR:
                raise CheckpointError(
                    f"{path}: {key} gives {name} {value!r:.40}", hint="ranks are positive integers, alphas positive"
                )
        return pairs

    rank, alpha = typed("r", (int,), 8), typed("lora_alpha", (int, float), 8)
    if rank < 1 or not 0 < alpha < _MAX_FACTOR:
        raise CheckpointError(f"{path}: r is {rank} and lora_alpha {alpha}", hint="both are positive numbers")
    layers = found.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else typed("layers_to_transform", (list,), None)
    if layers is not None and not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"{path}: layers_to_transform is {layers!r:.100}", hint="give numbers of layers")
    layers_pattern = found.get("layers_pattern")
    bias = typed("bias", (str,), "none")
    if bias not in ("none", "all", "lora_only"):
        raise UnsupportedModel(f"{path}: bias is {bias!r:.40}", hint="peft knows none, all and lora_only")
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        rslora=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
        target_modules=names_or_pattern("target_modules"),
        exclude_modules=names_or_pattern("exclude_modules"),
        layers_to_transform=tuple(layers) if layers else None,
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else names("layers_pattern"),
        rank_pattern=pattern("rank_pattern", (int,)),
        alpha_pattern=pattern("alpha_pattern", (int, float)),
        modules_to_save=names("modules_to_save"),
        target_parameters=names("target_parameters"),
        bias=bias,
        lora_bias=bool(found.get("lora_bias")),
        extra={key: value for key, value in found.items() if key in _OF_NO_EFFECT or key == "init_lora_weights"},
    )


def _refuse_unsupported(found: Mapping[str, Any], path: Path | str) -> None:
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(
            f"{path}: peft_type is {kind!r:.40}; only LORA is computed here",
            hint="merge the adapter into its base with peft, where it can be, and convert the result",
        )
    if (task := found.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UnsupportedModel(
            f"{path}: task_type is {task!r:.40}", hint="adapters of text generation (CAUSAL_LM) can be loaded"
        )
    init = found.get("init_lora_weights")
    if init not in _UNCHANGED_BASE:
        raise UnsupportedModel(
            f"{path}: init_lora_weights={init!r:.40} changes the base's weights as well",
            hint="save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter",
        )
    known = _READ | _OF_NO_EFFECT
    if strange := sorted(key for key, value in found.items() if key not in known and value):
        raise UnsupportedModel(
            f"{path}: {', '.join(strange[:5])} is not computed here",
            hint="merge the adapter into its base with peft (merge_and_unload), and convert the result",
        )
    if found.get("ensure_weight_tying"):
        raise UnsupportedModel(
            f"{path}: ensure_weight_tying is not computed here",
            hint="merge the adapter into its base with peft (merge_and_unload), and convert the result",
        )


def _check_pattern(pattern: str, key: str, path: Path | str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise CheckpointError(
            f"{path}: {key} has {pattern!r:.100}, which is not a regular expression ({e})", hint=_ANEW
        ) from e


def _by_pattern(patterns: Sequence[tuple[str, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft's `get_pattern_key`."""
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _listed(names: tuple[str, ...] | str) -> list[str] | str:
    return names if isinstance(names, str) else list(names)
