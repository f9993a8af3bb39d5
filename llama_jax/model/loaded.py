"""A model that has been loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llama_jax.cache import check_kv_dtype, stored_dtype
from llama_jax.config import LlamaConfig
from llama_jax.model.weights import compute_dtype
from llama_jax.params import Params, count_params
from llama_jax.runtime import device_name
from llama_jax.sharding import DeviceMesh
from llama_jax.targets import current

if TYPE_CHECKING:
    from llama_jax.adapters import Adapter


@dataclass(frozen=True, repr=False)
class Model:
    """Everything that `forward` and the generate functions need.

    Attributes:
      params: parameter tree on its devices, canonical (`llama_jax.params`) or fused (`llama_jax.model.fuse`).
      config: what the model is; on a mesh with more devices than key/value heads, with these heads repeated
        (`layout.split_config`).
      mesh: the devices that the parameters are sharded over, with its rules; or None for one device.
      generation_config: contents of the model's generation_config.json.
      name: what it was loaded from.
      kv_dtype: what caches keep keys and values in, one of `cache.KV_DTYPES`; None for the dtype.
      source_config: on a mesh the config as the model's files have it; None if `config` is that.
      adapters: those that requests can name (`llama_jax.adapters`); none of them is in `params`.
      kernels: the backend of operations in the programs that compute with it, by name (`kernels.dispatch.using`).
    """

    params: Params
    config: LlamaConfig
    mesh: DeviceMesh | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    kernels: Mapping[str, str] = field(default_factory=dict)
    kv_dtype: str | None = None
    source_config: LlamaConfig | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kv_dtype(self.kv_dtype, None if self.kv_dtype is None else current())

    def __repr__(self) -> str:
        """One line: `Model(smollm2-135m-instruct, 134.5M parameters, float32, cpu:0)`."""
        size = f"{_in_words(count_params(self.config))} parameters"
        where = f"{self.device.platform}:{self.device.id}" if self.mesh is None else device_name(mesh=self.mesh)
        return f"Model({self.name or 'unnamed'}, {size}, {self.dtype.name}, {where})"

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype (`weights.compute_dtype`)."""
        return compute_dtype(self.params)

    @property
    def cache_dtype(self) -> str:
        """Name of what caches store keys and values in."""
        return stored_dtype(self.kv_dtype, self.dtype)

    @property
    def device(self) -> jax.Device:
        """The device of the parameters (the first, if there are several)."""
        return min(jax.tree.leaves(self.params["final_norm"])[0].devices(), key=lambda d: d.id)

    @property
    def devices(self) -> list[jax.Device]:
        """All devices of the parameters."""
        return [self.device] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, by the model's config and its generation config."""
        extra = self.generation_config.get("eos_token_id")
        ids = () if extra is None else tuple(extra) if isinstance(extra, list | tuple) else (extra,)
        return tuple(sorted({*self.config.eos_token_ids, *ids}))


def _in_words(count: int) -> str:
    """A number of parameters as people write it: 134.5M, 8.0B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
