"""`generate`, `stream_generate` and `batch_generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llama_jax.adapters import Adapter
from llama_jax.adapters.models import AdapterLike, open_adapter, with_adapter
from llama_jax.cache import DEFAULT_PAGE_SIZE
from llama_jax.engine.settings import BIASES, STOP_IDS
from llama_jax.engine.sizing import rows_for
from llama_jax.generation.jobs import FORESEEN
from llama_jax.generation.llm import LLM
from llama_jax.generation.outputs import RequestOutput, StreamOutput
from llama_jax.generation.request import Prompt, Requests, check_prompts, check_stream, prepare, sampling
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams, widths
from llama_jax.sharding import ruled
from llama_jax.text.tokenizer import Tokenizer


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    kv_dtype: str | None = None,
    adapter: AdapterLike | None = None,
    **fields: Any,
) -> str:
    """Continues one prompt and returns the new text.

    Args:
      tokenizer: None for token ids in, token ids out.
      prompt: text, continued verbatim, or token ids. For a conversation pass `encode_chat(tokenizer, messages)`.
      params: sampling parameters. Without them decoding is greedy.
      page_size: tokens per cache page: 16, 32, 64, 128 or 256; the answer is the same.
      kv_dtype: "int8", "k8v4", "int4" or "fp8" for a quantised cache (`load`); by default the model's own.
      adapter: name of one of the model's adapters (`load`), a folder, or an `Adapter`.
      fields: fields of SamplingParams, e.g. `max_tokens=128`.

    Raises:
      RequestError: a parameter is out of range, or prompt and max_tokens exceed the model's context.
    """
    outputs = batch_generate(
        model,
        tokenizer,
        [prompt],
        params,
        page_size=page_size,
        kv_dtype=kv_dtype,
        adapter=adapter,
        **fields,
    )
    return outputs[0].text


def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    kv_dtype: str | None = None,
    adapter: AdapterLike | None = None,
    **fields: Any,
) -> Iterator[StreamOutput]:
    """Continues one prompt token by token. Closing the generator stops generation.

    Arguments and errors as for `generate`; n must be 1, and max_tokens not 0. Errors are raised here, not at the first
    token.
    """
    requests = prepare(model, tokenizer, [prompt], sampling(params, fields))
    model = model if adapter is None else with_adapter(model, adapter)
    check_stream(requests)
    return _llm(model, tokenizer, requests, page_size, kv_dtype).stream_of(requests)


def batch_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    kv_dtype: str | None = None,
    adapter: AdapterLike | Sequence[AdapterLike | None] | None = None,
    **fields: Any,
) -> list[RequestOutput]:
    """Continues several prompts as one batch on the device.

    With `max_tokens=0` and `prompt_logprobs` it only scores them: no token is drawn, and no decode step compiled.

    Args:
      prompts: texts or lists of token ids.
      params: one for all prompts, or one for each.
      page_size, kv_dtype: as for `generate`.
      adapter: as for `generate`, of all prompts, or one for each, None for none.
      fields: fields of SamplingParams for all prompts, instead of `params` or overriding them.

    Returns:
      One output per prompt, in order.
    """
    check_prompts(prompts)
    if not len(prompts):
        return []
    names: str | list[str] = ""
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        named = {_name(one): open_adapter(model, one) for one in adapter if one is not None}
        model, names = replace(model, adapters=named), ["" if one is None else _name(one) for one in adapter]
    else:
        model = replace(model, adapters={}) if adapter is None else with_adapter(model, adapter)
    requests = prepare(model, tokenizer, prompts, sampling(params, fields), names)
    outputs = dict(_llm(model, tokenizer, requests, page_size, kv_dtype).each_of(requests))
    return [outputs[i] for i in range(len(prompts))]


def _name(adapter: AdapterLike) -> str:
    return str(id(adapter)) if isinstance(adapter, Adapter) else str(adapter)


def _llm(model: Model, tokenizer: Tokenizer | None, requests: Requests, page_size: int, kv_dtype: str | None) -> LLM:
    """An engine for these requests, which reuses the programs of earlier calls of similar size."""
    rows = rows_for(model, -(-len(requests.rows) // ruled(model.mesh).ways("batch")))
    stop_ids, biases = widths(requests.params, model.eos_token_ids)
    return LLM(
        model,
        tokenizer,
        room=max(len(requests.prompt_of(i)) + min(row.limit, FORESEEN) for i, row in enumerate(requests.rows)),
        rows=rows,
        decode_rows=(rows,),
        kv_dtype=kv_dtype,
        page_size=page_size,
        prefix_cache=False,
        greedy=all(row.greedy for row in requests.rows) or None,
        stop_ids=max(STOP_IDS, stop_ids),
        biases=max(BIASES, biases),
    )
