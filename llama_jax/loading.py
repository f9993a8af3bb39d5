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
from llama_jax.config import LlamaConfig
from llama_jax.fuse import fuse_in_place
from llama_jax.models import DEFAULT_MODEL, resolve
from llama_jax.params import Params
from llama_jax.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Model:
    """What `forward` and the generate functions need.

    Attributes:
      params: parameter tree on its devices, canonical (`llama_jax.params`) or fused (`llama_jax.fuse`).
      config: what the model is.
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
    mesh: jax.sharding.Mesh | None = None,
    verify: bool = True,
    fuse: bool = True,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[Model, Tokenizer]:
    """Loads a model, converting it into the cache first if it is not an Orbax checkpoint yet.

    Args:
      model: the default model's name, a folder (Orbax checkpoint, Hugging Face or Meta), a GGUF file, or "org/name" on
        the Hugging Face hub.
      dtype: compute dtype; by default float32 on a CPU and bfloat16 on a GPU.
      mesh: reserved for several devices; the parameters are replicated over it.
      verify: whether to check every tensor's digest while loading.
      fuse: whether to join projections that share their input (`llama_jax.fuse`), which is faster; False keeps the
        canonical tree, for training or for `Llama`.
      progress: called while converting and loading.
      notify: called with one line of text before anything that takes long or uses the network.

    Raises:
      LlamaJaxError: the subclass says what is wrong; see `llama_jax.errors`.
    """
    runtime.enable_compilation_cache()
    path = resolve(model, progress=progress, notify=notify)
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path)
    params = load_params(
        path,
        dtype=runtime.default_dtype() if dtype is None else jnp.dtype(dtype),
        sharding=None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        verify=verify,
        progress=progress,
    )
    if fuse:
        fuse_in_place(params, checkpoint.config)
    return Model(params, checkpoint.config, mesh, checkpoint.generation_config, str(model)), tokenizer
