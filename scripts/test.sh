#!/usr/bin/env bash
# Install what is missing, check style and types, run all tests. Further words go to pytest: bash scripts/test.sh -k golden
set -euo pipefail
# shellcheck source=scripts/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_requirements requirements.txt requirements-dev.txt
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
