#!/usr/bin/env bash
# Cityscapes, domain-incremental 1-1: 21 cities, one at a time. lr 0.01 then 0.001, 50 epochs a step.
# The presets leave pseudo-labels out here: the steps are cities, every pixel has its label, and no class is new.
#
#   DATA_ROOT=/data GPUS=4 METHOD=PLOP scripts/cityscapes/1-1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"}
EPOCHS=${EPOCHS:-50}
train_steps cityscapes_domain 1-1 "$EPOCHS" "$@"
