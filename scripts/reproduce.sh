#!/usr/bin/env bash
# Measures every row of docs/benchmarks.md that this machine can, and draws the charts: `scripts/reproduce.sh [FOLDER]`.
# Resumes: what is in the folder is not measured again. On a GPU give the extra, as in `EXTRA=rocm scripts/reproduce.sh`.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo 'uv is missing: pip install uv' >&2; exit 2; }
exec uv run --group docs ${EXTRA:+--extra "$EXTRA"} python scripts/reproduce.py "$@"
