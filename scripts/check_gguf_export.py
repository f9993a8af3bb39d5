"""Runs exported GGUF files in llama.cpp and compares its results with those stored from Hugging Face transformers.

Needs the package llama-cpp-python, which no environment of this project holds:

    pip install llama-cpp-python numpy
    python scripts/check_gguf_export.py tests/data/goldens --python .venv/bin/python

Every folder below the one given that holds `expected.npz` (see make_goldens.py) is converted and exported in float32;
the logits must be the stored ones within 5e-5 of the largest. Models that the export refuses are listed, and those with
a sliding window, which llama.cpp ignores. For the default model, greedy tokens (f32 and f16) must be those of
smollm2-135m-instruct.json. Prints one line a case; exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

TOLERANCE = 5e-5
DEFAULT_MODEL = "smollm2-135m-instruct"


@llama_cpp.llama_log_callback
def silent(*_: Any) -> None:
    """llama.cpp says a lot on standard error."""


class LlamaCpp:
    """A GGUF file in llama.cpp: on the CPU, with a float32 cache."""

    def __init__(self, path: Path):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        # Repacked weights crash some virtual machines, whose processors announce AMX.
        params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def _context(self, length: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(512, length)
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = 2
        return llama_cpp.llama_init_from_model(self._model, params)

    def _row(self, context: Any, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self._vocab,)).copy()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [len, vocab]."""
        context = self._context(len(ids))
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(context, batch) == 0
        found = np.stack([self._row(context, i) for i in range(len(ids))])
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` likeliest tokens."""
        context, new = self._context(len(ids) + count), list(ids)
        found: list[int] = []
        while len(found) < count:
            tokens = (llama_cpp.llama_token * len(new))(*new)  # the batch only points to them
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(new))) == 0
            found.append(int(self._row(context, -1).argmax()))
            new = found[-1:]
        llama_cpp.llama_free(context)
        return found


def check_golden(case: Path, path: Path) -> float:
    """Largest difference to the stored logits, as a share of the largest of them."""
    with np.load(case / "expected.npz") as file:
        ids, mask, logits = file["input_ids"], file["attention_mask"] > 0, file["logits"]
    model = LlamaCpp(path)
    worst = max(float(np.abs(model.logits(i[m]) - x[m]).max()) for i, m, x in zip(ids, mask, logits, strict=True))
    model.close()
    return worst / float(np.abs(logits).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds a folder for each checkpoint")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama_jax [default: this one]")
    args = parser.parse_args()
    llama_cpp.llama_log_set(silent, None)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        words = [args.python, "-m", "llama_jax.cli", *map(str, command)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        for case in sorted(found.parent for found in args.folder.glob("*/expected.npz")):
            run("convert", case, Path(scratch) / case.name)
            done = run("export", Path(scratch) / case.name, path, "--to", "gguf", "--type", "f32", "--overwrite")
            if done.returncode:
                print(f"{case.name:40} refused: {done.stderr.splitlines()[0]}", flush=True)
                continue
            error, windowed = check_golden(case, path), "sliding window" in done.stderr
            bad += error > TOLERANCE and not windowed
            print(f"{case.name:40} logits {error:.1e}{', window ignored' if windowed else ''}", flush=True)
        stored = args.folder / f"{DEFAULT_MODEL}.json"
        cases = json.loads(stored.read_text()) if stored.exists() else []
        for kind in ("f32", "f16") if cases else ():
            run("export", DEFAULT_MODEL, path, "--to", "gguf", "--type", kind, "--overwrite")
            model = LlamaCpp(path)
            same = sum(model.greedy(case["ids"], len(case["greedy"])) == case["greedy"] for case in cases)
            model.close()
            bad += same != len(cases)
            print(f"{DEFAULT_MODEL} {kind:18} greedy tokens equal for {same} of {len(cases)} prompts", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
