#!/usr/bin/env bash
# VOC 2012, 15-5s, "15-1" in papers: 15 classes, then 5 times 1. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/15-5s.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, MiB, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1 2 3 4 5"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published; 30 epochs where nothing is
    ALIFE | ALIFE-M) SECOND_EPOCHS=${EPOCHS:-10} EPOCHS=${EPOCHS:-5} ;;
    RCIL) FIRST_LR=${FIRST_LR:-0.02} ;;
    REMINDER) BATCH=${BATCH:-$((16 / GPUS))} ;;
esac
EPOCHS=${EPOCHS:-30}
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then lr=$FIRST_LR epochs=$FIRST_EPOCHS; else lr=0.001 epochs=$EPOCHS; fi
    if [[ $step == 1 ]]; then epochs=${SECOND_EPOCHS:-$EPOCHS}; fi
    train_step "$step" "$lr" "$epochs" --dataset voc --task 15-5s --overlap --method "$METHOD" "$@"
done
summary voc 15-5s
