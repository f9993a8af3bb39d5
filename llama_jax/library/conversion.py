"""Converting a source into the cache, once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from llama_jax.checkpoint.format import Progress, is_checkpoint
from llama_jax.errors import StorageError
from llama_jax.library.converted import Notify


def check_source(source: Path, say: Notify) -> None:
    """Tests the tokenizer of a folder or file before its conversion.

    Args:
      say: told of tokens that the model has no embedding for.

    Raises:
      TokenizerError: it harms the process that uses it (`llama_jax.text.tokenizer.check`).
      LlamaJaxError: it cannot be opened as a model.
    """
    from llama_jax.convert.opening import open_source
    from llama_jax.text.tokenizer.check import check_tokenizer

    with closing(open_source(source)) as model:
        if note := check_tokenizer(model.files, model.config.vocab_size):
            say(note)


def convert_once(
    source: Path,
    path: Path,
    progress: Progress | None,
    say: Notify,
    *,
    warn_larger: bool = True,
    name: str | None = None,
    revision: str | None = None,
) -> Path:
    """Converts a source to its place in the cache, unless it is already there.

    Args:
      source: folder or file.
      path: where the checkpoint belongs.
      progress: called during the conversion.
      say: told before it begins.
      warn_larger: see `llama_jax.convert.convert`.
      name, revision: of the source, where its files do not say.

    Raises:
      LlamaJaxError: as `llama_jax.convert.convert` and `check_source` do.
    """
    if is_checkpoint(path):
        return path
    from llama_jax.convert import convert

    check_source(source, say)
    try:
        return convert(
            source, path, warn_larger=warn_larger, name=name, revision=revision, progress=progress, notify=say
        )
    except StorageError:
        # Another process was converting the same model, this one waited for it, and the result is there.
        if is_checkpoint(path):
            return path
        raise
