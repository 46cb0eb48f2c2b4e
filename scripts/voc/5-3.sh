#!/usr/bin/env bash
# VOC 2012, 5-3: 5 classes, then 5 times 3, the task file beside this script. Overlapped, lr 0.01 then 0.001, 30 epochs a
# step. The releases of AWT and EWF have this task.
#
#   DATA_ROOT=/data GPUS=4 METHOD=MiB+AWT scripts/voc/5-3.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP} # or LSKD, MiB, ...: python run.py --list_methods
GPUS=${GPUS:-2}
STEPS=${STEPS:-"0 1 2 3 4 5"}
EPOCHS=${EPOCHS:-30}
# further variables: scripts/common.sh
# shellcheck source=scripts/common.sh
source scripts/common.sh

for step in $STEPS; do
    if [[ $step == 0 ]]; then lr=$FIRST_LR; else lr=0.001; fi
    train_step "$step" "$lr" "$EPOCHS" --dataset voc --task_file scripts/voc/5-3.json --overlap --method "$METHOD" "$@"
done
summary voc 5-3
