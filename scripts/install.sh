#!/usr/bin/env bash
# Make the virtual environment .venv and install what requirements.txt names. Sourced by quickstart.sh and test.sh; a second
# call finds everything there and returns at once.
#
#   PYTHON=python3.12 bash scripts/install.sh      another interpreter
#   CISS_VENV=/path   bash scripts/install.sh      another place
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${CISS_VENV:-$root/.venv}"
python="$venv/bin/python"
stamp="$venv/requirements.installed"

if [[ ! -x "$python" ]]; then
  base="${PYTHON:-python3}"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $base is older than Python 3.10; set PYTHON" >&2; exit 2; }
  "$base" -m venv "$venv" || { echo "error: $base cannot make a virtual environment; install its venv module" >&2; exit 2; }
fi
if ! cmp -s "$root/requirements.txt" "$stamp"; then
  echo "installing the requirements into $venv (torch is large: minutes on a first run)"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
  cp "$root/requirements.txt" "$stamp"
fi
