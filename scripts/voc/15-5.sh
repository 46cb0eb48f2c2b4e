#!/usr/bin/env bash
# VOC 2012, 15-5: 15 classes, then 5 at once. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/15-5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published
    ALIFE | ALIFE-M) EPOCHS=${EPOCHS:-10} ;;
    *) EPOCHS=${EPOCHS:-30} ;;
esac
train_steps voc 15-5 "$EPOCHS" --overlap "$@"
