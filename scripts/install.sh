#!/usr/bin/env bash
# Make the virtual environment .venv and install the requirements of the program into it.
#
#   bash scripts/install.sh                                         what training needs
#   bash scripts/install.sh requirements.txt requirements-dev.txt   what the tests need, too
#   PYTHON=python3.12 bash scripts/install.sh                       another interpreter for a new environment
#   CISS_VENV=/path   bash scripts/install.sh                       another place of the environment
#
# quickstart.sh and test.sh source this file and call install_requirements. A copy of each installed file is kept in the
# environment. pip is started only where the copy is missing or differs, so a second call returns at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${CISS_VENV:-$root/.venv}"
python="$venv/bin/python"

make_environment() {
  local base="${PYTHON:-python3}"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: $base is missing or older than Python 3.10; name another interpreter with PYTHON=..." >&2; exit 2; }
  "$base" -m venv "$venv" ||
    { echo "error: $base cannot make a virtual environment at $venv; install its venv module (Debian: python3-venv)" >&2; exit 2; }
  rm -f "$venv"/*.installed # of an earlier interpreter
}

# install_requirements FILE...: files of requirements, relative to the project's folder
install_requirements() {
  local file wanted=()
  [[ -x "$python" ]] || make_environment
  for file in "$@"; do
    cmp -s "$root/$file" "$venv/$file.installed" || wanted+=(-r "$root/$file")
  done
  if ((${#wanted[@]} == 0)); then return; fi
  "$python" -m pip --version >/dev/null 2>&1 || make_environment # its making was interrupted before pip was there
  echo "installing ${*} into $venv (the first time, torch and its CUDA libraries are gigabytes: some minutes)"
  "$python" -m pip install --disable-pip-version-check "${wanted[@]}" ||
    { echo "error: the requirements could not be installed into $venv; see pip's message above, then repeat the command" >&2; exit 2; }
  for file in "$@"; do
    cp "$root/$file" "$venv/$file.installed"
  done
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  if (($# == 0)); then set -- requirements.txt; fi
  install_requirements "$@"
fi
