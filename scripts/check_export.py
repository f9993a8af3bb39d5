"""Loads exported checkpoints with Hugging Face transformers and compares its logits with stored ones.

Needs torch and transformers (the non-default dependency group `hf`):

    uv run --group hf python scripts/check_export.py tests/data/goldens

Every folder below the one given that holds `expected.npz` (see make_goldens.py) is converted, exported and loaded with
`AutoModelForCausalLM.from_pretrained`. The tensors must have the names and bytes of the source, and the logits must be
the stored ones within 5e-5 of the largest. Prints one line a case; exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

TOLERANCE = 5e-5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two folders hold the same tensors, by name, dtype and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def error(folder: Path, expected: Path) -> float:
    """Largest difference to the stored logits, as a share of the largest of them."""
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise SystemExit(f"{folder}: transformers does not find its tensors: {info}")
    with np.load(expected) as file:
        ids, mask, logits = file["input_ids"], file["attention_mask"], file["logits"]
    worst = 0.0
    for row in range(len(ids)):
        seen = mask[row] > 0
        with torch.no_grad():
            # Dynamic rope keeps state between calls: every row starts from a fresh model.
            found = copy.deepcopy(loaded)(torch.from_numpy(ids[row][seen])[None]).logits[0].numpy()
        worst = max(worst, float(np.abs(found - logits[row][seen]).max()))
    return worst / float(np.abs(logits).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds a folder for each checkpoint")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama_jax [default: this one]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for case in sorted(path.parent for path in args.folder.glob("*/expected.npz")):
        with tempfile.TemporaryDirectory() as scratch:
            converted, exported = Path(scratch) / "converted", Path(scratch) / "exported"
            run = [args.python, "-m", "llama_jax.cli"]
            subprocess.run([*run, "convert", "-q", case, converted], check=True, stdout=subprocess.DEVNULL)
            export = [*run, "export", "-q", converted, exported, "--to", "hf"]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
            equal = same_bytes(tensors(case), tensors(exported))
            found = error(exported, case / "expected.npz")
        ok = equal and found <= TOLERANCE
        bad += not ok
        print(
            f"{case.name:40} bytes {'equal' if equal else 'DIFFER'}, logits {found:.1e}{'' if ok else '  BAD'}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
