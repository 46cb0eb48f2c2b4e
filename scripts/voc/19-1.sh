#!/usr/bin/env bash
# VOC 2012, 19-1: 19 classes, then 1. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
# SDR as published: disjoint, lr 0.001 then 0.0001, batch 8, float32, and a step 0 that only adds the prototypes.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/19-1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
setting=(--overlap)
case $METHOD in # as published; 30 epochs where nothing is
    ALIFE | ALIFE-M) EPOCHS=${EPOCHS:-5} ;;
    SDR)
        FIRST_LR=${FIRST_LR:-0.001} LR=${LR:-0.0001} BATCH=${BATCH:-$((8 / GPUS))} OPT_LEVEL=${OPT_LEVEL:-O0}
        FIRST_METHOD="FT --unce --loss_de_prototypes 1"
        setting=()
        ;;
esac
EPOCHS=${EPOCHS:-30}
train_steps voc 19-1 "$EPOCHS" ${setting[@]+"${setting[@]}"} "$@"
