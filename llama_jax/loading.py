"""From a model's name to a `Model` and its tokenizer, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax import runtime
from llama_jax.adapters import Adapter, load_adapter
from llama_jax.adapters.models import AdapterLike, with_adapter
from llama_jax.cache import check_kv_dtype
from llama_jax.checkpoint import Progress
from llama_jax.checkpoint.build import load_source
from llama_jax.checkpoint.source import tell_notes
from llama_jax.config import LlamaConfig
from llama_jax.convert.opening import opened
from llama_jax.convert.quantizing import QuantizedSource
from llama_jax.kernels.checking.startup import self_check
from llama_jax.kernels.integer_matmul import library
from llama_jax.kernels.registry import checked_backends
from llama_jax.layout import check, explain, param_sharding
from llama_jax.library import DEFAULT_MODEL, Found, find, resolve
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params
from llama_jax.plan import MeshRequest, resolve_mesh
from llama_jax.recipe import FLOAT, check_activations, requested, schemes, usual_form
from llama_jax.sharding import DeviceMesh, on
from llama_jax.targets import current
from llama_jax.text.tokenizer import Tokenizer, tokenizer_from_files
from llama_jax.text.tokenizer.check import check_tokenizer


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    adapter: AdapterLike | Mapping[str, AdapterLike] | None = None,
    dtype: DTypeLike | None = None,
    weights: str | None = None,
    kv_dtype: str | None = None,
    activations: str | None = None,
    mesh: MeshRequest = None,
    convert: bool = True,
    verify: bool = True,
    fuse: bool = True,
    kernels: str | Mapping[str, str] | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[Model, Tokenizer]:
    """Loads a model, converting it into the cache first if it is not an Orbax checkpoint yet.

    On a GPU the kernels are first compared with their references, once per device and version; those that differ
    are disabled. LLAMA_JAX_SELF_CHECK=0 skips the check.

    Args:
      model: the default model's name, a folder (Orbax checkpoint, Hugging Face or Meta), a GGUF file, or "org/name" on
        the Hugging Face hub.
      adapter: a folder that peft wrote (LoRA and its kin), or an `Adapter`: the model computes with it. Or several by
        name, of which requests choose: `generate(adapter=NAME)`, `LLM`, `Engine`.
      dtype: compute dtype; by default float32 on a CPU and bfloat16 on a GPU.
      weights: "stored" computes with quantised weights as they are, "float" decodes them to `dtype`; the default
        depends on the device (`llama_jax.recipe.usual_form`). The name of a layout ("int8", "int4", "fp8",
        "int4_g128_zero", ...) quantises the model while it is loaded, decoding a quantised one first.
      kv_dtype: "int8", "fp8", "k8v4" or "int4" quantises keys and values in the cache (docs/quantization.md); by
        default they are kept in `dtype`.
      activations: "int8" also rounds the inputs of quantised weights (docs/quantization.md), which are then kept as
        stored, unless `weights` says otherwise. By default they are not rounded.
      mesh: devices to split the model over, from `make_mesh`, by its own rules or those of `llama_jax.sharding`;
        `notify` is told of dimensions that are not simply split. "auto", or a `llama_jax.plan.AutoMesh`, chooses by the
        free memory of this machine's devices (docs/sharding.md); `notify` is told why, and the model's `mesh` is the
        choice, None for one device.
      convert: False reads a source in another format directly and writes no converted copy to disk: the same tree,
        but without digests to check.
      verify: whether to check every tensor while loading: its digest, or, where there is none (`convert=False`), that
        it holds neither NaN nor infinity.
      fuse: whether to join projections that share their input (`llama_jax.model.fuse`), which is faster; False keeps
        the canonical tree, for training or for `Llama`.
      kernels: backends for the programs that generate with this model, {"flash_attention": "reference"} or
        "flash_attention=reference,moe=pallas_triton". Other operations are chosen as usual.
      progress: called while converting and loading.
      notify: called with one line of text before anything that takes long or uses the network. If the default model's
        package is missing, you are asked in the terminal before it is downloaded (LLAMA_JAX_YES=1 agrees).

    Raises:
      LlamaJaxError: the subclass says what is wrong; see `llama_jax.errors`. DoesNotFit: "auto" finds no mesh.
        RequestError, KernelError: `kernels` names an operation or a backend that does not exist; nothing was loaded.
        RequestError: `weights`, `kv_dtype` or `activations` is unknown, a mesh would split groups of weights, or no
        weight has codes that int8 activations could be multiplied with.
    """
    runtime.enable_compilation_cache()
    named = checked_backends(kernels)
    check_kv_dtype(kv_dtype, current())
    check_kernels_once(notify)
    target = runtime.default_dtype() if dtype is None else jnp.dtype(dtype)
    wanted = None if weights is None else requested(weights)
    found = (
        Found(resolve(model, progress=progress, notify=notify))
        if convert
        else find(model, progress=progress, notify=notify)
    )
    with opened(found.path, name=found.name, revision=found.revision, dequantize=wanted is not None) as source:
        if wanted is not None:
            source = QuantizedSource(source, schemes(source.config, wanted))
        # Before anything slow: an adapter may belong to another model.
        several = adapter if isinstance(adapter, Mapping) else {} if adapter is None else {"": adapter}
        found_adapters = {
            name: one if isinstance(one, Adapter) else load_adapter(one, source.config) for name, one in several.items()
        }
        held = held_config(source.config, weights, split=mesh is not None, activations=activations)
        devices = _on_mesh(held, mesh, target, kv_dtype, notify)
        if found.converted is not None:
            # Those of checkpoints were checked when they were converted.
            check_tokenizer(source.files, source.config.vocab_size)
        tokenizer = tokenizer_from_files(source.files, source.path).for_model(source.config.vocab_size)
        if notify is not None and (note := tokenizer.without_rows(source.config.vocab_size)):
            notify(note)
        sharding = None if devices is None else param_sharding(source.config, devices)
        tell_notes(source, notify)
        params = load_source(source, dtype=target, sharding=sharding, verify=verify, progress=progress, notify=notify)
        whole = config = source.config
        generation_config = source.generation_config
    if config.schemes and not held.schemes:
        with on(devices):
            params, config = dequantize_params(params, config, target, donate=True)
    params, config = arrange(params, config.replace(activations=activations), devices, fuse=fuse, donate=True)
    prepare_products(config, named, notify)
    loaded = Model(
        params, config, devices, generation_config, str(model), named, kv_dtype, None if devices is None else whole
    )
    if isinstance(adapter, Mapping):
        return replace(loaded, adapters=found_adapters), tokenizer
    return (loaded if adapter is None else with_adapter(loaded, found_adapters[""])), tokenizer


def held_config(
    config: LlamaConfig, weights: str | None, *, split: bool, activations: str | None = None
) -> LlamaConfig:
    """The configuration of a model as loaded: its schemes are those of the arrays.

    Args:
      config: of its files; weights, activations: see `load`; split: whether it is spread over several devices.

    Raises:
      RequestError: `weights` or `activations` is unknown, or does not fit the model.
    """
    if (wanted := requested(weights)) is not None:
        held = config.replace(schemes=schemes(config.replace(schemes=()), wanted))
    else:
        form = weights or usual_form(current(), config.schemes, split=split, activations=activations)
        held = config.replace(schemes=()) if form == FLOAT else config
    check_activations(held, activations)
    return held


def check_kernels_once(notify: Callable[[str], None] | None = None) -> None:
    """On a GPU, the check of `llama_jax.kernels.checking.startup`; nothing on a CPU, which runs the references."""
    if current().vendor != "cpu":
        self_check(notify)


def prepare_products(
    config: LlamaConfig, kernels: Mapping[str, str], notify: Callable[[str], None] | None = None
) -> None:
    """Builds the CPU's kernel for int8 activations, where the model has them and no other is named."""
    named = kernels.get("integer_matmul", "auto")
    if config.activations is not None and current().vendor == "cpu" and named in ("auto", "native"):
        library.prepare(notify)


def _on_mesh(
    config: LlamaConfig,
    mesh: MeshRequest,
    dtype: jnp.dtype,
    kv_dtype: str | None,
    notify: Callable[[str], None] | None,
) -> DeviceMesh | None:
    """The devices. Refuses a mesh of no use; says what was chosen, and what is not simply split."""
    devices = resolve_mesh(mesh, config, dtype, notify, kv_dtype=kv_dtype)
    if devices is None:
        return None
    check(config, devices)
    for split in explain(config, devices):
        if split.note and notify is not None and split.size is not None:
            notify(str(split))
    return devices
