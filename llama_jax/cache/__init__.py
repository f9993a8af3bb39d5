"""Key/value caches as pytrees, behind one protocol (`KVCache`) that hides their layout from the model."""

from __future__ import annotations

from functools import partial

import jax
from jax.typing import DTypeLike

from llama_jax.cache.dense import DENSE_AXES, DenseCache
from llama_jax.cache.paged import DEFAULT_PAGE_SIZE, NO_PAGE, PAGE_SIZES, PagedCache, check_page_size
from llama_jax.cache.pool import PagePool
from llama_jax.cache.protocol import KVCache, LayerCache
from llama_jax.config import LlamaConfig

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "DENSE_AXES",
    "NO_PAGE",
    "PAGE_SIZES",
    "DenseCache",
    "KVCache",
    "LayerCache",
    "PagePool",
    "PagedCache",
    "check_page_size",
    "create_cache",
]


@partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames=("page_size",))
def create_cache(
    config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike, *, page_size: int | None = None
) -> KVCache:
    """An empty cache, made by one program: dense, or with a page size paged, with pages for every slot.

    Raises:
      RequestError: a page cannot have that size.
    """
    if page_size is None:
        return DenseCache.create(config, batch, capacity, dtype)
    return PagedCache.create(config, batch, capacity, dtype, page_size=page_size)
