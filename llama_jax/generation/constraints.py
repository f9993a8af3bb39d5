"""Constraints on each next token, made from the fields of a request."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax import plugins
from llama_jax.errors import LlamaJaxError, RequestError, did_you_mean
from llama_jax.sampling import BadWords, Constraint, Grammar, SamplingParams
from llama_jax.sampling.constraints import LogitsProcessor
from llama_jax.text.grammar import GrammarMatcher
from llama_jax.text.tokenizer import Tokenizer


def has_constraints(params: SamplingParams) -> bool:
    """Whether `constraints_of` makes any, which may take long."""
    return bool(params.bad_words or params.logits_processors or params.response_format)


def constraints_of(
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Sequence[int],
) -> tuple[Constraint, ...]:
    """New constraints for one continuation of a prompt; none for most requests.

    Raises:
      RequestError: llguidance rejects the grammar, the vocabulary cannot spell a bad word, a processor is unknown or
        rejects the request, or they need a tokenizer and there is none.
    """
    made: list[Constraint] = []
    if params.bad_words:
        encode = _needed(tokenizer, "bad_words").encode
        made.append(
            BadWords.of(params.bad_words, lambda text: encode(text, add_special_tokens=False), vocab_size),
        )
    if isinstance(params.response_format, Grammar):
        known = _needed(tokenizer, "response_format")
        made.append(GrammarMatcher.of(params.response_format, known, vocab_size, eos_token_ids))
    for name in params.logits_processors:
        try:
            made.append(_processor(name)(tokenizer, tuple(prompt), params))
        except LlamaJaxError:
            raise
        except Exception as error:  # third-party code may raise anything
            message = f"the logits processor {name!r} failed: {type(error).__name__}: {error}"
            raise _bad_processor(message, "ask whoever made it") from error
    return tuple(made)


def _needed(tokenizer: Tokenizer | None, param: str) -> Tokenizer:
    if tokenizer is None:
        raise RequestError(f"{param} needs a tokenizer", param=param, hint="pass one with the model")
    return tokenizer


def _processor(name: str) -> LogitsProcessor:
    known = {plugin.name: plugin.value for plugin in plugins.sound(plugins.LOGITS_PROCESSORS)}
    if name in known:
        return known[name]
    hint = did_you_mean(name, known) or "`llama-jax plugins` lists those that are installed"
    raise _bad_processor(f"there is no logits processor {name!r}", hint + plugins.reports(plugins.LOGITS_PROCESSORS))


def _bad_processor(message: str, hint: str) -> RequestError:
    return RequestError(message, param="logits_processors", hint=hint)
