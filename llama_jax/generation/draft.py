"""Draft models as callers specify them, and whether they match the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_jax.engine.draft_model import PADDING, check_draft
from llama_jax.errors import RequestError
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.text.tokenizer import Tokenizer


def opened_draft(
    draft: Model | str | Path | None, model: Model, tokenizer: Tokenizer | None, **options: Any
) -> Model | None:
    """The draft model as given, or loaded by name onto the model's devices.

    Args:
      options: of `load`.

    Raises:
      RequestError: it cannot draft for the model.
    """
    if draft is None:
        return None
    other = None
    if not isinstance(draft, Model):
        draft, other = load(draft, dtype=model.dtype, mesh=model.mesh, kv_dtype=model.kv_dtype, **options)
    check_draft(model, draft)
    if tokenizer and other:
        check_vocabularies(tokenizer, other)
    return draft


def check_vocabularies(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Raises RequestError if the draft model's token ids mean other tokens than the model's."""
    ids = range(min(tokenizer.vocab_size, other.vocab_size))
    differ = [i for i in ids if tokenizer.token(i) != other.token(i)]
    if len(differ) > PADDING:
        first = differ[0]
        raise RequestError(
            f"{len(differ)} tokens mean something else to the draft model: {first} is {other.token(first)!r} there and "
            f"{tokenizer.token(first)!r} here",
            param="draft",
            hint="a draft model needs the model's vocabulary: a smaller model of the same family",
        )
