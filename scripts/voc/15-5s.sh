#!/usr/bin/env bash
# VOC 2012, 15-5s, "15-1" in papers: 15 classes, then 5 times 1. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/15-5s.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2 3 4 5"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published; 30 epochs where nothing is
    ALIFE | ALIFE-M) SECOND_EPOCHS=${EPOCHS:-10} EPOCHS=${EPOCHS:-5} ;;
    RCIL) FIRST_LR=${FIRST_LR:-0.02} ;;
    REMINDER) BATCH=${BATCH:-$((16 / GPUS))} ;;
esac
EPOCHS=${EPOCHS:-30}
train_steps voc 15-5s "$EPOCHS" --overlap "$@"
