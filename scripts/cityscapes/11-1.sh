#!/usr/bin/env bash
# Cityscapes, domain-incremental 11-1: 11 cities, then 10 times 1. lr 0.01 then 0.001, 50 epochs a step.
# The presets leave pseudo-labels out here: the steps are cities, every pixel has its label, and no class is new.
#
#   DATA_ROOT=/data GPUS=4 METHOD=PLOP scripts/cityscapes/11-1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, FT, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1 2 3 4 5 6 7 8 9 10"}
EPOCHS=${EPOCHS:-50}
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then lr=$FIRST_LR; else lr=0.001; fi
    train_step "$step" "$lr" "$EPOCHS" --dataset cityscapes_domain --task 11-1 --method "$METHOD" "$@"
done
summary cityscapes_domain 11-1
