#!/usr/bin/env bash
# ADE20K, 100-50: 100 classes, then 50 at once. Overlapped, lr 0.01 then 0.001, 60 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/ade/100-50.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, MiB, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1"}
FIRST_EPOCHS=${FIRST_EPOCHS:-60}
case $METHOD in # as published; 60 epochs where nothing is
    REMINDER) EPOCHS=${EPOCHS:-70} LR=${LR:-0.0008} BATCH=${BATCH:-$((10 / GPUS))} ;;
    MiB+EWF) EPOCHS=${EPOCHS:-60} BATCH=${BATCH:-$((48 / GPUS))} ;;
    SDR) EPOCHS=${EPOCHS:-60} BATCH=${BATCH:-$((4 / GPUS))} ;;
    *) EPOCHS=${EPOCHS:-60} ;;
esac
LR=${LR:-0.001}
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then lr=$FIRST_LR epochs=$FIRST_EPOCHS; else lr=$LR epochs=$EPOCHS; fi
    train_step "$step" "$lr" "$epochs" --dataset ade --task 100-50 --overlap --method "$METHOD" "$@"
done
summary ade 100-50
