"""Calls of attention as real models make them: to test, to compile for every target, and to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import CODES, SCHEMES, Codes, Visibility

FULL = Visibility()


@dataclass(frozen=True)
class AttentionShape:
    """One call of `llama_jax.kernels.attention.attention`.

    Attributes:
      q_len: queries of a row, its last tokens; kv_len: slots of a row, all filled.
      page_size: slots of a page; 0: rows, not pages.
      sinks, segments: whether the call has them.
      in_order: the queries are all the tokens.
      scheme: of quantised keys and values (`records.SCHEMES`); "": they are numbers.
      indexed: whether queries are packed in one axis (`Places.q_index`).
      batch_invariant: see `Rule`.
      backward: whether training calls it, so that gradients are wanted.
    """

    name: str
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    visibility: Visibility = FULL
    dtype: str = "bfloat16"
    page_size: int = 0
    soft_cap: float | None = None
    sinks: bool = False
    segments: bool = False
    in_order: bool = False
    indexed: bool = False
    scheme: str = ""
    batch_invariant: bool = False
    backward: bool = False

    def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The array arguments of the call, by name."""

        def struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        slots = (self.batch, self.kv_heads, self.kv_len)
        if self.page_size:
            slots = (self.batch * self.kv_len // self.page_size, self.kv_heads, self.page_size)
        queries = (1, self.batch * self.q_len) if self.indexed else (self.batch, self.q_len)
        k, v = (
            struct(*slots, self.head_dim // kind.per_byte, dtype=kind.dtype)
            for kind in self._kinds or (Codes(self.dtype, 1, 1),) * 2
        )
        made = {
            "q": struct(*queries, self.q_heads, self.head_dim, dtype=self.dtype),
            "k": k,
            "v": v,
            "q_positions": struct(self.batch, self.q_len),
            "kv_positions": struct(self.batch, self.kv_len),
        }
        if self.scheme:
            made |= {f"{name}_scale": struct(*slots, dtype=jnp.bfloat16) for name in "kv"}
        if self.indexed:
            made["q_index"] = struct(self.batch, self.q_len)
        if self.sinks:
            made["sinks"] = struct(self.q_heads, dtype=jnp.float32)
        if self.segments:
            made |= {"q_segments": struct(self.batch, self.q_len), "kv_segments": struct(self.batch, self.kv_len)}
        if self.page_size:
            made["page_table"] = struct(self.batch, self.kv_len // self.page_size)
        return made

    def options(self) -> dict[str, Any]:
        """The other arguments, by name."""
        options: dict[str, Any] = {"visibility": self.visibility, "scale": self.head_dim**-0.5}
        if self.soft_cap is not None:
            options["soft_cap"] = self.soft_cap
        if self.in_order:
            options["in_order"] = True
        if self.batch_invariant:
            options["batch_invariant"] = True
        return options

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Arrays for a call: random numbers; consecutive positions; with segments, two texts in a row; pages, and
        packed queries, in any order."""
        made = {}
        for name, struct in self.arguments().items():
            key, own = jax.random.split(key)
            if name.endswith("_scale"):  # with these codes are about as large as normal numbers
                unit = 2 / self._kinds[name.startswith("v")].largest
                made[name] = jax.random.uniform(own, struct.shape, struct.dtype, unit, 2 * unit)
            elif struct.dtype == jnp.int8:
                made[name] = jax.random.randint(own, struct.shape, -127, 128, struct.dtype)
            elif struct.dtype == jnp.uint8:
                made[name] = jax.random.bits(own, struct.shape, struct.dtype)
            elif str(struct.dtype).startswith("float8"):
                made[name] = jax.random.uniform(own, struct.shape, jnp.bfloat16, -1, 1).astype(struct.dtype)
            elif jnp.issubdtype(struct.dtype, jnp.floating):
                made[name] = jax.random.normal(own, struct.shape, struct.dtype)
            elif name in ("page_table", "q_index"):
                made[name] = jax.random.permutation(own, math.prod(struct.shape)).reshape(struct.shape)
            else:
                slots = jnp.arange(self.kv_len, dtype=jnp.int32)[-struct.shape[1] :]
                values = slots // self._text if name.endswith("segments") else slots
                made[name] = jnp.broadcast_to(values, struct.shape)
        return {name: x.astype(self.arguments()[name].dtype) for name, x in made.items()}

    def pairs(self) -> int:
        """Pairs of a query and a slot that it sees, of one head."""
        total, window = 0, self.visibility.window
        for position in range(self.kv_len - self.q_len, self.kv_len):
            seen = {"full": position, "sliding": min(position, window - 1), "chunked": position % max(window, 1)}
            of_its_text = position % self._text if self.segments else position
            total += min(seen[self.visibility.kind], of_its_text) + 1
        return total * self.batch

    @property
    def _kinds(self) -> list[Codes]:
        """Of the codes of keys and of values; none where they are numbers."""
        return [CODES[kind] for kind in SCHEMES.get(self.scheme, ())]

    @property
    def _text(self) -> int:
        """Tokens of the first of two texts in a row."""
        return -(-self.kv_len // 2)

    def flops(self, *, backward: bool = False) -> int:
        """Floating point operations over visible pairs: two products; for gradients alone five, of which one is made
        again."""
        return self.pairs() * self.q_heads * self.head_dim * 2 * (5 if backward else 2)

    def bytes(self) -> int:
        """Bytes of queries, output, and the keys and values that some query sees, each once."""
        first, window = self.kv_len - self.q_len, self.visibility.window
        unseen = {"sliding": max(first - window + 1, 0), "chunked": first // max(window, 1) * window}
        slots = self.kv_len - unseen.get(self.visibility.kind, 0)
        row = self.head_dim * jnp.dtype(self.dtype).itemsize
        of_cache = sum(self.head_dim // kind.per_byte + 2 for kind in self._kinds) or 2 * row
        return self.batch * (2 * self.q_len * self.q_heads * row + slots * self.kv_heads * of_cache)


def prefill(
    name: str, batch: int, tokens: int, q_heads: int, kv_heads: int, head_dim: int, **more: Any
) -> AttentionShape:
    """A call of a whole prompt at once."""
    return AttentionShape(name, batch, tokens, tokens, q_heads, kv_heads, head_dim, in_order=True, **more)


def _chunks(model: str, q_heads: int, kv_heads: int, head_dim: int) -> tuple[AttentionShape, ...]:
    """Blocks of packed prompts, as many as a step has: 512 tokens of 8 rows at most, 2048 of 16 and of 8."""
    return tuple(
        AttentionShape(
            f"{model}-chunks-{size}", blocks, size, 8192, q_heads, kv_heads, head_dim, page_size=64, indexed=True
        )
        for size, blocks in ((64, 15), (128, 31), (256, 15))
    )


LLAMA_8B = prefill("llama-3.1-8b", 4, 4096, 32, 8, 128, backward=True)
LLAMA_1B = prefill("llama-3.2-1b", 4, 4096, 32, 8, 64, backward=True)

PREFILLS = (
    LLAMA_8B,
    replace(LLAMA_8B, name="llama-3.1-8b-f16", dtype="float16"),
    prefill("llama-3.1-70b-one-of-8", 1, 4096, 8, 1, 128),
    AttentionShape("llama-3.1-8b-short-chunk", 4, 32, 4096, 32, 8, 128),
    AttentionShape("llama-3.1-8b-paged-16", 4, 512, 8192, 32, 8, 128, page_size=16),
    AttentionShape("llama-3.1-8b-paged-128", 4, 512, 8192, 32, 8, 128, page_size=128),
    AttentionShape("llama-3.1-8b-int8", 4, 4096, 4096, 32, 8, 128, scheme="int8"),
    AttentionShape("llama-3.1-8b-int8-paged-64", 4, 512, 8192, 32, 8, 128, page_size=64, scheme="int8"),
    AttentionShape("llama-3.2-1b-int8-paged-16", 4, 512, 8192, 32, 8, 64, page_size=16, scheme="int8"),
    AttentionShape("gemma-2-9b-heads-int8", 1, 8192, 8192, 16, 8, 256, soft_cap=50.0, scheme="int8"),
    *_chunks("llama-3.1-8b", 32, 8, 128),
    AttentionShape(
        "llama-3.1-8b-int8-chunks-128", 31, 128, 8192, 32, 8, 128, page_size=64, indexed=True, scheme="int8"
    ),
    AttentionShape("llama-3.1-8b-fp8-paged-64", 4, 512, 8192, 32, 8, 128, page_size=64, scheme="fp8"),
    AttentionShape("llama-3.1-8b-fp8-fnuz-paged-64", 4, 512, 8192, 32, 8, 128, page_size=64, scheme="fp8_fnuz"),
    AttentionShape("llama-3.1-8b-int4", 4, 4096, 4096, 32, 8, 128, scheme="int4"),
    AttentionShape("llama-3.1-8b-k8v4-paged-64", 4, 512, 8192, 32, 8, 128, page_size=64, scheme="k8v4"),
    AttentionShape("llama-3.2-1b-int4-paged-16", 4, 512, 8192, 32, 8, 64, page_size=16, scheme="int4"),
    AttentionShape("gemma-2-9b-heads-int4", 1, 8192, 8192, 16, 8, 256, soft_cap=50.0, scheme="int4"),
    AttentionShape(
        "llama-3.1-8b-int4-chunks-128", 31, 128, 8192, 32, 8, 128, page_size=64, indexed=True, scheme="int4"
    ),
    *_chunks("llama-3.1-70b-one-of-8", 8, 1, 128),
    replace(LLAMA_8B, name="llama-3.1-8b-packed", in_order=False, segments=True),
    LLAMA_1B,
    replace(LLAMA_1B, name="llama-3.2-1b-f32", dtype="float32", batch=1, q_len=512, kv_len=512),
    prefill("smollm2-135m", 8, 512, 9, 3, 64, backward=True),
    prefill("llama-2-7b", 2, 4096, 32, 32, 128),
    prefill("mistral-7b", 1, 8192, 32, 8, 128, visibility=Visibility("sliding", 4096)),
    prefill("llama-4-scout", 1, 16384, 40, 8, 128, visibility=Visibility("chunked", 8192)),
    prefill("phi-2-heads", 1, 2048, 32, 32, 80, backward=True),
    prefill("phi-3-mini-heads", 1, 4096, 32, 32, 96, backward=True),
    prefill(
        "gemma-2-9b-heads", 1, 8192, 16, 8, 256, visibility=Visibility("sliding", 4096), soft_cap=50.0, backward=True
    ),
    prefill("gpt-oss-20b-heads", 1, 4096, 64, 8, 64, visibility=Visibility("sliding", 128), sinks=True),
)
"""Shapes that the kernels are tested and compiled with. Names with "heads" are those of models of other families."""

MEASURED_PREFILLS = tuple(
    replace(shape, name=f"{shape.name}-b{batch}-t{tokens}", batch=batch, q_len=tokens, kv_len=tokens)
    for shape in (LLAMA_8B, LLAMA_1B)
    for tokens, batch in ((512, 32), (1024, 16), (2048, 8), (4096, 4), (8192, 2), (16384, 1), (32768, 1))
)
"""Prompts of 512 to 32k tokens, the same number in all up to 16k."""


def _decodes(model: str, q_heads: int, kv_heads: int, head_dim: int) -> tuple[AttentionShape, ...]:
    return tuple(
        AttentionShape(
            f"{model}-b{batch}-s{kv_len}{f'-paged-{page}' if page else ''}",
            *(batch, 1, kv_len, q_heads, kv_heads, head_dim),
            page_size=page,
        )
        for batch, kv_len in ((8, 4096), (64, 4096), (1, 32768), (1, 131072))
        for page in (0, 16, 128)
    )


MEASURED_DECODES = (*_decodes("llama-3.1-8b", 32, 8, 128), *_decodes("llama-3.2-1b", 32, 8, 64))
"""One token a row over long caches, dense and paged: to measure."""

DECODES = (
    *(shape for shape in MEASURED_DECODES if shape.batch == 8 or shape.kv_len == 131072),
    AttentionShape("llama-3.1-8b-drafts-4", 8, 4, 4096, 32, 8, 128, page_size=16),
    AttentionShape("llama-3.1-8b-drafts-8", 8, 8, 4096, 32, 8, 128, page_size=128),
    AttentionShape("llama-3.1-8b-f16", 8, 1, 4096, 32, 8, 128, dtype="float16", page_size=64),
    AttentionShape("llama-3.1-8b-f32", 2, 1, 1024, 32, 8, 128, dtype="float32"),
    AttentionShape("llama-3.1-70b-one-of-8", 8, 1, 4096, 8, 1, 128, page_size=256),
    AttentionShape("llama-3.1-8b-b256-s4096-paged-64", 256, 1, 4096, 32, 8, 128, page_size=64),
    AttentionShape(
        "llama-3.1-8b-b256-s4096-fixed-shares", 256, 1, 4096, 32, 8, 128, page_size=64, batch_invariant=True
    ),
    AttentionShape("llama-3.1-70b-one-of-8-b256-s4096-paged-64", 256, 1, 4096, 8, 1, 128, page_size=64),
    AttentionShape("llama-3.1-8b-blocks-of-8", 64, 8, 4096, 32, 8, 128, page_size=64),
    AttentionShape(
        "heads-40-8-chunked-8192", 1, 1, 16384, 40, 8, 128, visibility=Visibility("chunked", 8192), page_size=32
    ),
    AttentionShape("llama-3.1-8b-window-4096", 8, 1, 8192, 32, 8, 128, visibility=Visibility("sliding", 4096)),
    AttentionShape("heads-9-3", 8, 1, 2048, 9, 3, 64),
    AttentionShape("phi-2-heads", 8, 1, 2048, 32, 32, 80),
    AttentionShape("phi-3-mini-heads", 8, 1, 4096, 32, 32, 96, page_size=64),
    AttentionShape("gemma-2-9b-heads", 8, 1, 8192, 16, 8, 256, visibility=Visibility("sliding", 4096), soft_cap=50.0),
    AttentionShape("gemma-2-9b-heads-drafts-8", 8, 8, 8192, 16, 8, 256, page_size=64, soft_cap=50.0),
    AttentionShape(
        "gpt-oss-20b-heads", 8, 1, 4096, 64, 8, 64, visibility=Visibility("sliding", 128), sinks=True, page_size=16
    ),
    AttentionShape("llama-3.1-8b-int8-b8-s4096", 8, 1, 4096, 32, 8, 128, scheme="int8"),
    AttentionShape("llama-3.1-8b-int8-b8-s4096-paged-16", 8, 1, 4096, 32, 8, 128, page_size=16, scheme="int8"),
    AttentionShape("llama-3.1-8b-int8-b256-s4096-paged-64", 256, 1, 4096, 32, 8, 128, page_size=64, scheme="int8"),
    AttentionShape("llama-3.1-8b-int8-drafts-8", 8, 8, 4096, 32, 8, 128, page_size=64, scheme="int8"),
    AttentionShape("llama-3.2-1b-int8-b8-s4096-paged-64", 8, 1, 4096, 32, 8, 64, page_size=64, scheme="int8"),
    AttentionShape("gemma-2-9b-heads-int8", 8, 1, 8192, 16, 8, 256, page_size=64, soft_cap=50.0, scheme="int8"),
    AttentionShape("llama-3.1-8b-fp8-b8-s4096-paged-64", 8, 1, 4096, 32, 8, 128, page_size=64, scheme="fp8"),
    AttentionShape("llama-3.1-8b-fp8-fnuz-b8-s4096-paged-64", 8, 1, 4096, 32, 8, 128, page_size=64, scheme="fp8_fnuz"),
    AttentionShape("llama-3.1-8b-int4-b8-s4096", 8, 1, 4096, 32, 8, 128, scheme="int4"),
    AttentionShape("llama-3.1-8b-int4-b256-s4096-paged-64", 256, 1, 4096, 32, 8, 128, page_size=64, scheme="int4"),
    AttentionShape("llama-3.1-8b-k8v4-b8-s4096-paged-64", 8, 1, 4096, 32, 8, 128, page_size=64, scheme="k8v4"),
    AttentionShape("llama-3.1-8b-int4-drafts-8", 8, 8, 4096, 32, 8, 128, page_size=64, scheme="int4"),
    AttentionShape("llama-3.2-1b-int4-b8-s4096-paged-64", 8, 1, 4096, 32, 8, 64, page_size=64, scheme="int4"),
    AttentionShape("gemma-2-9b-heads-int4", 8, 1, 8192, 16, 8, 256, page_size=64, soft_cap=50.0, scheme="int4"),
    AttentionShape("one-kv-head-drafts-8", 8, 8, 2048, 16, 1, 128, page_size=64),
)
"""Shapes that the kernels are compiled for. Names with "heads" are the head shapes of models of other families."""
