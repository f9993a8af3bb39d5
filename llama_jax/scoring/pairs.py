"""Texts as token ids to condition on and token ids to score, cut exactly as lm-eval 0.4.13 cuts them.

Source: lm-evaluation-harness, `TemplateLM._encode_pair` and `loglikelihood`, `HFLM.tok_encode` and
`_loglikelihood_tokens`, `utils.get_rolling_token_windows` and `make_disjoint_window`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama_jax.errors import RequestError
from llama_jax.generation.request import Prompt, encode_prompt
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Token ids to score behind others, neither of them empty.

    Attributes:
      dropped: tokens that the context had in front, and lost to fit (`fitted`).
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    dropped: int = 0

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last one, which is only predicted."""
        return len(self.context) + len(self.continuation) - 1


def prefix_token(tokenizer: Tokenizer | None) -> int:
    """The token that a text without context is conditioned on: BOS, or the end of text where there is no BOS.

    Raises:
      RequestError: the tokenizer has neither, or there is none.
    """
    for token in () if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise RequestError(
        "an empty context needs a first token, and there is no tokenizer with a BOS or EOS token",
        param="context",
        hint="give a context of at least one token",
    )


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with what the tokenizer adds unless the text spells its prefix token already."""
    first = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer.encode(text, add_special_tokens=not (first and text.startswith(first)))


def encode_pair(tokenizer: Tokenizer | None, context: Prompt, continuation: Prompt) -> Pair:
    """Encodes a pair of texts, or takes a pair of token ids as they are.

    White space that ends the context moves to the continuation. Both are then encoded as one text, of which as many
    tokens are the context's as it has when it is encoded alone. An empty context becomes `prefix_token`.

    Raises:
      RequestError: nothing is left to score: an empty continuation, or one that merges into the context's last token;
        or a text and token ids, or a text without a tokenizer.
      TokenizerError: a text cannot be encoded.
    """
    if isinstance(context, str) != isinstance(continuation, str):
        raise RequestError(
            "a pair is two texts or two lists of token ids", param="pairs", hint="encode both or neither"
        )
    if isinstance(context, str) and isinstance(continuation, str):
        if tokenizer is None:
            raise RequestError("texts need a tokenizer", param="pairs", hint="pass one, or pairs of token ids")
        head = context.rstrip()
        tail = context[len(head) :] + continuation
        if head:
            ids = encode_text(tokenizer, head)
            rest = encode_text(tokenizer, head + tail)[len(ids) :]
        else:
            ids, rest = [], tokenizer.encode(tail, add_special_tokens=False)
    else:
        ids, rest = ([] if len(part) == 0 else encode_prompt(None, part) for part in (context, continuation))
    if not ids:
        # A continuation that begins with the prefix token itself does not get a second one.
        ids = [prefix_token(tokenizer)]
        rest = rest[1:] if rest[:1] == ids else rest
    if not rest:
        what = f"{continuation!r:.100} behind {context!r:.100}"
        raise RequestError(
            f"there is no token to score: {what}",
            param="continuation",
            hint="a continuation needs a token of its own; this one is empty, or merges into the context's last token",
        )
    return Pair(tuple(ids), tuple(rest))


def fitted(pair: Pair, max_length: int) -> Pair:
    """The pair without the beginning of its context, where the model would read more than `max_length` tokens.

    Raises:
      RequestError: the continuation alone is longer.
    """
    if len(pair.continuation) > max_length:
        raise RequestError(
            f"a continuation of {len(pair.continuation)} tokens exceeds the longest input, {max_length}",
            param="continuation",
            hint="score long texts in windows: score_rolling",
        )
    over = max(pair.length - max_length, 0)
    return Pair(pair.context[over:], pair.continuation, over) if over else pair


def windows(tokens: Sequence[int], prefix: int, max_length: int, overlap: int = 1) -> Iterator[Pair]:
    """Windows over a text in which each token is scored once.

    The first window scores `max_length` tokens behind the prefix token. Each later one reads `max_length` tokens, of
    which at least `overlap` are context; the last has as much context as there is room for.

    Args:
      overlap: from 1 to max_length.
    """
    text = (prefix, *tokens)
    done = 0
    while done < len(tokens):
        new = min(len(tokens) - done, max_length - (overlap - 1 if done else 0))
        end = done + new
        yield Pair(text[max(end - max_length, 0) : done + 1], text[done + 1 : end + 1])
        done = end
