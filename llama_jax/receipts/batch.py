"""Receipts of batch files: of each line what it was answered, by its tokens or by a digest of its choices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.batch_file import BatchFile, Status
from llama_jax.batch_file.records import Record, index_of
from llama_jax.batch_file.source import Source
from llama_jax.checkpoint.format import digest
from llama_jax.errors import VerificationError
from llama_jax.model.loaded import Model
from llama_jax.receipts.making import made, params_json, params_of
from llama_jax.receipts.record import Receipt
from llama_jax.receipts.replaying import Difference, Replay, changed, check_model, first_difference, reading
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

_HINT = "give the file by --input; a receipt holds its digest and not its lines"


def batch_receipt(
    model: Model,
    source: Path,
    target: Path,
    *,
    sampling: SamplingParams,
    batch_size: int | None,
    batch_invariant: bool,
    load: Mapping[str, Any] | None = None,
) -> Receipt:
    """A receipt of a batch file whose lines are all there.

    Args:
      load: see `receipt`.
      source, target: its input and its output; sampling, batch_size, batch_invariant: of its `BatchFile`.
    """
    run = {
        "input": str(source.resolve()),
        "input_digest": _digest(source),
        "params": params_json(sampling),
        "batch_size": batch_size,
        "batch_invariant": batch_invariant,
    }
    return made(model, [*_answers(target)], load=load, run=run)


def replay_batch(
    receipt: Receipt,
    model: Model,
    tokenizer: Tokenizer,
    source: Path | None = None,
    progress: Callable[[Status], None] | None = None,
) -> Replay:
    """Generates the lines of a batch file again, into a file that is removed.

    Args:
      source: the input, if it is elsewhere than it was.

    Raises:
      VerificationError: the model has other parameters, or the input is another file.
      RequestError: the input cannot be read.
    """
    check_model(receipt, model)
    with reading():
        run, wanted = receipt.run, receipt.run["input_digest"]
        path, sampling = source or Path(run["input"]), params_of(run["params"])
        sizes = {name: run[name] for name in ("batch_size", "batch_invariant")}
        expected = {request["line"]: request for request in receipt.requests}
    if (found := _digest(path)) != wanted:
        raise VerificationError(f"{path} has the digest {found}, the receipt {wanted}", hint=_HINT)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "replay.jsonl"
        batch = BatchFile(
            path,
            target,
            sampling=sampling,
            dtype=model.dtype.name,
            kv_dtype=model.kv_dtype,
            **sizes,
        )
        with batch:
            batch.open(tokenizer, model.config)
            batch.run(model, tokenizer, progress=progress)
        now = {answer["line"]: answer for answer in _answers(target)}
    pairs = [(was, now.get(line, {})) for line, was in expected.items()]
    return Replay(len(pairs), [d for pair in pairs for d in _compared(*pair)], changed(receipt, model))


def _digest(path: Path) -> str:
    source = Source(path)
    source.close()
    return source.digest


def _answers(target: Path) -> Iterator[Record]:
    """The answer to each line of an output, without what differs between equal runs."""
    with target.open("rb") as file:
        for raw in file:
            record = json.loads(raw)
            answer: Record = {"line": index_of(record)}
            if "token_ids" in record:
                answer["token_ids"] = [record["token_ids"]]
            elif "outputs" in record:
                answer["token_ids"] = [each["token_ids"] for each in record["outputs"]]
            else:
                body = (record.get("response") or {}).get("body", record)
                answer["digest"] = digest(json.dumps(body.get("choices", body), sort_keys=True).encode())
            yield answer


def _compared(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    line = was["line"]
    if "token_ids" in was and len(was["token_ids"]) == len(now.get("token_ids", ())):
        for copy, pair in enumerate(zip(was["token_ids"], now["token_ids"], strict=True)):
            if (found := first_difference(line, copy, *pair)) is not None:
                yield found
    elif was != now:
        yield Difference(line, 0, 0)
