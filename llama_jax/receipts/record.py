"""The contents of a receipt, a JSON file for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llama_jax.disk import storage_errors, write_file
from llama_jax.errors import CheckpointError, RequestError

FORMAT = 1


@dataclass(frozen=True)
class Receipt:
    """Everything that the tokens of a run depend on, and the tokens.

    Attributes:
      made: time, ISO 8601 in UTC.
      model: name, digest of the parameters in memory, digest of the configuration, and of each adapter by name.
      load: options to load it with, as the command line has them (`dtype`, `weights`, `mesh`, ...).
      run: options of the run: `page_size`; of a batch file also its path, its digest and `batch_size`.
      requests: of each prompt its token ids, the fields of SamplingParams that differ from their defaults, and the new
        token ids of each continuation. Of a batch file: of each line its number and what it was answered.
      kernels: the backend of each operation in the programs that this process traced: operation, dtype, shape, backend.
      environment: versions of packages, device, flags.
    """

    made: str
    model: Mapping[str, Any]
    load: Mapping[str, Any]
    run: Mapping[str, Any]
    requests: Sequence[Mapping[str, Any]]
    kernels: Sequence[Mapping[str, str]]
    environment: Mapping[str, Any]
    format: int = FORMAT

    @property
    def batch(self) -> bool:
        """Whether it is of a batch file."""
        return "input" in self.run

    def save(self, path: str | Path) -> None:
        """Raises StorageError or DoesNotFit if it cannot be written."""
        path = Path(path)
        with storage_errors(path):
            write_file(path, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())


def read_receipt(path: str | Path) -> Receipt:
    """Reads a receipt.

    Raises:
      RequestError: there is no such file.
      CheckpointError: it is damaged, no receipt, or of a newer version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RequestError(
            f"cannot read {path}: {e.strerror}", param="receipt", hint="give a file that --receipt wrote"
        ) from e
    except ValueError as e:
        raise CheckpointError(f"{path} is not a receipt: {e}", hint="give a file that --receipt wrote") from e
    names = {field.name for field in fields(Receipt)}
    if not isinstance(content, dict) or content.keys() != names:
        raise CheckpointError(f"{path} is not a receipt of this version", hint="give a file that --receipt wrote")
    made = Receipt(**content)
    kinds = {"model": dict, "load": dict, "run": dict, "requests": list, "kernels": list, "environment": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content[name], kind)]
    if made.format != FORMAT or wrong or not all(isinstance(r, dict) for r in made.requests):
        what = f"{wrong[0]} is damaged" if wrong else f"its format is {made.format}, this version reads {FORMAT}"
        raise CheckpointError(f"{path}: {what}", hint="make the receipt again with this version")
    return made
