"""`llama-jax chat`: the conversation without a terminal, the session over a pipe, and a real (pseudo-)terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_chat_model import write_chat_model

from llama_jax import encode_chat
from llama_jax.cli import chat_activity, chat_session, cli
from llama_jax.cli.chat_activity import LineActivity
from llama_jax.cli.chat_commands import COMMANDS
from llama_jax.cli.chat_conversation import (
    Command,
    Conversation,
    default_sampling,
    is_open,
    parse_input,
    setting_names,
    with_setting,
)
from llama_jax.cli.chat_files import load_conversation, save_conversation
from llama_jax.cli.chat_partner import Here, Prompt
from llama_jax.cli.chat_screen import Screen
from llama_jax.cli.chat_session import Session
from llama_jax.errors import LlamaJaxError, RequestError, StorageError
from llama_jax.generation import generate
from llama_jax.generation.llm import LLM
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

Loaded = tuple[Model, Tokenizer]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture(scope="module")
def llm(loaded: Loaded) -> LLM:
    return LLM(*loaded, rows=1)


@pytest.fixture
def session(llm: LLM) -> Session:
    return Session(Here(llm), Screen(), conversation=Conversation(), sampling=GREEDY, origin="test")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hello\n", "hello"),
        ("  \n", None),
        ("/set seed 7\n", Command("set", "seed 7")),
        ("/help", Command("help", "")),
        ("//etc/hosts holds names", "/etc/hosts holds names"),
        ('"""a\nb"""\n', "a\nb"),
        ('"""\n/a\n  b\n"""', "/a\n  b"),
        ('""""""', None),
        ("/usr/bin\nand more", "/usr/bin\nand more"),
    ],
)
def test_input(text: str, parsed: object) -> None:
    assert parse_input(text) == parsed


def test_input_that_is_not_utf8() -> None:
    """Where the terminal's encoding lets such bytes through, they are no text for a server either."""
    with pytest.raises(RequestError, match="the message is not UTF-8"):
        parse_input("caf\udce9")
    result = CliRunner().invoke(cli, ["chat", "--system", "caf\udce9", "--url", "http://127.0.0.1:1"])
    assert (result.exit_code, "the system prompt is not UTF-8" in result.stderr) == (2, True)


def test_blocks_are_open_until_they_end() -> None:
    assert [is_open(t) for t in ('"""', '"""a', '"""a"""', '""""', 'a"""', '"""\n"""\n')] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]


def test_settings() -> None:
    p = with_setting(GREEDY, "temperature", "0.5")
    assert p.temperature == 0.5
    assert with_setting(p, "max_tokens", "none").max_tokens is None
    assert with_setting(p, "stop", "END").stop == ("END",)
    assert with_setting(p, "stop", '["a", "b"]').stop == ("a", "b")
    assert with_setting(p, "stop", "5").stop == ("5",)
    assert with_setting(p, "stop", "none").stop == ()
    assert with_setting(p, "stop_token_ids", "5").stop_token_ids == (5,)
    allowed = with_setting(p, "allowed_token_ids", "[5, 6]")
    assert allowed.allowed_token_ids == (5, 6)
    assert with_setting(allowed, "allowed_token_ids", "none").allowed_token_ids is None
    assert with_setting(p, "logit_bias", '{"3": 2}').logit_bias == {3: 2}
    assert with_setting(p, "seed", "7").seed == 7
    for name, value in (
        ("temperature", "hot"),
        ("temperature", "-1"),
        ("top_p", "0"),
        ("seed", "1.5"),
        ("logit_bias", "3"),
        ("stop_token_ids", "x"),
        ("n", "2"),
        ("temprature", "1"),
    ):
        with pytest.raises(RequestError) as caught:
            with_setting(p, name, value)
        assert caught.value.param == name
        assert caught.value.hint
    assert "temperature" in caught.value.hint
    assert not {"n", "prompt_logprobs"} & set(setting_names())


def test_default_sampling() -> None:
    p, origin = default_sampling({"temperature": 0.6, "top_k": 20, "eos_token_id": 2}, {"seed": 1})
    assert (p.temperature, p.top_k, p.top_p, p.seed, p.max_tokens) == (0.6, 20, 1.0, 1, None)
    assert "generation_config" in origin
    p, origin = default_sampling({"top_k": 20}, {"temperature": 0.1})
    assert (p.temperature, p.top_k, p.top_p) == (0.1, 0, 0.95)
    assert "generation_config" not in origin
    with pytest.raises(RequestError, match="temperature"):
        default_sampling({"temperature": -3}, {})


def test_files(tmp_path: Path) -> None:
    c = Conversation().asked("häh?\x1b[2J").answered("ja").with_system("s")
    path = tmp_path / "talk.json"
    save_conversation(c, path)
    assert mode(path) == 0o600
    assert load_conversation(path) == c
    assert json.loads(path.read_text())[0] == {"role": "system", "content": "s"}
    path.chmod(0o644)
    save_conversation(c.cleared(), path)
    assert mode(path) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    notes = tmp_path / "notes"
    notes.write_text("mine")
    with pytest.raises(StorageError, match="not replaced"):
        save_conversation(c, notes)
    assert notes.read_text() == "mine"
    with pytest.raises(StorageError):
        save_conversation(c, tmp_path / "no" / "folder")
    alien = '[{"role": "usr", "content": "x"}]'
    for bad in ("[", "{}", "[]", "[1]", '[{"role": "user"}]', '[{"role": "user", "content": [1]}]', alien):
        notes.write_text(bad)
        with pytest.raises(RequestError):
            load_conversation(notes)
    with pytest.raises(RequestError):
        load_conversation(tmp_path / "missing")


@pytest.mark.slow
def test_answers_are_those_of_generate(session: Session, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    messages: list[dict[str, str]] = []
    for text in ("Hello", "and\nthen?"):
        assert session.handle(f'"""{text}"""')
        messages.append(user(text))
        ids = encode_chat(loaded[1], messages)
        messages.append({"role": "assistant", "content": generate(*loaded, ids, GREEDY)})
        assert session.conversation.all_messages == messages
    out, err = capsys.readouterr()
    assert out == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    used = session.tokens_used(session.conversation)
    assert f"8 tokens, {0:.0f}"[:8] in err
    assert f"context {len(ids) + 8} of 256" in err
    assert "max_tokens=8 reached" in err
    assert used >= len(ids)


def test_commands(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("/system Be brief.", "one", "two"):
        session.handle(text)
    two = session.conversation
    assert [m["role"] for m in two.all_messages] == ["system", "user", "assistant", "user", "assistant"]
    session.handle("/undo")
    assert session.conversation == two.without_last_turn()
    session.handle(f"/save {tmp_path / 'talk.json'}")
    session.handle("/clear")
    assert session.conversation == Conversation(system="Be brief.")
    session.handle(f"/load {tmp_path / 'talk.json'}")
    assert session.conversation == two.without_last_turn()
    session.handle("/retry")
    assert session.conversation == two.without_last_turn()
    assert "will be the same" in capsys.readouterr().err
    session.handle("/set seed 3")
    session.handle("/set temperature 5")
    answers = set()
    for _ in range(4):
        session.handle("/retry")
        answers.add(session.conversation.messages[-1]["content"])
    assert len(answers) > 1
    session.handle("/system")
    session.handle("/show")
    session.handle("/help")
    out = capsys.readouterr().out
    assert "Be brief." in out
    assert f"{session.tokens_used(session.conversation)} of 256 tokens used" in out
    assert re.search(r"temperature +5", out)
    assert all(f"/{name}" in out for name in COMMANDS)
    session.handle("/trim 1")
    assert session.conversation.messages == ()
    session.handle("/clear")
    assert session.conversation == Conversation(system="Be brief.")
    session.handle('/system ""')
    assert session.conversation == Conversation()
    before = session.conversation, session.sampling
    for text in (
        "/sett x 1",
        "/set",
        "/set seed",
        "/set top_p 2",
        "/undo",
        "/retry",
        "/trim 5",
        "/save",
        "/load",
        "/save x",
    ):
        with pytest.raises(LlamaJaxError) as caught:
            session.handle(text)
        assert caught.value.hint, text
    assert (session.conversation, session.sampling) == before
    assert [session.handle(text) for text in ("/exit", "/bye", "/help")] == [False, False, True]


def test_edit(session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The new message and its answer replace the old ones; an unchanged message is not asked again."""
    session.handle("one")
    session.handle("two")
    first = session.conversation.turns[0]
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'w').write('three\\n')\n")
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", str(editor))
    session.handle("/edit")
    assert session.conversation.turns[0] == first
    assert session.conversation.turns[1][0] == user("three")
    before = session.conversation
    session.handle("/edit")
    assert session.conversation == before
    monkeypatch.setenv("VISUAL", str(tmp_path / "none"))
    with pytest.raises(RequestError, match="no editor"):
        session.handle("/edit")
    assert session.conversation == before


def test_branches(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("one", "two", "/set temperature 5", "/retry"):
        session.handle(text)
    first, second = session.conversation.branches
    assert first[:3] == second[:3]
    assert session.conversation.messages == second != first
    capsys.readouterr()
    session.handle("/branch")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["1", "4"], ["*", "2"]]
    session.handle("/branch 1")
    out, err = capsys.readouterr()
    assert session.conversation.messages == first
    assert out == first[3]["content"] + "\n"
    assert "user: two" in err
    session.handle("three")
    assert [len(path) for path in session.conversation.branches] == [6, 4]
    assert "branch 1 of 2" in session._status()
    for bad in ("0", "3", "x", "-1", "²"):
        with pytest.raises(RequestError, match="no branch"):
            session.handle(f"/branch {bad}")


def test_probabilities(session: Session, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    """They are those of `LLM.generate`, and an answer that nobody has asked them for has none."""
    with pytest.raises(RequestError, match="no probabilities"):
        session.handle("/logprobs")
    session.handle("/logprobs on")
    session.handle("one")
    capsys.readouterr()
    session.handle("/logprobs")
    lines = capsys.readouterr().out.splitlines()
    assert isinstance(session.partner, Here)
    prompt = encode_chat(loaded[1], [user("one")])
    (output,) = session.partner.llm.generate([prompt], dataclasses.replace(GREEDY, logprobs=5))
    entries = output.outputs[0].logprobs
    assert entries is not None
    assert len(lines) == len(entries) == 8
    for line, entry in zip(lines, entries, strict=True):
        assert float(line.split()[0]) == pytest.approx(100 * math.exp(entry.logprob), abs=0.06)
        others = [math.exp(p) for i, p in entry.top.items() if i != entry.token_id]
        assert [float(p) for p in re.findall(r'" (\d+\.\d) %', line)] == pytest.approx(
            [100 * p for p in others], abs=0.06
        )
    session.handle("/logprobs off")
    session.handle("two")
    with pytest.raises(RequestError, match="no probabilities"):
        session.handle("/logprobs")
    session.handle("/set logprobs 2")
    assert session.sampling.logprobs == 2
    with pytest.raises(RequestError, match="logprobs"):
        session.handle("/logprobs many")


@pytest.mark.slow
def test_probabilities_of_drafted_tokens(loaded: Loaded) -> None:
    """Several tokens come at once, and each has its own."""
    llm = LLM(*loaded, rows=1, drafts=4)
    prompt = encode_chat(loaded[1], [user("tell me more " * 20)])
    bias = {300: 100.0}  # the model repeats itself, so that drafts are right
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=1, logit_bias=bias)
    steps = list(llm.stream(prompt, params))
    (output,) = llm.generate([prompt], params)
    assert max(len(step.new_logprobs) for step in steps) > 1
    entries = [entry for step in steps for entry in step.new_logprobs]
    assert tuple(entry.token_id for entry in entries) == output.outputs[0].token_ids
    pieces = list(Here(llm).answer(Prompt(prompt, len(prompt)), params, lambda done, total: None))
    assert [token["logprob"] for piece in pieces for token in piece.tokens] == [entry.logprob for entry in entries]
    assert pieces[-1].cached_tokens == output.cached_tokens >= 64


def test_tokens(session: Session, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("/system Be brief.", "one " * 60, "two"):
        session.handle(text)
    capsys.readouterr()
    session.handle("/tokens")
    *rows, total, last = capsys.readouterr().out.splitlines()
    messages = session.conversation.all_messages
    ends = [0] + [len(encode_chat(loaded[1], messages[:i], add_generation_prompt=False)) for i in range(1, 6)]
    assert [int(row.split()[2]) for row in rows] == [b - a for a, b in itertools.pairwise(ends)]
    assert total.startswith(f"context: {ends[-1]} of 256 tokens (")
    prompt = len(encode_chat(loaded[1], messages[:-1]))
    cached = int(re.fullmatch(rf"the last prompt had {prompt} tokens, of which (\d+) were cached", last)[1])
    assert 0 < cached < prompt
    assert session.answered is not None
    assert f"{session.answered.used} of 256 tokens" in session._status()
    session.handle("/undo")
    assert f"{ends[-3]} of 256 tokens" in session._status()


def test_markdown_is_for_terminals(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not session.screen.markdown
    with pytest.raises(RequestError, match="cannot show markdown"):
        session.handle("/set markdown on")
    with pytest.raises(RequestError, match="cannot be maybe"):
        session.handle("/set markdown maybe")
    session.handle("/set markdown off")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for name, value, expected in (("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv(name, value)
        assert Screen().markdown == expected
        assert not Screen(plain=True).markdown
        assert not Screen(as_json=True).markdown


def test_another_model(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.handle("/model")
    assert session.partner.name in capsys.readouterr().err
    with pytest.raises(RequestError, match="alone") as caught:
        session.handle("/model org/other")
    assert "org/other" in caught.value.hint


def test_a_second_turn_does_not_pay_for_the_first(session: Session, llm: LLM) -> None:
    session.handle("tell me more " * 20)
    used = session.tokens_used(session.conversation)
    assert used is not None
    assert used > 64
    before = llm.snapshot().counts.prefix_hit_tokens
    session.handle("and more")
    assert llm.snapshot().counts.prefix_hit_tokens - before >= used // 64 * 64


def test_ctrl_c_while_a_prompt_is_read(
    session: Session, llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is heard before the next chunk of the prompt, and the message is taken back."""
    monkeypatch.setattr(chat_session, "catch_interrupt", lambda **_: contextlib.nullcontext(lambda: True))
    before = session.conversation
    session.handle("tell me " * 60)
    assert session.conversation == before
    assert "your message was taken back" in capsys.readouterr().err
    assert llm.snapshot().counts.running == 0


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_seen_until_an_answer_begins(
    plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SHOW_AFTER_S", "LINE_EVERY_S"):
        monkeypatch.setattr(chat_activity, name, -1)
    screen = Screen()
    screen.interactive, screen._plain = True, plain
    with contextlib.closing(screen.activity()) as activity:
        activity.read(128, 900)
        activity.read(900, 900)
        activity.close()
        activity.read(128, 900) if not plain else None
    text = "reading the prompt: 128 of 900 tokens"
    assert capsys.readouterr().out == (f"{text}\n" if plain else f"\r\x1b[K{text}, 0 s\r\x1b[K")
    screen.interactive = False
    with contextlib.closing(screen.activity()) as activity:
        activity.read(128, 900)
    assert capsys.readouterr() == ("", "")


def test_seconds_are_counted_while_nothing_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_activity, "SHOW_AFTER_S", 0)
    monkeypatch.setattr(chat_activity, "TICK_S", 0.01)
    activity = LineActivity("", "")
    seen, deadline = "", time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
        seen = capsys.readouterr().out
    activity.close()
    assert seen.startswith("\r\x1b[Kwaiting for the first token, 0 s")


def test_a_full_context_is_refused(session: Session) -> None:
    session.handle("/set max_tokens 40")
    for _ in range(4):
        session.handle("tell me more")
    before = session.conversation
    assert session.tokens_used(before) < 256
    with pytest.raises(RequestError, match="the context is full") as caught:
        session.handle("x " * 100)
    assert "/trim" in caught.value.hint
    assert session.conversation == before
    session.handle("/trim")
    assert session.tokens_used(session.conversation) <= 128
    assert session.conversation.messages == before.messages[-len(session.conversation.messages) :]
    assert session.conversation.messages
    session.handle("once more")
    with pytest.raises(RequestError, match="the message alone is too long") as caught:
        session.handle("x y " * 300)
    assert "shorter" in caught.value.hint
    session.handle("/set max_tokens none")
    session.handle("/set min_tokens 200")
    with pytest.raises(RequestError, match="room"):
        session.handle("more")


def chat(folder: Path, text: str | bytes, *options: str) -> Result:
    return CliRunner().invoke(cli, ["chat", "--model", str(folder), "--max-tokens", "8", *options], input=text)


@pytest.mark.slow
def test_over_a_pipe(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    text = 'Hello\n\n"""\ntwo\nlines\n"""\n/set temperature 0\nagain\n/bye\nnever read\n'
    result = chat(folder, text, "--seed", "3", "--system", "Be brief.", "--ignore-eos")
    assert result.exit_code == 0, result.output
    messages = [{"role": "system", "content": "Be brief."}, user("Hello")]
    expected = []
    for i, more in enumerate(("two\nlines", "again", "")):
        p = SamplingParams(temperature=0.7 if i < 2 else 0.0, top_p=0.95, seed=3 + i, max_tokens=8, ignore_eos=True)
        expected.append(generate(*loaded, encode_chat(loaded[1], messages), p))
        messages += [{"role": "assistant", "content": expected[-1]}, user(more)]
    assert result.stdout == "".join(text + "\n" for text in expected)
    assert "float32" in result.stderr

    as_json = chat(folder, text, "--seed", "3", "--system", "Be brief.", "--ignore-eos", "--json", "--quiet")
    objects = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [o["content"] for o in objects] == expected
    assert {o["finish_reason"] for o in objects} == {"length"}
    assert objects[0]["generation_tokens"] == 8
    likely = chat(folder, "/logprobs 1\nHello\n", "--seed", "3", "--json", "--quiet")
    (answer,) = [json.loads(line) for line in likely.stdout.splitlines()]
    data = bytes(byte for token in answer["logprobs"]["content"] for byte in token["bytes"])
    assert data.decode(errors="replace").startswith(answer["content"])


@pytest.mark.slow
def test_resume(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    first = chat(folder, f"Hello\n/save {path}\nmore\n", "--temperature", "0")
    again = chat(folder, "more\n", "--temperature", "0", "--resume", str(path))
    assert first.exit_code == again.exit_code == 0
    assert first.stdout.endswith(again.stdout)
    assert len(again.stdout) > 3


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("/sett x\nHello\n", [], 2, "did you mean /set, /save"),
        ('"""\nopen', [], 2, "ends within a block"),
        (b"\xff\xfe\n", [], 2, "not UTF-8"),
        ("", ["--temperature", "-1"], 2, "temperature"),
        ("", ["--resume", "missing.json"], 2, "missing.json"),
        ("", ["--history", "/dev/null"], 73, "not a regular file"),
        ("", ["--history", "/no/such/file"], 73, "cannot use"),
    ],
)
def test_errors_in_a_pipe(folder: Path, text: str | bytes, options: list[str], code: int, message: str) -> None:
    result = chat(folder, text, *options)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "hint: " in result.stderr
    assert result.stdout == ""


def test_no_chat_template(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "base", template=None)
    result = chat(folder, "Hello\n")
    assert result.exit_code == 4
    assert "error: the model has no chat template" in result.stderr
    assert "hint: " in result.stderr


def test_generation_config_is_the_default(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", temperature=0.25, top_p=0.5)
    result = chat(folder, "/show\n")
    assert re.search(r"temperature +0\.25", result.stdout)
    assert re.search(r"top_p +0\.5\b", result.stdout)
    assert "generation_config.json" in result.stdout


def test_history_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "history"
    assert chat(folder, "/show\n", "--history", str(path)).exit_code == 0
    assert mode(path) == 0o600
    assert "+/show" in path.read_text()
    path.chmod(0o664)
    result = chat(folder, "/help\n", "--history", str(path))
    assert mode(path) == 0o600
    assert "664" in result.stderr
    assert "+/show" in path.read_text()


def test_history_is_off_by_default(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chat(folder, "/show\n")
    assert list(tmp_path.rglob("*")) == []


# Ctrl-C reaches the process only if the terminal is its controlling one.
_OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """`llama-jax chat` in a pseudo-terminal."""

    def __init__(self, folder: Path, *options: str, columns: int = 80, **env: str):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = [
            sys.executable,
            "-c",
            _OWN_TERMINAL,
            sys.executable,
            "-m",
            "llama_jax.cli",
            "chat",
            "--model",
            str(folder),
            *options,
        ]
        env = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", "NO_COLOR": "", **env}
        env.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Reads until the pattern has appeared since the last call, and returns what was read."""
        deadline = time.monotonic() + seconds
        read = ""
        while not re.search(pattern, read):
            ready, _, _ = select.select([self._master], [], [], 0.2)
            if ready:
                try:
                    data = os.read(self._master, 65536)
                except OSError:
                    data = b""
                if not data:
                    break
                read += data.decode(errors="replace")
                if CURSOR in data:
                    os.write(self._master, b"\x1b[1;1R")
            if time.monotonic() > deadline:
                break
        self.seen += read
        if not re.search(pattern, read):
            self.close()
            pytest.fail(f"no {pattern!r} in {read!r}")
        return read

    def end(self) -> int:
        try:
            return self.process.wait(timeout=20)
        finally:
            self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"
CURSOR = b"\x1b[6n"
"""The question where the cursor is."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with so much context that an answer lasts until it is stopped."""
    return write_chat_model(tmp_path_factory.mktemp("wide") / "tiny", context=1 << 20)


@pytest.mark.slow
def test_in_a_terminal(wide: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    terminal = Terminal(wide, "--ignore-eos", "--seed", "1", "--history", str(tmp_path / "history"))
    terminal.wait_for(r"/help lists[^\n]*\n[\s\S]*>>>")
    # Ctrl-C stops the answer, and what has come is kept.
    terminal.send("one" + ENTER)
    terminal.wait_for(r"\n[\s\S]{2000}")
    terminal.send(CTRL_C)
    stopped = terminal.wait_for(r"tok/s[\s\S]*stopped[\s\S]*>>>")
    assert "\x1b[2m" in stopped  # dimmed
    # At the prompt it clears the line.
    terminal.send("rubbish" + CTRL_C)
    terminal.wait_for(r"/exit\s+leaves[\s\S]*>>>")
    terminal.send("/set max_tokens 4" + ENTER)
    terminal.wait_for(r"max_tokens = 4[\s\S]*>>>")
    # A pasted text, Alt-Enter and an open block are new lines; up-arrow brings it back.
    terminal.send("\x1b[200~pasted\nlines\x1b[201~" + ALT_ENTER + "end" + ENTER)
    terminal.wait_for(r"max_tokens=4 reached[\s\S]*>>>")
    terminal.send(UP + ENTER)
    terminal.wait_for(r"max_tokens=4 reached[\s\S]*>>>")
    terminal.send('"""a' + ENTER + 'b"""' + ENTER)
    terminal.wait_for(r"max_tokens=4 reached[\s\S]*>>>")
    # An error does not end the chat.
    terminal.send("/set top_p 7" + ENTER)
    terminal.wait_for(r"error: top_p[\s\S]*hint: [\s\S]*>>>")
    terminal.send(f"/save {saved}" + ENTER)
    terminal.wait_for(r"messages saved[\s\S]*>>>")
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    messages = json.loads(saved.read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == [
        "one",
        "pasted\nlines\nend",
        "pasted\nlines\nend",
        "a\nb",
    ]
    assert len(messages[1]["content"]) > 100
    assert mode(tmp_path / "history") == 0o600
    assert "+pasted" in (tmp_path / "history").read_text()


@pytest.mark.slow
def test_markdown_editor_and_meter_in_a_terminal(wide: Path, tmp_path: Path) -> None:
    editor, saved = tmp_path / "editor", tmp_path / "talk.json"
    editor.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'a').write(' and edited')\n")
    editor.chmod(0o700)
    terminal = Terminal(wide, "--seed", "1", VISUAL=str(editor))
    terminal.wait_for(r"\[\.+\] 0 of 1048576 tokens")
    form = json.dumps({"type": "grammar", "syntax": "regex", "definition": r"- \*\*one\*\*\n- two"})
    terminal.send(f"/set response_format {form}" + ENTER)
    terminal.wait_for(r"response_format = ")
    terminal.send("hi" + ENTER)
    seen = terminal.wait_for(r"[1-9]\d* of 1048576 tokens")
    assert re.search(r"•[^*]*one[^*]*\n[^*]*•[^*]*two", seen)
    terminal.send("/set markdown off" + ENTER)
    terminal.wait_for(r"markdown = off[\s\S]*tokens")
    terminal.send("typed\x18\x05")
    terminal.wait_for(r"and edited")
    terminal.send(ENTER)
    assert "- **one**" in terminal.wait_for(r"tok/s[\s\S]*of 1048576 tokens")
    # What is typed during an answer is not written into it, and waits for the next prompt.
    for setting in ("response_format none", "ignore_eos true", "max_tokens 600"):
        terminal.send(f"/set {setting}" + ENTER)
        terminal.wait_for(r" = [\s\S]*of 1048576 tokens")
    terminal.send("more" + ENTER)
    terminal.wait_for(r"\n[\s\S]{200}")
    terminal.send("xyzzy")
    answer, prompt = terminal.wait_for(r"reached[\s\S]*xyzzy").split("reached")
    assert "xyzzy" not in answer
    assert "xyzzy" in prompt
    terminal.send(CTRL_C)
    terminal.wait_for(r"/exit leaves[\s\S]*tokens")
    terminal.send("/retry" + ENTER)
    terminal.wait_for(r"\n[\s\S]{200}")
    terminal.send(CTRL_C)
    terminal.wait_for(r"stopped[\s\S]*branch 2 of 2")
    terminal.send(f"/save {saved}" + ENTER)
    terminal.wait_for(r"messages and 2 branches[\s\S]*saved[\s\S]*of 1048576 tokens")  # the next prompt reads again
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    (conversation,) = json.loads(saved.read_text())["conversations"]
    said = [message["text"] for message in conversation["messages"]]
    assert said[:5] == ["hi", "- **one**\n- two", "typed and edited", "- **one**\n- two", "more"]
    assert [message["role"] for message in conversation["messages"][5:]] == ["assistant"] * 2


@pytest.mark.slow
def test_in_a_plain_narrow_terminal(folder: Path) -> None:
    """No colours, no cursor movements, short remarks; and a model that writes escapes cannot reach the terminal."""
    options = ("--max-tokens", "8", "--ignore-eos", "--temperature", "0")
    terminal = Terminal(folder, *options, columns=20, TERM="dumb", NO_COLOR="1")
    terminal.wait_for(">>> ?")
    terminal.send("hi\r")
    terminal.wait_for(r"tok/s;\r\n\d+\+8/256;\r\nmax_tokens=8 reached\r\n[\s\S]*>>>")  # cut between words
    time.sleep(0.5)  # until it waits: between the prompt and the wait a signal stays pending
    terminal.send(CTRL_C)
    terminal.wait_for(r"/exit\s+leaves[\s\S]*>>>")
    terminal.send("/system \x1b[31mred\r")
    terminal.wait_for(">>> ?")
    terminal.send("/system\r")
    assert "␛[31mred" in terminal.wait_for(r"red\r\n[\s\S]*>>>")
    terminal.send("/nonsense\r")
    terminal.wait_for(r"error: there is no\s+command[\s\S]*>>>")
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    shown = re.sub(r"/system[^\n]*", "", terminal.seen)  # the terminal's own echo
    assert "\x1b" not in shown


@pytest.mark.slow
def test_escapes_of_the_model_are_neutralised(loaded: Loaded, tmp_path: Path) -> None:
    """The bias makes the model write ESC and BEL, the beginnings of what could take over a terminal."""
    escape, bell = (loaded[1].encode(c)[-1] for c in "\x1b\x07")
    bias = json.dumps({str(escape): 100, str(bell): 100})
    folder = write_chat_model(tmp_path / "tiny")
    terminal = Terminal(folder, "--max-tokens", "6", "--seed", "1", TERM="dumb")
    terminal.wait_for(">>> ?")
    terminal.send(f"/set logit_bias {bias}\r")
    terminal.wait_for(r"logit_bias = [\s\S]*>>>")
    terminal.send("hi\r")
    answer = terminal.wait_for(r"tok/s[\s\S]*>>>")
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    assert len(re.findall("[␛␇]", answer)) == 6
    assert "\x1b" not in answer
    assert "\x07" not in answer


@pytest.mark.slow
def test_interrupt_in_a_pipe(wide: Path) -> None:
    """Ctrl-C ends the answer, and the chat goes on; while it waits for a message, it ends with 130."""
    command = [sys.executable, "-m", "llama_jax.cli", "chat", "--model", str(wide), "--ignore-eos"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert len(process.stdout.read(100)) == 100
        process.send_signal(signal.SIGINT)
        notes = ""
        while "tok/s" not in notes:
            notes = process.stderr.readline().decode()
            assert notes
        assert notes.endswith("; stopped\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
