#!/usr/bin/env bash
# Cityscapes, domain-incremental 11-5: 11 cities, then 2 times 5. lr 0.01 then 0.001, 50 epochs a step.
# The presets leave pseudo-labels out here: the steps are cities, every pixel has its label, and no class is new.
#
#   DATA_ROOT=/data GPUS=4 METHOD=PLOP scripts/cityscapes/11-5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/common.sh
source scripts/common.sh # METHOD, GPUS and further variables

STEPS=${STEPS:-"0 1 2"}
EPOCHS=${EPOCHS:-50}
train_steps cityscapes_domain 11-5 "$EPOCHS" "$@"
