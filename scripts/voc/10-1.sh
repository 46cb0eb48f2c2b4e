#!/usr/bin/env bash
# VOC 2012, 10-1: 10 classes, then 10 times 1. Overlapped, lr 0.01 then 0.001, 30 epochs, then 10 (PLOP, NeST) or 20 (LSKD).
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/10-1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2 3 4 5 6 7 8 9 10"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published; 30 where nothing is
    PLOP | *+NeST) EPOCHS=${EPOCHS:-10} ;;
    LSKD) EPOCHS=${EPOCHS:-20} ;;
    RCIL) FIRST_LR=${FIRST_LR:-0.02} ;;
esac
EPOCHS=${EPOCHS:-30}
train_steps voc 10-1 "$EPOCHS" --overlap "$@"
