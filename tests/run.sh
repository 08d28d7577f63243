#!/usr/bin/env bash
# Format, lint and type checks, then the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=shared_utils/env.sh
source shared_utils/env.sh tests

# One thread a worker: two workers on two cores otherwise slow each other down.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy .
if [ $# -eq 0 ]; then set -- tests; fi
# A worker that dies ends the run: one that takes its place may wait for ever for tests that went with the first.
"$PYTHON" -m pytest -n 2 --dist loadgroup --max-worker-restart 0 "$@"
