"""Runs a receipt's requests again, and says what differs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import CheckpointError, RequestError, VerificationError
from llama_jax.generation import batch_generate
from llama_jax.model.loaded import Model
from llama_jax.receipts.making import adapters_digests, environment, kernels, params_digest, params_of
from llama_jax.receipts.record import Receipt
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Difference:
    """A continuation whose tokens differ.

    Attributes:
      request, copy: indices of the request and of its continuation; of a batch file the line's number, and 0.
      at: index of the first token that differs.
      was, now: token ids from there on, at most 8; of a line whose tokens are not recorded, none.
    """

    request: int
    copy: int
    at: int
    was: tuple[int, ...] = ()
    now: tuple[int, ...] = ()


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    Attributes:
      compared: continuations, or lines of a batch file.
      tokens: that differ, continuation by continuation.
      changed: what else differs from the receipt: name, then and now. It may explain tokens that differ.
    """

    compared: int
    tokens: Sequence[Difference]
    changed: Mapping[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether all tokens are those of the receipt."""
        return not self.tokens


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raises CheckpointError for what a damaged receipt lacks."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"the receipt is damaged: {e!r}", hint="make the receipt again") from e


def check_model(receipt: Receipt, model: Model) -> None:
    """Raises VerificationError if the model is not the receipt's."""
    found = params_digest(model.params)
    if found != receipt.model.get("digest"):
        raise VerificationError(
            f"the receipt is of a model with the digest {receipt.model.get('digest')}, this one has {found}",
            hint="load the same weights in the same form; `load` in the receipt has the options",
        )
    was, now = receipt.model.get("adapters", {}), adapters_digests(model)
    if was != now:
        raise VerificationError(
            f"the receipt is of a model with the adapters {was}, this one has {now}",
            hint="load the same adapters under the same names",
        )


def replay(receipt: Receipt, model: Model, tokenizer: Tokenizer | None = None) -> Replay:
    """Runs the requests of a receipt again.

    Args:
      model: loaded in the same way: with the same dtype, weights and mesh.
      tokenizer: needed for stop strings and structured output.

    Raises:
      VerificationError: the model has other parameters.
      RequestError: the receipt is of a batch file, which `llama-jax replay` runs.
      CheckpointError: the receipt is damaged.
    """
    if receipt.batch:
        raise RequestError(
            "the receipt is of a batch file", param="receipt", hint="use `llama-jax replay`, or run the batch again"
        )
    check_model(receipt, model)
    with reading():
        prompts = [request["prompt_token_ids"] for request in receipt.requests]
        params = [params_of(request["params"]) for request in receipt.requests]
        expected = [request["token_ids"] for request in receipt.requests]
        page_size = int(receipt.run["page_size"])
        if [len(each) for each in expected] != [each.n for each in params]:
            raise ValueError("continuations are missing")
    outputs = batch_generate(model, tokenizer, prompts, params, page_size=page_size)
    found = [[list(c.token_ids) for c in output.outputs] for output in outputs]
    differing = [
        difference
        for request, (was, now) in enumerate(zip(expected, found, strict=True))
        for copy, (before, after) in enumerate(zip(was, now, strict=True))
        if (difference := first_difference(request, copy, before, after)) is not None
    ]
    return Replay(sum(map(len, found)), differing, changed(receipt, model))


def first_difference(request: int, copy: int, was: Sequence[int], now: Sequence[int]) -> Difference | None:
    """None for the same tokens."""
    if list(was) == list(now):
        return None
    pairs = zip(was, now, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(was), len(now)))
    return Difference(request, copy, at, tuple(was[at : at + 8]), tuple(now[at : at + 8]))


def changed(receipt: Receipt, model: Model) -> dict[str, tuple[Any, Any]]:
    """Other changes since: versions, device, flags, kernels."""
    now, was = environment(model), receipt.environment
    found = {name: (was.get(name), now[name]) for name in ("device", "devices", "platform", "python")}
    for group in ("versions", "flags"):
        before, after = was.get(group, {}), now[group]
        found |= {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}

    def by_call(choices: Sequence[Mapping[str, str]]) -> dict[str, str]:
        return {f"{c['operation']} {c['dtype']} {c['shape']}": c["backend"] for c in choices}

    before, after = by_call(receipt.kernels), by_call(kernels())
    # Programs of other sizes are no difference: only kernels of the same calls are compared.
    found |= {name: (before[name], after[name]) for name in sorted(before.keys() & after.keys())}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}
