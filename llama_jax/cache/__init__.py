"""Key/value caches as pytrees, behind one protocol (`KVCache`) that hides their layout from the model."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.typing import DTypeLike

from llama_jax.cache.dense import DENSE_AXES, DenseCache
from llama_jax.cache.paged import DEFAULT_PAGE_SIZE, PAGE_SIZES, PagedCache, check_page_size
from llama_jax.cache.pages import NO_PAGE
from llama_jax.cache.pool import PagePool
from llama_jax.cache.protocol import KVCache, LayerCache
from llama_jax.cache.stored import KV_DTYPES, check_kv_dtype, pair_bytes, stored_dtype
from llama_jax.config import LlamaConfig

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "DENSE_AXES",
    "KV_DTYPES",
    "NO_PAGE",
    "PAGE_SIZES",
    "DenseCache",
    "KVCache",
    "LayerCache",
    "NewCache",
    "PagePool",
    "PagedCache",
    "check_kv_dtype",
    "check_page_size",
    "pair_bytes",
    "stored_dtype",
]


@jax.tree_util.register_static
@dataclass(frozen=True)
class NewCache:
    """A deferred cache: prefill makes it within its first program. A pytree without leaves.

    Attributes:
      rows, capacity: of the cache; dtype: of keys and values, or a name of `KV_DTYPES`.
      page_size: slots of a page, of which there are enough for every slot; None for a dense cache.
    """

    rows: int
    capacity: int
    dtype: DTypeLike
    page_size: int | None = None

    def create(self, config: LlamaConfig) -> KVCache:
        """The cache, empty.

        Raises:
          RequestError: a page cannot have that size.
        """
        if self.page_size is None:
            return DenseCache.create(config, self.rows, self.capacity, self.dtype)
        return PagedCache.create(config, self.rows, self.capacity, self.dtype, page_size=self.page_size)
