"""Trial of a tokenizer in a child process before it is trusted: `check_tokenizer`.

tokenizer.json is a program of sorts: it contains regular expressions, and its library panics, aborts or exhausts memory
for some contents. So before a model is converted into the cache, its tokenizer is loaded and run on a few texts in a
process with a deadline and a memory limit. A tokenizer that merely fails to load passes: `load_tokenizer` reports it,
and the weights can be useful without it.

Not covered: an expression that is slow only for other kinds of texts. The library gives up on one after ten million
steps at one place of a text, which is a `TokenizerError`, but one that stays below that can be slow on a long text.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import LlamaJaxError, TokenizerError

SECONDS = 30
"""Limit of CPU time, ten times what the largest tokenizers take; wall time may be four times as much."""
MEMORY_BYTES = 4 << 30
"""Limit of address space; the largest tokenizers stay below a quarter of it."""

_PROBES = (
    "Hello, world! 1234567890 It's 3.14 €.",
    "a" * 4096 + "!",
    " " * 4096 + "a",
    "\n" * 1024 + "1" * 4096 + ".",
    "aA1 _-" * 512,
    "né 中文字 Привет \U0001f600\u200d\U0001f680 مرحبا " * 64,
    "=" * 2048 + "\t" * 512 + "ab" * 1024 + "\0",
)
"""Texts that expose catastrophic backtracking: long runs of one kind with a mismatching end."""

# The child imports modules from the same places as this process, and nowhere else.
_PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from llama_jax.text.tokenizer.check import child
sys.exit(child(sys.argv[2], *map(int, sys.argv[3:])))
"""

_FILES = ("tokenizer.json", "tokenizer.model")
_HINT = "do not use this model's tokenizer, unless you trust where it comes from and know why"


def check_tokenizer(
    files: Mapping[str, bytes | str], rows: int, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> str | None:
    """Loads and runs a model's tokenizer in a child process.

    Args:
      files: the model's small files, name to content; passes at once if they contain no tokenizer.
      rows: of the model's embedding.
      seconds, memory_bytes: the limits.

    Returns:
      A warning (`Tokenizer.without_rows`), or None.

    Raises:
      TokenizerError: it takes too long or too much memory, its library crashes or panics, or its ids have large gaps.
    """
    if not any(name in files for name in _FILES):
        return None
    with tempfile.TemporaryDirectory(prefix="llama-jax-tokenizer-") as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        limits = [str(number) for number in (seconds, memory_bytes, rows)]
        command = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), folder, *limits]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=4 * seconds
            )
        except subprocess.TimeoutExpired as e:
            raise TokenizerError(f"the tokenizer was not done within {4 * seconds} s", hint=_HINT) from e
    if done.returncode:
        raise TokenizerError(_reason(done, seconds, memory_bytes), hint=_HINT)
    return str(json.loads(done.stdout)) if done.stdout else None


def _reason(done: subprocess.CompletedProcess[bytes], seconds: int, memory_bytes: int) -> str:
    with contextlib.suppress(ValueError):
        return str(json.loads(done.stdout))
    said = done.stderr.decode(errors="replace")
    # The kernel ends a process that has used up its time with SIGXCPU (24), or SIGKILL (9) a second later.
    if done.returncode in (-24, -9):
        return f"the tokenizer took more than {seconds} s"
    if "memory" in said.lower():
        return f"the tokenizer needs more than {memory_bytes >> 20} MiB of memory"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return f"the tokenizer crashed its library (exit status {done.returncode}) {last[:200]}".rstrip()


def child(folder: str, seconds: int, memory_bytes: int, rows: int) -> int:
    """Runs in the child process, which limits itself. Returns its exit status, and prints a warning, if any, or the
    reason for a nonzero status."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    from llama_jax.text.tokenizer.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except LlamaJaxError as e:
        # Damaged or of an unknown kind: harmless unless it broke the library.
        cause = e.__cause__
        if isinstance(cause, MemoryError):
            return _refuse(f"the tokenizer needs more than {memory_bytes >> 20} MiB of memory")
        if cause is not None and not isinstance(cause, Exception):
            return _refuse(e.message.replace(f"{folder}/", ""))
        return 0
    if tokenizer.largest_id >= tokenizer.vocab_size:
        return _refuse(f"the tokenizer has {tokenizer.vocab_size} tokens, and then leaps to id {tokenizer.largest_id}")
    try:
        for text in _PROBES:
            tokenizer.decode(tokenizer.encode(text))
    except LlamaJaxError as e:
        return _refuse(e.message)
    if note := tokenizer.without_rows(rows):
        print(json.dumps(note))
    return 0


def _refuse(reason: str) -> int:
    print(json.dumps(reason[:2000]))
    return 1
