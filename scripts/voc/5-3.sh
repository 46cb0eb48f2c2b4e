#!/usr/bin/env bash
# VOC 2012, 5-3: 5 classes, then 5 times 3, the task file beside this script. Overlapped, lr 0.01 then 0.001, 30 epochs a
# step. The releases of AWT and EWF have this task.
#
#   DATA_ROOT=/data GPUS=4 METHOD=MiB+AWT scripts/voc/5-3.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2 3 4 5"}
EPOCHS=${EPOCHS:-30}
TASK_FILE=scripts/voc/5-3.json
train_steps voc 5-3 "$EPOCHS" --overlap "$@"
