"""From a model's name to a `Model` and its tokenizer, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax import runtime
from llama_jax.checkpoint import Progress, load_params, open_checkpoint
from llama_jax.checkpoint.leaf_builder import Shardings
from llama_jax.config import LlamaConfig
from llama_jax.convert.direct import load_source, opened
from llama_jax.kernels.checking.startup import self_check
from llama_jax.layout import check, explain, param_sharding
from llama_jax.library import DEFAULT_MODEL, find, resolve
from llama_jax.model.fuse import arrange
from llama_jax.params import Params
from llama_jax.plan import MeshRequest, resolve_mesh
from llama_jax.targets import current
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files
from llama_jax.text.tokenizer.check import check_tokenizer


@dataclass(frozen=True)
class Model:
    """What `forward` and the generate functions need.

    Attributes:
      params: parameter tree on its devices, canonical (`llama_jax.params`) or fused (`llama_jax.model.fuse`).
      config: what the model is; on a mesh with more devices than key/value heads, with these heads repeated
        (`sharding.split_config`).
      mesh: the devices that the parameters are sharded over, or None for one device.
      generation_config: contents of the model's generation_config.json.
      name: what it was loaded from.
    """

    params: Params
    config: LlamaConfig
    mesh: jax.sharding.Mesh | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype: that of the embedding."""
        return self.params["embed"]["weight"].dtype

    @property
    def device(self) -> jax.Device:
        """The device of the parameters (the first, if there are several)."""
        return min(self.params["embed"]["weight"].devices(), key=lambda d: d.id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, by the model's config and its generation config."""
        extra = self.generation_config.get("eos_token_id")
        ids = () if extra is None else tuple(extra) if isinstance(extra, list | tuple) else (extra,)
        return tuple(sorted({*self.config.eos_token_ids, *ids}))


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    dtype: DTypeLike | None = None,
    mesh: MeshRequest = None,
    convert: bool = True,
    verify: bool = True,
    fuse: bool = True,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[Model, Tokenizer]:
    """Loads a model, converting it into the cache first if it is not an Orbax checkpoint yet.

    On a GPU the kernels are compared with their references first, once a device and version; one that computes
    something else is not chosen. LLAMA_JAX_SELF_CHECK=0 leaves that out.

    Args:
      model: the default model's name, a folder (Orbax checkpoint, Hugging Face or Meta), a GGUF file, or "org/name" on
        the Hugging Face hub.
      dtype: compute dtype; by default float32 on a CPU and bfloat16 on a GPU.
      mesh: devices to spread the model over, by the rules of `llama_jax.sharding`: heads, hidden units and the
        vocabulary over its axis "tensor", rows of a batch over "data". A mesh without "tensor" holds a copy of the
        parameters on every device. What is not simply split is told to `notify`. "auto" chooses, from the devices that
        are here and their free memory: as few devices for a copy of the model as hold it with as many rows as there are
        devices, of 4096 tokens, and the others for further copies (`llama_jax.plan.AutoMesh` states other numbers).
        What it has chosen, and why, is told to `notify`, and stands in the model's `mesh`, None for one device.
      convert: False reads a source in another format as it is and puts no converted copy on the disk: the same tree,
        though there are no digests to check, and quantised weights are decoded anew each time.
      verify: whether to check every tensor while loading: its digest, or, where there is none (`convert=False`), that
        it holds neither NaN nor infinity.
      fuse: whether to join projections that share their input (`llama_jax.model.fuse`), which is faster; False keeps
        the canonical tree, for training or for `Llama`.
      progress: called while converting and loading.
      notify: called with one line of text before anything that takes long or uses the network.

    Raises:
      LlamaJaxError: the subclass says what is wrong; see `llama_jax.errors`. DoesNotFit: "auto" finds no mesh.
    """
    runtime.enable_compilation_cache()
    check_kernels_once(notify)
    target = runtime.default_dtype() if dtype is None else jnp.dtype(dtype)
    found = None if convert else find(model, progress=progress, notify=notify)
    if found is None or found.converted is None:
        path = resolve(model, progress=progress, notify=notify) if found is None else found.path
        checkpoint = open_checkpoint(path)
        config, generation_config, tokenizer = checkpoint.config, checkpoint.generation_config, load_tokenizer(path)
        devices = _placed(config, mesh, target, notify)
        params = load_params(
            path, dtype=target, sharding=_sharding(config, devices), verify=verify, progress=progress, config=config
        )
    else:
        with opened(found.path, name=found.name, revision=found.revision) as source:
            config, generation_config = source.config, source.generation_config
            devices = _placed(config, mesh, target, notify)
            check_tokenizer(source.files)
            tokenizer = tokenizer_from_files(source.files, found.path)
            params = load_source(
                source, dtype=target, sharding=_sharding(config, devices), verify=verify, progress=progress
            )
    split = arrange(params, config, devices, fuse=fuse)
    return Model(params, split, devices, generation_config, str(model)), tokenizer


def check_kernels_once(notify: Callable[[str], None] | None = None) -> None:
    """On a GPU, the check of `llama_jax.kernels.checking.startup`; nothing on a CPU, which runs the references."""
    if current().vendor != "cpu":
        self_check(notify)


def _sharding(config: LlamaConfig, mesh: jax.sharding.Mesh | None) -> Shardings:
    return None if mesh is None else param_sharding(config, mesh)


def _placed(
    config: LlamaConfig, mesh: MeshRequest, dtype: jnp.dtype, notify: Callable[[str], None] | None
) -> jax.sharding.Mesh | None:
    """The devices. Refuses a mesh of no use; says what was chosen, and what is not simply split."""
    devices = resolve_mesh(mesh, config, dtype, notify)
    if devices is None:
        return None
    check(config, devices)
    for split in explain(config, devices):
        if split.note and notify is not None and split.size is not None:
            notify(str(split))
    return devices
