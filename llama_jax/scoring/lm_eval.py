"""The adapter between lm-eval and our models; in lm-eval's registry as `llama-jax` once this module is imported.

lm-eval 0.4.13 loads no entry points. Needs the extra `eval`; `scoring.tasks` imports it where that is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from llama_jax.checkpoint import Progress
from llama_jax.errors import RequestError, TemplateError
from llama_jax.generation.llm import LLM
from llama_jax.library import DEFAULT_MODEL
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.scoring.api import score, score_rolling
from llama_jax.scoring.pairs import encode_text, prefix_token
from llama_jax.text.chat import render_chat, select_template
from llama_jax.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
"""Of an answer whose task does not say, as lm-eval's own models have it."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""Generation settings of tasks that mean what they mean here."""


@register_model("llama-jax", "llama_jax")
class LlamaJaxLM(LM):
    """A model as lm-eval asks it.

    Attributes:
      max_length: tokens that the model reads, at most.
    """

    def __init__(
        self,
        pretrained: Model | str = DEFAULT_MODEL,
        tokenizer: Tokenizer | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: Progress | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        """Takes a loaded model, or loads one by name: `lm_eval --model llama-jax --model_args pretrained=NAME`.

        Args:
          max_length, batch_tokens, progress: as for `score`.
          batch_size, max_batch_size, device: lm-eval passes them; batches are counted in tokens here, and jax chooses
            the device.
          options: of `load`, for a name.
        """
        super().__init__()
        if isinstance(pretrained, Model):
            if tokenizer is None:
                raise RequestError("a loaded model needs its tokenizer", param="tokenizer", hint="pass both")
            self.model, self.tokenizer = pretrained, tokenizer
        else:
            self.model, self.tokenizer = load(pretrained, **options)
        self.max_length = self.model.config.context_length if max_length is None else int(max_length)
        self._progress = progress
        self._scoring: dict[str, Any] = {
            "max_length": self.max_length,
            "batch_tokens": batch_tokens,
            "progress": progress,
        }
        self._template: str | None = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each (context, continuation)."""
        scores = score(self.model, self.tokenizer, [request.args for request in requests], **self._scoring)
        found = [(one.logprob, one.is_greedy) for one in scores]
        return self._kept("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text; 0 of an empty one."""
        texts = [request.args[0] for request in requests]
        scores = iter(score_rolling(self.model, self.tokenizer, [text for text in texts if text], **self._scoring))
        found = [next(scores).logprob if text else 0.0 for text in texts]
        return self._kept("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string; contexts lose their beginning where there is no room.

        Raises:
          RequestError: a task asks for a setting that is not known here, or for more tokens than the context has.
        """
        asked = [self._request(*request.args) for request in requests]
        llm = LLM(self.model, self.tokenizer)  # not kept: its pages take the memory that scores need
        texts: dict[int, str] = {}
        for i, output in llm.each([prompt for prompt, _ in asked], [params for _, params in asked]):
            texts[i] = output.text
            if self._progress is not None:
                self._progress(len(texts), len(asked), "answers")
        return self._kept("generate_until", requests, [texts[i] for i in range(len(asked))])

    def _request(self, context: str, settings: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        """Token ids and sampling parameters of a context and lm-eval's generation settings."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        until, new = given.pop("until"), given.pop("max_gen_toks")
        sampled = given.pop("do_sample")
        if given.get("num_beams") == 1:
            del given["num_beams"]
        if unknown := set(given) - set(_SAMPLING):
            raise RequestError(
                f"the task generates with {', '.join(sorted(unknown))}, which is not supported",
                param="gen_kwargs",
                hint=f"known are until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}",
            )
        room = self.max_length - new
        if room < 1:
            raise RequestError(
                f"{new} new tokens leave no room for a context in {self.max_length}",
                param="max_gen_toks",
                hint="ask for fewer, or use a longer max_length",
            )
        known = {name: given[name] for name in _SAMPLING if name in given} if sampled else {"temperature": 0.0}
        # A control token is no part of the text that stop strings are looked for in.
        control = [self.tokenizer.special_tokens[text] for text in until if text in self.tokenizer.special_tokens]
        stop = [text for text in until if text and text not in self.tokenizer.special_tokens]
        params = SamplingParams(max_tokens=new, stop=stop, stop_token_ids=control, **known)
        ids = encode_text(self.tokenizer, context) or [prefix_token(self.tokenizer)]
        return ids[-room:], params

    def _kept[T](self, kind: str, requests: list[Instance], found: list[T]) -> list[T]:
        """Returns what was found, after putting it into lm-eval's cache of answers."""
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, one)
        return found

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval's prompt caches tell models apart."""
        return self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template in use; None without one.

        Raises:
          TemplateError: the model has none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        self._template = select_template(
            self.tokenizer.chat_templates, None if chat_template is True else chat_template, has_tools=False
        )
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation; without a generation prompt it ends within the last message, to be continued."""
        template = self._template or self.chat_template(True)
        assert template is not None

        def rendered(messages: Sequence[Mapping[str, str]]) -> str:
            names = self.tokenizer.special_tokens_map
            return render_chat(messages, template, add_generation_prompt=add_generation_prompt, special_tokens=names)

        try:
            text = rendered(chat_history)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = rendered(others)  # some templates have no system messages; lm-eval's models leave them out too
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()  # some templates strip messages
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """Model details that lm-eval writes beside its results."""
        return {"model_name": self.model.name, "model_dtype": self.model.dtype.name, "max_length": self.max_length}
