"""The modules of a Hugging Face model that an adapter's configuration names, and their leaves here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llama_jax.adapters.adapter import low_rank_shapes
from llama_jax.adapters.lora_config import ALL_LINEAR, LoraConfig
from llama_jax.config import LlamaConfig
from llama_jax.errors import UnsupportedModel, did_you_mean
from llama_jax.params import canonical_specs

_EXPERTS = re.compile(r"(model\.layers\.\d+)\.(?:block_sparse_moe|feed_forward|mlp)\.experts(?:\..*)?")


@dataclass(frozen=True)
class Modules:
    """Names of modules as peft sees them (without "base_model.model.").

    Attributes:
      linear: leaf of each module that low-rank weights can be added to.
      whole: leaf of each module that can be saved whole.
      experts: leaf of each parameter of fused experts, e.g. "model.layers.0.mlp.experts.gate_up_proj".
    """

    linear: Mapping[str, str]
    whole: Mapping[str, str]
    experts: Mapping[str, str]


def modules(config: LlamaConfig) -> Modules:
    """The modules of a model."""
    linear, whole, experts = {}, {}, {}
    for spec in canonical_specs(config):
        if spec.path[-1] != "weight":
            continue
        if ".moe.experts." in spec.name:
            match = _EXPERTS.fullmatch(spec.hf)
            assert match is not None
            short = "down_proj" if spec.path[-2] == "down_proj" else "gate_up_proj"
            # Hugging Face's fused experts; checkpoints name them otherwise.
            block = "feed_forward" if ".feed_forward." in spec.hf else "mlp"
            experts[f"{match[1]}.{block}.experts.{short}"] = f"{spec.leaf.rpartition('.')[0]}.{short}"
            continue
        module = spec.hf.removesuffix(".weight").replace(".block_sparse_moe.", ".mlp.")
        whole[module] = spec.leaf
        if len(spec.shape) == 2 and spec.path[-2] != "router":
            linear[module] = spec.leaf
    if config.tie_word_embeddings:
        linear["lm_head"] = whole["lm_head"] = "lm_head"
    assert {*linear.values(), *experts.values()} == low_rank_shapes(config).keys()
    return Modules(linear, whole, experts)


def targeted(config: LlamaConfig, lora: LoraConfig) -> dict[str, str]:
    """The module of each leaf that an adapter adds low-rank weights to, in the order of the forward pass; of experts
    the name with the parameter.

    Raises:
      UnsupportedModel: nothing of the model is targeted, or routed experts would be saved whole.
    """
    known = modules(config)
    if whole := next((name for name in known.experts if is_saved(name, lora.modules_to_save)), None):
        raise UnsupportedModel(
            f"{whole} would be trained whole, which is not computed here",
            hint="leave it out of modules_to_save; low-rank weights of experts are target_parameters",
        )
    found = {leaf: module for module, leaf in known.linear.items() if _is_target(module, lora)}
    for parameter, leaf in known.experts.items():
        if any(parameter == name or parameter.endswith(f".{name}") for name in lora.target_parameters):
            found[leaf] = parameter
    if not found and (lora.target_modules or lora.target_parameters):
        raise UnsupportedModel(
            f"the adapter targets {lora.target_modules or lora.target_parameters!r:.200}, of which the model has none",
            hint="load it with the model that it was made for",
        )
    order = list(low_rank_shapes(config))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def check_named(config: LlamaConfig, lora: LoraConfig) -> None:
    """Checks that each name in the configuration of a new adapter is that of a module that can be trained so.

    Raises:
      UnsupportedModel: the model has none of a name.
    """
    known = modules(config)
    targets = () if isinstance(lora.target_modules, str) else lora.target_modules
    for names, meant, of in ((targets, _named, known.linear), (lora.modules_to_save, is_saved, known.whole)):
        short = {module.rpartition(".")[2] for module in of}
        for name in names:
            if not any(meant(module, (name,)) for module in of):
                raise UnsupportedModel(
                    f"the model has no module {name!r:.100}",
                    hint=did_you_mean(name, short) or f"there are {', '.join(sorted(short))}",
                )


def is_saved(module: str, names: tuple[str, ...]) -> bool:
    """Whether `modules_to_save` names a module, or one that it is a part of ("mlp")."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in names)


def _is_target(module: str, lora: LoraConfig) -> bool:
    """peft's `check_target_module_exists`."""
    if _named(module, lora.exclude_modules):
        return False
    if is_saved(module, lora.modules_to_save):
        return False
    if lora.target_modules == ALL_LINEAR:
        return module not in ("lm_head", "model.embed_tokens")
    if isinstance(lora.target_modules, str) or module in lora.target_modules:
        return _named(module, lora.target_modules)
    if not _named(module, lora.target_modules):
        return False
    if lora.layers_to_transform is None:
        return True
    patterns = lora.layers_pattern or (r"[^.]*",)
    layer = next((found for p in patterns if (found := re.match(rf".*\.{p}\.(\d+)\.", module))), None)
    return layer is not None and int(layer[1]) in lora.layers_to_transform


def _named(module: str, names: tuple[str, ...] | str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
