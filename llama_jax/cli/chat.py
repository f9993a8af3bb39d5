"""`llama-jax chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import (
    LoadOptions,
    check_drafts,
    draft_model_option,
    drafts_option,
    examples,
    given,
    load_options,
    model_option,
    quiet_option,
    requested_mesh,
    sampling_options,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.server_options import ServerOptions, server_options

if TYPE_CHECKING:
    from llama_jax.cli.chat_partner import Partner


@click.command(
    name="chat",
    epilog=examples(
        "llama-jax chat",
        'llama-jax chat --system "You answer in one sentence." --temperature 0.3',
        "llama-jax chat --resume talk.json --history ~/.llama_jax_history",
        "llama-jax chat --url http://127.0.0.1:8000",
        "printf 'Hello!\\nAnd who are you?\\n' | llama-jax chat --seed 1",
    ),
)
@model_option
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help="Maximum number of tokens in an answer. [default: the rest of the context]",
)
@click.option(
    "--temperature", type=float, metavar="T", help="0 takes the likeliest token. [default: the model's own, or 0.7]"
)
@sampling_options
@drafts_option
@draft_model_option
@load_options
@server_options
@click.option(
    "--history",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep your input history in FILE, readable only by you. Off by default.",
)
@click.option(
    "--resume",
    metavar="FILE.json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Resume a conversation that /save wrote.",
)
@click.option("--plain", is_flag=True, help="Show answers as plain text, without rendering markdown.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print each answer as one JSON object on a line of its own.")
def command(
    model: str,
    system: str | None,
    drafts: int,
    draft_model: str | None,
    loading: LoadOptions,
    server: ServerOptions,
    history: Path | None,
    resume: Path | None,
    plain: bool,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Talk to a model, in this process or with --url behind any server with OpenAI's API; /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D quits, Alt-Enter starts a new line. Nothing is written to disk unless you ask for it
    by --history or /save. In a pipe, every line is a message (or a block between two lines of three quotes), answers go
    to standard output, and the first error ends the chat.
    """
    from llama_jax.cli.chat_conversation import Conversation, default_sampling
    from llama_jax.cli.chat_files import load_conversation
    from llama_jax.cli.chat_screen import Screen
    from llama_jax.cli.inputs import valid

    # Everything possible is checked before the model is loaded, which may take minutes.
    check_drafts(drafts, draft_model)
    remote = server.remote(("model", "drafts", "draft_model"))
    screen = Screen(as_json=as_json, quiet=quiet, plain=plain)
    conversation = Conversation() if resume is None else load_conversation(resume.expanduser())
    if system is not None:
        conversation = conversation.with_system(valid(system, "the system prompt", param="system"))
    default_sampling({}, given(fields))

    from llama_jax.cli.chat_commands import COMMANDS, settable
    from llama_jax.cli.chat_partner import There
    from llama_jax.cli.chat_session import Session

    words = [*(f"/{name}" for name in (*COMMANDS, "exit")), *(f"/set {name}" for name in settable())]
    read = screen.reader(None if history is None else history.expanduser(), words)
    with contextlib.ExitStack() as stack:
        partner: Partner
        advised: Mapping[str, Any] = {}
        if remote is None:
            partner, advised = _here(model, loading, drafts, draft_model, quiet=quiet)
        else:
            partner = stack.enter_context(contextlib.closing(There(remote, server.name)))
        sampling, origin = default_sampling(advised, given(fields))
        session = Session(partner, screen, conversation=conversation, sampling=sampling, origin=origin)
        if not quiet:
            screen.note(f"{partner.name} on {partner.about}; /help lists commands")
            if resume is not None:
                screen.note(f"{len(conversation.all_messages)} messages from {resume}")
        session.run(read)


def _here(
    model: str, loading: LoadOptions, drafts: int, draft_model: str | None, *, quiet: bool
) -> tuple[Partner, Mapping[str, Any]]:
    """A model in this process, and its makers' recommended sampling parameters."""
    from llama_jax.cli.chat_partner import Here
    from llama_jax.generation.llm import LLM
    from llama_jax.text.chat import select_template

    devices = requested_mesh(loading.mesh, loading.tp)
    with Reporter(quiet=quiet) as reporter:
        loaded, tokenizer = loading.load(model, devices, reporter)
        draft = loading.load_draft(draft_model, loaded, tokenizer, reporter)
        reporter.warn_of_unused_gpu()
    select_template(tokenizer.chat_templates, None, has_tools=False)
    return Here(LLM(loaded, tokenizer, rows=1, drafts=drafts, draft=draft)), loaded.generation_config
