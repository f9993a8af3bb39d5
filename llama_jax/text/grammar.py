"""Grammars over a model's tokens, using llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.sampling import Grammar
from llama_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_TEXT_ENDS = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")
"""Reasons for a matcher to stop that are not faults."""

DEADLINE_S = 10.0
"""Time limit for compiling a grammar. Most take a millisecond, very large schemas a second."""

LONGEST, STACK_BYTES = 250_000, 512 << 20
"""The most characters of a grammar, and the stack for compiling it: enough for a chain of rules of that length, at some
8 kB per rule. Only the used part of the stack takes memory."""

_starting = threading.Lock()
"""Held while the stack size of new threads is changed, since that is process-wide."""


class GrammarMatcher:
    """A `Constraint` that keeps a text within a grammar. Ids that end a text are allowed exactly where the text is
    complete; if nothing else may follow it has ended, with or without such an id.
    """

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    @classmethod
    def of(
        cls, grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int] = ()
    ) -> GrammarMatcher:
        """A matcher at the start of a text.

        Args:
          vocab_size: of the model; ids that its tokenizer does not have are never allowed.
          eos_token_ids: ids that end a text.

        Raises:
          RequestError: llguidance rejects the grammar, with its own message.
        """
        # A copy takes 9 µs, compiling 1 ms.
        return cls(_compiled(grammar, tokenizer, vocab_size, tuple(eos_token_ids)).deep_copy())

    def mask(self, out: np.ndarray) -> None:
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        out &= allowed[: len(out)]

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    def fork(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy())

    def forced(self) -> Sequence[int]:
        return self._matcher.compute_ff_tokens()

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped() and self.error is None

    @property
    def error(self) -> str | None:
        return _error(self._matcher)


def _error(matcher: LLMatcher) -> str | None:
    """The reason why a matcher cannot continue; None while it can. It never raises; its masks then allow an end."""
    if matcher.is_error():
        return matcher.get_error().removesuffix("<non-verbose/>").strip() or "the grammar has failed"
    reason = matcher.stop_reason()
    return None if reason in _TEXT_ENDS else f"the grammar has stopped: {reason}"


@functools.lru_cache(maxsize=256)
def _compiled(grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLMatcher:
    """A matcher to copy. llguidance limits the size of a grammar and its parser's work, but neither compile time nor
    recursion depth: a chain of 5000 rules would overflow the stack and end the process.

    Raises:
      RequestError: it is rejected, longer than `LONGEST`, or takes longer than `DEADLINE_S`.
      LlamaJaxError: no thread can be started for it.
    """
    if len(grammar.text) > LONGEST:
        raise _refused(grammar, f"it has {len(grammar.text)} characters, and may have {LONGEST}")
    vocabulary = _vocabulary(tokenizer, vocab_size, eos_token_ids)
    made: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            made.set_result(_compile(grammar, vocabulary))
        except BaseException as error:
            made.set_exception(error)

    # A daemon thread, since it cannot be stopped.
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="llama_jax grammar", daemon=True).start()
        except RuntimeError as error:
            raise LlamaJaxError(
                f"a grammar needs a thread with {STACK_BYTES >> 20} MiB of stack to compile in: {error}",
                hint="raise the process's limits of address space and threads (ulimit -v, ulimit -u)",
            ) from None
        finally:
            threading.stack_size(before)
    try:
        return made.result(DEADLINE_S)
    except TimeoutError:
        raise _refused(grammar, f"compiling it takes longer than {DEADLINE_S:g} s") from None


def _compile(grammar: Grammar, vocabulary: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    try:
        match grammar.kind:
            case "json_schema":  # spaces between parts cost tokens, and a model may write them for ever
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_flexible": False})
            case "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            case "lark":
                text = LLMatcher.grammar_from_lark(grammar.text)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
    except ValueError as error:
        raise _refused(grammar, str(error)) from None
    matcher.compute_bitmask()  # some errors appear only now
    if problem := _error(matcher):
        raise _refused(grammar, problem)
    return matcher


def _refused(grammar: Grammar, why: str) -> RequestError:
    return RequestError(
        f"the {grammar.kind.replace('_', ' ')} cannot be used: {' '.join(why.split())}",
        param="response_format",
        hint="llguidance's documentation says what it supports: https://github.com/guidance-ai/llguidance",
    )


class _Vocabulary:
    """A tokenizer as `LLTokenizer` needs it, with an entry for each id of the model."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]):
        known = min(size, tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.bytes_of(i) for i in range(known)] + [b""] * (size - known)
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted({i for i in tokenizer.special_ids if i < size} | {*eos_token_ids})

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer

    # Without an id that ends a text, one past the model's represents the end: it is never drawn.
    ends = [*eos_token_ids] or [vocab_size]
    size = max(vocab_size, *(end + 1 for end in ends))
    vocabulary: Any = _Vocabulary(tokenizer, size, ends)
    return LLTokenizer(vocabulary, n_vocab=size, eos_token=ends)
