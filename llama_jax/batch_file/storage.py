"""Write failures of the output, as errors of this package."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DoesNotFit, StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns write failures into DoesNotFit (disk full, quota) and StorageError (all others).

    A broken pipe is not a storage failure, and passes.
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
