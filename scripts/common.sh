# shellcheck shell=bash
# What the schedules in voc/, ade/ and cityscapes/ share. They set DATA_ROOT, METHOD, GPUS and STEPS, then source this
# file from the project's folder, where relative paths start. The rest can be set in the environment too:
#
#   FIRST_LR   learning rate of step 0 (as the method was published: 0.02 with AWT and NeST, and for RCIL on VOC, else 0.01)
#   BATCH      images a process; GPUS x BATCH = 24 is the published batch (24 / GPUS)
#   NAME       name of the experiment (METHOD)
#   SEED       random seed (42)
#   OPT_LEVEL  O1: mixed precision; O0: float32 (O1)
#   PRETRAINED ImageNet weights: torchvision, a file, or empty for pretrained/BODY_NORM.pth.tar (torchvision)
#   DATE       date in the name of the results (today)
#   STEP0_CKPT checkpoint of step 0 that step 1 starts from, with STEPS="1 2 ...": most methods share the first step
#   PYTHON     interpreter (.venv/bin/python where it exists, else python3)
#
# Words after a script's name go to run.py. A script that was stopped continues when it is started again (with the DATE
# of the first start, if that was another day).

case $METHOD in
    *+AWT | *+NeST) FIRST_LR=${FIRST_LR:-0.02} ;;
    *) FIRST_LR=${FIRST_LR:-0.01} ;;
esac
# refuse SENTENCE: a mistake in a variable is said before anything is started
refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}
if [[ ! $GPUS =~ ^[1-9][0-9]*$ ]]; then refuse "GPUS=$GPUS is not a number of processes; give a whole number from 1 to 24"; fi
if ((GPUS > 24)) && [[ -z ${BATCH:-} ]]; then refuse "GPUS=$GPUS is more than the batch of 24 images; give BATCH, images a process, too"; fi
if [[ ! -d $DATA_ROOT ]]; then refuse "DATA_ROOT=$DATA_ROOT is not a folder; give the one that holds the data set"; fi

BATCH=${BATCH:-$((24 / GPUS))}
NAME=${NAME:-$METHOD}
SEED=${SEED:-42}
OPT_LEVEL=${OPT_LEVEL:-O1}
PRETRAINED=${PRETRAINED-torchvision}
DATE=${DATE:-$(date +%F)}
STEP0_CKPT=${STEP0_CKPT:-}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

# train_step STEP LR EPOCHS [further options of run.py]
train_step() {
    local step=$1 lr=$2 epochs=$3 optional=()
    shift 3
    if [[ -n $PRETRAINED ]]; then optional+=(--pretrained "$PRETRAINED"); fi
    if [[ $step == 1 && -n $STEP0_CKPT ]]; then optional+=(--step_ckpt "$STEP0_CKPT"); fi
    "$PYTHON" scripts/launch.py --standalone --nproc_per_node="$GPUS" run.py \
        --data_root "$DATA_ROOT" --name "$NAME" --date "$DATE" --random_seed "$SEED" --batch_size "$BATCH" \
        --opt_level "$OPT_LEVEL" --resume --step "$step" --lr "$lr" --epochs "$epochs" \
        ${optional[@]+"${optional[@]}"} "$@"
}

# summary DATASET TASK: the scores of all steps
summary() {
    "$PYTHON" scripts/average_csv.py "results/${DATE}_$1_$2_$NAME.csv"
}
