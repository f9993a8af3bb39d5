"""Key/value caches as pytrees, behind one small protocol that hides their layout from the model."""

from __future__ import annotations

from jax.typing import DTypeLike

from llama_jax.cache.dense import DENSE_AXES, DenseCache
from llama_jax.cache.paged import DEFAULT_PAGE_SIZE, PAGE_SIZES, PagedCache, check_page_size
from llama_jax.cache.pool import PagePool
from llama_jax.cache.protocol import KVCache, LayerCache
from llama_jax.config import LlamaConfig

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "DENSE_AXES",
    "PAGE_SIZES",
    "Cache",
    "DenseCache",
    "KVCache",
    "LayerCache",
    "PagePool",
    "PagedCache",
    "check_page_size",
    "create_cache",
]

Cache = DenseCache | PagedCache
"""Caches that generation can use: `KVCache`, and `capacity`, `grow`, `rows` besides."""


def create_cache(
    config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike, *, page_size: int | None = None
) -> Cache:
    """An empty cache: dense, or with a page size paged.

    Raises:
      RequestError: a page cannot have that size.
    """
    if page_size is None:
        return DenseCache.create(config, batch, capacity, dtype)
    return PagedCache.create(config, batch, capacity, dtype, page_size=page_size)
