#!/usr/bin/env bash
# VOC 2012, 15-5: 15 classes, then 5 at once. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/15-5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, MiB, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published
    ALIFE | ALIFE-M) EPOCHS=${EPOCHS:-10} ;;
    *) EPOCHS=${EPOCHS:-30} ;;
esac
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then lr=$FIRST_LR epochs=$FIRST_EPOCHS; else lr=0.001 epochs=$EPOCHS; fi
    train_step "$step" "$lr" "$epochs" --dataset voc --task 15-5 --overlap --method "$METHOD" "$@"
done
summary voc 15-5
