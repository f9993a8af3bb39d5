"""Failures of writing output, as errors of this package."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DoesNotFit, StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the failures of writing a file into DoesNotFit (disk full, quota) and StorageError (all others).

    That nobody reads a pipe any more is no failure of storage, and passes.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                f"no space left for {path}", hint="free some space and run again: the run resumes"
            ) from error
        raise StorageError(
            f"cannot write {path}: {error.strerror}", hint="check the folder and its permissions"
        ) from error
