"""The arguments of attention: keys and values, positions of queries and slots, and the rule that relates them.

`KeysValues` and `Places` are pytrees of arrays, `Rule` is static. Every implementation takes all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.errors import KernelError


class Codes(NamedTuple):
    """A kind of quantised keys and values.

    Attributes:
      dtype: of the array that holds the codes.
      per_byte: codes in one number of it.
      largest: the largest number that a code represents (`numbers`).
    """

    dtype: str
    per_byte: int
    largest: int


CODES = {
    "int8": Codes("int8", 1, 127),
    "int4": Codes("uint8", 2, 15),
    "fp8": Codes("float8_e4m3fn", 1, 1),
    "fp8_fnuz": Codes("float8_e4m3fnuz", 1, 1),
}
"""Kinds of codes, by name. Floats are those of the OCP, and of CDNA 3: fnuz. Up to 1 both have the same numbers from
1/64, and steps below that are far smaller than those near 1."""

SCHEMES = {
    "int8": ("int8", "int8"),
    "k8v4": ("int8", "int4"),
    "int4": ("int4", "int4"),
    "fp8": ("fp8", "fp8"),
    "fp8_fnuz": ("fp8_fnuz", "fp8_fnuz"),
}
"""Kinds of the codes of keys and of values, by a name for both."""


def numbers(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Decodes codes [..., bytes] without their scales: [..., head_dim], exact in every dtype.

    Codes of eight bits, integers or floats, are the numbers. Two of four bits, c in the low half of a byte and d in the
    high one, represent 2c - 15 in the first half of a head and 2d - 15 in the second: odd numbers, as many below 0 as
    above.
    """
    if codes.dtype == jnp.uint8:
        halves = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
        codes = 2 * halves.astype(jnp.int8) - 15
    return codes.astype(dtype)


@dataclass(frozen=True)
class Visibility:
    """The positions a query sees: its own and earlier ones, unless the kind is "all".

    Attributes:
      kind: "full"; "sliding", the last `window` positions, its own included; "chunked", those of its own chunk of
        `window` positions; "all", every slot that is not empty, at any position (cross attention).
    """

    kind: Literal["full", "sliding", "chunked", "all"] = "full"
    window: int = 0


@dataclass(frozen=True)
class Rule:
    """The static part of a call.

    Attributes:
      visibility: which positions a query sees.
      scale: factor on the logits, usually head_dim ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv:2408.00118, section 2).
      in_order: the caller guarantees that positions are 0, 1, 2, ... in every row of queries and of slots, no padding.
        A backend that masks by index rather than by position (cuDNN) needs it; positions are given all the same.
      chunk_rows: a guarantee of the caller: at most N rows have more than one packed query; None: any number may.
        It bounds the blocks that these are cut into. Queries beyond it give NaN where they are not padding.
      batch_invariant: what a query gets must be the same to the bit, whatever other rows are in the call. Of packed
        queries those of a row are then cut into the same blocks if a multiple of `packed.block_multiple` stands before
        them in other calls, and `chunk_rows` guarantees that at most N rows have any.
    """

    visibility: Visibility
    scale: float
    soft_cap: float | None = None
    in_order: bool = False
    chunk_rows: int | None = None
    batch_invariant: bool = False


# Part of jit's cache key: programs traced within are traced again.
_batch_invariant = jax.make_user_context(False)


@contextmanager
def batch_invariant(wanted: bool = True) -> Iterator[None]:
    """Sets `Rule.batch_invariant` of the model's attention for everything traced inside."""
    with _batch_invariant(wanted):
        yield


def is_batch_invariant() -> bool:
    """Returns whether this is within `batch_invariant`."""
    return bool(_batch_invariant.value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """Keys and values: one row of slots for each row of queries, or pages shared by all rows.

    Attributes:
      k, v: [batch, kv_heads, kv_len, head_dim]; query head i uses key/value head i // (q_heads // kv_heads). With a
        page table [pages, kv_heads, page_size, head_dim].
      page_table: int32 [batch, kv_len // page_size]; slot s of row b is slot s % page_size of page
        page_table[b, s // page_size]. Entries whose slots all have negative positions may hold any number.
      k_scale, v_scale: factors on quantised keys and values, of k's or v's shape without head_dim; of both or neither.
        A key's scale is a factor on its logits, a value's one on its weights, so that codes are multiplied as they are.
        Two codes of four bits are in a byte, so that the last axis of what has them is head_dim // 2.
    """

    k: Any
    v: Any
    page_table: Any = None
    k_scale: Any = None
    v_scale: Any = None

    @property
    def quantised(self) -> bool:
        """Whether keys and values are codes."""
        return self.k_scale is not None

    @property
    def scheme(self) -> str:
        """The name of what keys and values are stored in, a key of `SCHEMES`; "" where they are no codes."""
        dtypes = [str(x.dtype) for x in (self.k, self.v)]
        found = (name for name, kinds in SCHEMES.items() if [CODES[kind].dtype for kind in kinds] == dtypes)
        return next(found, "") if self.quantised else ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Positions of queries and slots, and their grouping. Segments and spans are given for both or for neither.

    Attributes:
      q_positions: int32 [batch, q_len], the position of each query in its text; negative for padding.
      kv_positions: int32 [batch, kv_len], likewise for each slot; negative for an empty or padded slot.
      q_segments, kv_segments: int32 [batch, q_len] and [batch, kv_len]; with them, only equal segments see each other.
      rows: int32 [1, q_len], for queries packed into one row: the row of keys, page table and `kv_*` that each belongs
        to. Rows beyond the last are padding. None: query and row share a batch index.
      q_spans, kv_spans: int32 [batch, q_len] and [batch, kv_len]; tokens of one span >= 0 (an image) see each other
        whatever their order, within their segment; -1 for none.
      q_index: int32 [batch, q_len], where each query is among queries [1, n, q_heads, head_dim] that are packed in one
        axis, as the result is; n where there is none. What is no row's query has no meaning in the result. Only for
        backends that are `Backend.indexed`, from `packed_attention`.
    """

    q_positions: Any
    kv_positions: Any
    q_segments: Any = None
    kv_segments: Any = None
    rows: Any = None
    q_spans: Any = None
    kv_spans: Any = None
    q_index: Any = None


def refuse_gradients(kv: KeysValues) -> None:
    """Raises KernelError for quantised keys and values, which no kernel differentiates."""
    if kv.quantised:
        raise KernelError(
            "attention has no gradient for quantised keys and values",
            hint="differentiate with a cache in the model's dtype",
        )


def beyond_kernels(kv: KeysValues, places: Places, rule: Rule) -> str | None:
    """The reason why no kernel can run a call so far, for `unsupported`; None if one can."""
    if (kv.k_scale is None) != (kv.v_scale is None):
        return "it takes scales of both keys and values, or of neither"
    if kv.quantised and not kv.scheme:
        return f"codes are {kv.k.dtype} and {kv.v.dtype}, it takes {', '.join(SCHEMES)}"
    if places.rows is not None or places.q_index is not None:
        return "it takes no packed queries"
    if places.q_spans is not None or places.kv_spans is not None:
        return "it knows no spans of tokens that see each other"
    if rule.visibility.kind == "all":
        return "it knows causal order only, and here queries see all"
    return None


def by_row(q: jax.Array, kv: KeysValues, places: Places) -> tuple[jax.Array, KeysValues, Places]:
    """Packed queries [1, n, ...] as n batch rows of one query each, beside the keys of their rows.

    Rows without a page table are copied for each of their queries.
    """
    rows = places.rows[0]

    def take(x: Any, fill: int) -> Any:
        return None if x is None else jnp.take(jnp.asarray(x), rows, axis=0, mode="fill", fill_value=fill)

    def column(x: Any) -> Any:
        return None if x is None else x[0][:, None]

    if kv.page_table is None:
        kv = jax.tree.map(lambda x: take(x, 0), kv)
    else:
        kv = replace(kv, page_table=take(kv.page_table, -1))
    at = Places(
        q_positions=column(places.q_positions),
        kv_positions=take(places.kv_positions, -1),
        q_segments=column(places.q_segments),
        kv_segments=take(places.kv_segments, -1),
        q_spans=column(places.q_spans),
        kv_spans=take(places.kv_spans, -1),
    )
    return q[0][:, None], kv, at
