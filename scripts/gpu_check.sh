#!/usr/bin/env bash
# Test and measure the program on the GPUs of this machine: bash scripts/gpu_check.sh [--out runs/gpu_check] [--device cpu --size small]
# Nothing is installed or downloaded: PYTHON, .venv/bin/python or python3 must have torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
    echo "error: $PYTHON has no torch; name a Python that has it, as in PYTHON=/usr/bin/python3 bash scripts/gpu_check.sh" >&2
    exit 2
fi
exec "$PYTHON" scripts/gpu_check "$@"
