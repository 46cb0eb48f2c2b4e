#!/usr/bin/env bash
# VOC 2012, 19-1: 19 classes, then 1. Overlapped, lr 0.01 then 0.001, 30 epochs a step.
# SDR as published: disjoint, lr 0.001 then 0.0001, batch 8, float32, and a step 0 that only adds the prototypes.
#
#   DATA_ROOT=/data GPUS=4 METHOD=LSKD scripts/voc/19-1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, MiB, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1"}
FIRST_EPOCHS=${FIRST_EPOCHS:-30}
case $METHOD in # as published
    ALIFE | ALIFE-M) EPOCHS=${EPOCHS:-5} ;;
    *) EPOCHS=${EPOCHS:-30} ;;
esac
setting=(--overlap)
first=(--method "$METHOD")
case $METHOD in # as published
    SDR)
        FIRST_LR=${FIRST_LR:-0.001} LR=${LR:-0.0001} BATCH=${BATCH:-$((8 / GPUS))} OPT_LEVEL=${OPT_LEVEL:-O0}
        setting=()
        first=(--method FT --unce --loss_de_prototypes 1)
        ;;
esac
LR=${LR:-0.001}
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then
        lr=$FIRST_LR epochs=$FIRST_EPOCHS method=("${first[@]}")
    else
        lr=$LR epochs=$EPOCHS method=(--method "$METHOD")
    fi
    train_step "$step" "$lr" "$epochs" --dataset voc --task 19-1 ${setting[@]+"${setting[@]}"} "${method[@]}" "$@"
done
summary voc 19-1
