"""Writes tests/data/gguf_reference.json: what llama.cpp's own converter makes of the golden checkpoints.

Needs torch, transformers and a checkout of llama.cpp (https://github.com/ggml-org/llama.cpp):

    uv run --group hf python scripts/make_gguf_reference.py LLAMA_CPP tests/data/goldens tests/data/gguf_reference.json

For every case that it converts (float32, without a tokenizer) the file holds the metadata of the architecture, and of
every tensor its type, shape and the first digits of the sha256 of its bytes; of rope factors, which are computed, the
values.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def convert(case: Path, out: Path) -> None:
    base, gguf = importlib.import_module("conversion.base"), importlib.import_module("gguf")
    hparams = base.ModelBase.load_hparams(case, False)
    family = importlib.import_module("conversion").get_model_class(hparams["architectures"][0])
    family.set_vocab = base.TextModel._set_vocab_none
    family(case, gguf.LlamaFileType.ALL_F32, out).write()


def describe(path: Path) -> dict[str, Any]:
    reader = importlib.import_module("gguf").GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    return {
        "metadata": {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith((f"{arch}.", "general.architecture", "general.type", "general.file_type", "general.size"))
        },
        "tensors": {
            tensor.name: [
                tensor.tensor_type.name,
                [int(n) for n in tensor.shape[::-1]],
                tensor.data.tolist()
                if tensor.name == "rope_freqs.weight"
                else hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16],
            ]
            for tensor in reader.tensors
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="checkout of llama.cpp")
    parser.add_argument("goldens", type=Path, help="folder of golden cases")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in sorted(path.parent for path in args.goldens.glob("*/expected.npz")):
            path = Path(scratch) / f"{case.name}.gguf"
            try:
                convert(case, path)
            except Exception as e:
                print(f"{case.name}: not converted ({type(e).__name__}: {e})")
            else:
                found[case.name] = describe(path)
                print(f"{case.name}: {len(found[case.name]['tensors'])} tensors")
    lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in found.items()]
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
