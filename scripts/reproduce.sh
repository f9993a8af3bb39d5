#!/usr/bin/env bash
# Measures static batches, the engine and the kernels for docs/benchmarks.md, and draws charts: `scripts/reproduce.sh [FOLDER]`.
# Resumes: what is in the folder is not measured again. On a GPU give the extra, as in `EXTRA=rocm scripts/reproduce.sh`.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo 'uv is missing: pip install uv' >&2; exit 2; }
exec uv run --group docs ${EXTRA:+--extra "$EXTRA"} python scripts/reproduce.py "$@"
