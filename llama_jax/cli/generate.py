"""`llama-jax generate`: continue a prompt, or answer a conversation."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli import inputs
from llama_jax.cli.adapter_options import recorded
from llama_jax.cli.options import (
    LoadOptions,
    examples,
    given,
    json_option,
    load_options,
    model_option,
    page_size_option,
    quiet_option,
    receipt_option,
    requested_mesh,
    sampling_options,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, write_text
from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.model.loaded import Model
    from llama_jax.sampling import SamplingParams
    from llama_jax.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
NO_NEXT_TOKEN = 1
"""Exit code of an answer that ended because its next logits were not finite."""


@click.command(
    name="generate",
    epilog=examples(
        'llama-jax generate "The capital of France is"',
        'llama-jax generate "Once upon a time" --temperature 0.8 --seed 7 --max-tokens 100',
        "llama-jax generate - < prompt.txt",
        "llama-jax generate --messages conversation.json --json",
    ),
)
@click.argument("prompt", required=False)
@model_option
@click.option(
    "--messages", metavar="FILE.json", help="Answer this conversation, a list of role and content; - is standard input."
)
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help=f"Maximum number of new tokens. [default: {DEFAULT_MAX_TOKENS}, or what the context leaves]",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
)
@sampling_options
@page_size_option
@load_options
@receipt_option
@quiet_option
@json_option
def command(
    prompt: str | None,
    model: str,
    messages: str | None,
    page_size: int,
    loading: LoadOptions,
    receipt: Path | None,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> int:
    """Continue PROMPT verbatim, or answer --messages through the model's chat template.

    PROMPT "-" reads standard input. New text is streamed to standard output; model, device, dtype and speed go to
    standard error. --json prints one object at the end: text, token_ids, prompt_token_ids, finish_reason, ttft_ms,
    prompt_tps, generation_tps, device, model, dtype. With --receipt and no --seed, a random seed is drawn and recorded.
    """
    if (prompt is None) == (messages is None):
        raise click.UsageError("give either a PROMPT or --messages FILE.json")
    # Everything possible is checked before the model is loaded, which may take minutes.
    text = None if prompt is None else inputs.read_prompt(prompt)
    conversation = None if messages is None else inputs.read_messages(messages)

    from llama_jax.sampling import SamplingParams

    params = SamplingParams(**{"max_tokens": None, **given(fields)})
    params.check_generates("an answer" if conversation is not None else "a continuation")
    if receipt is not None and params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbits(63))
    devices = requested_mesh(loading.mesh, loading.tp)
    with Reporter(quiet=quiet) as reporter:
        loaded, tokenizer = loading.load(model, devices, reporter)
        reporter.warn_of_unused_gpu()
    if conversation is not None:
        from llama_jax.text.chat import encode_chat

        ids = encode_chat(tokenizer, conversation)
    else:
        from llama_jax.generation import encode_prompt

        assert text is not None
        ids = encode_prompt(tokenizer, text)
    params = _limited(params, loaded, len(ids))
    if as_json:
        tokens, failed = _print_object(loaded, tokenizer, ids, params, page_size)
    else:
        tokens, failed = _stream(loaded, tokenizer, ids, params, page_size, quiet=quiet)
    if receipt is not None:
        from llama_jax.receipts.making import made, request_json

        adapters = recorded(loading.adapters)
        load = {"weights": loading.weights, "convert": loading.convert, "adapters": adapters}
        made(loaded, [request_json(ids, params, [tokens])], load=load, run={"page_size": page_size}).save(receipt)
    return NO_NEXT_TOKEN if failed else 0


def _limited(params: SamplingParams, model: Model, prompt_length: int) -> SamplingParams:
    """Without a limit of the user's: the default one, or less where the context ends sooner."""
    from llama_jax.generation import token_limit

    if params.max_tokens is not None:
        return params
    room = token_limit(model.config, prompt_length, None)
    limit = min(max(DEFAULT_MAX_TOKENS, params.min_tokens), room)
    if params.min_tokens > limit:
        raise RequestError(
            f"min_tokens={params.min_tokens}, but the context leaves room for {room}",
            param="min_tokens",
            hint="shorten the prompt, or ask for less",
        )
    return dataclasses.replace(params, max_tokens=limit)


def _stream(
    model: Model, tokenizer: Tokenizer, ids: list[int], params: SamplingParams, page_size: int, *, quiet: bool
) -> tuple[list[int], bool]:
    """Prints the text as it comes; returns the new token ids, and whether there was no next one."""
    from llama_jax.generation import stream_generate
    from llama_jax.runtime import device_name

    steps = stream_generate(model, tokenizer, ids, params, page_size=page_size)
    if not quiet:
        click.echo(f"{model.name} on {device_name(model.device, model.mesh)} in {model.dtype.name}", err=True)
    last = None
    tokens = []
    ended_line = True
    try:
        for last in steps:
            tokens += [last.token] * (last.token >= 0)
            if last.text:
                write_text(last.text)
                ended_line = last.text.endswith("\n")
    finally:
        # Also after Ctrl-C: the text so far stays, and the shell's prompt starts on a new line.
        if not ended_line:
            write_text("\n")
        if last and not quiet:
            end = "the next logits were not finite" if last.finish_reason == "error" else last.finish_reason
            click.echo(
                f"{last.prompt_tokens} prompt tokens at {last.prompt_tps:.1f} tokens/s, "
                f"{last.generation_tokens} new at {last.generation_tps:.1f} tokens/s, "
                f"first after {last.ttft_s * 1000:.0f} ms, end: {end or 'interrupted'}",
                err=True,
            )
    return tokens, last is not None and last.finish_reason == "error"


def _print_object(
    model: Model, tokenizer: Tokenizer, ids: list[int], params: SamplingParams, page_size: int
) -> tuple[list[int], bool]:
    """Prints the result as one object; returns the new token ids, and whether there was no next one."""
    from llama_jax.generation import batch_generate
    from llama_jax.runtime import device_name

    (output,) = batch_generate(model, tokenizer, [ids], params, page_size=page_size)
    (completion,) = output.outputs
    print_json(
        {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "prompt_token_ids": list(output.prompt_token_ids),
            "finish_reason": completion.finish_reason,
            "ttft_ms": round(output.timing.ttft_s * 1000, 3),
            "prompt_tps": round(output.timing.prompt_tps, 3),
            "generation_tps": round(output.timing.generation_tps, 3),
            "device": device_name(model.device, model.mesh),
            "model": model.name,
            "dtype": model.dtype.name,
        }
    )
    return list(completion.token_ids), completion.finish_reason == "error"
