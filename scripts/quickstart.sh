#!/usr/bin/env bash
# Install what is missing, then train FT, PLOP and LSKD through all steps of the task 6-2 on the embedded data set, on any machine:
# a table of old, new and all, a figure of the mIoU by step, and how LSKD's λ moved. Minutes on two CPU cores.
#
#   bash scripts/quickstart.sh                     everything under runs/quickstart
#   OUT=elsewhere bash scripts/quickstart.sh       another folder
#   METHODS="FT MiB LSKD" bash scripts/quickstart.sh
set -euo pipefail
# shellcheck source=scripts/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_requirements requirements.txt
OUT=${OUT:-$root/runs/quickstart}
METHODS=${METHODS:-FT PLOP LSKD}
read -r -a methods <<<"$METHODS"

"$python" "$root/scripts/compare_methods.py" --methods "${methods[@]}" --epochs_step0 3 --epochs_later 2 --jobs 2 --out "$OUT" -- \
  --dataset shapes --task 6-2 --overlap --backbone resnet18 --no_pretrained --norm_act iabn --output_stride 8 \
  --crop_size 64 --shapes_train 900 --batch_size 12 --lr 0.05 0.01 --num_workers 0 --val_interval 1000 --ckpt_interval 1000 --no_progress \
  --threads 1 "$@"
"$python" "$root/scripts/report.py" "$OUT" --out "$OUT/report" --formats png
