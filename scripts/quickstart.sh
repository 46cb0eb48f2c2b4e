#!/usr/bin/env bash
# Install what is missing, then train FT, MiB, PLOP and LSKD through all steps of the task 6-2 on the embedded data set, on any machine:
# a table of old, new and all, and one page with figures and pictures. Minutes on two CPU cores.
#
#   bash scripts/quickstart.sh                     everything under runs/quickstart
#   OUT=elsewhere bash scripts/quickstart.sh       another folder
#   METHODS="FT LSKD" bash scripts/quickstart.sh
set -euo pipefail
# shellcheck source=scripts/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_requirements requirements.txt
OUT=${OUT:-$root/runs/quickstart}
arguments=(--jobs 2 --out "$OUT")
if [[ -n "${METHODS:-}" ]]; then
  read -r -a methods <<<"$METHODS"
  arguments+=(--methods "${methods[@]}")
fi
exec "$python" "$root/scripts/study.py" "$root/scripts/studies/quickstart.yaml" "${arguments[@]}" -- "$@"
