#!/usr/bin/env bash
# ADE20K, 50: 3 times 50 classes. Overlapped, lr 0.01 then 0.001, 60 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/ade/50.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2"}
FIRST_EPOCHS=${FIRST_EPOCHS:-60}
case $METHOD in # as published; 60 epochs where nothing is
    REMINDER) EPOCHS=${EPOCHS:-70} BATCH=${BATCH:-$((10 / GPUS))} ;;
    SDR) BATCH=${BATCH:-$((4 / GPUS))} ;;
esac
EPOCHS=${EPOCHS:-60}
train_steps ade 50 "$EPOCHS" --overlap "$@"
