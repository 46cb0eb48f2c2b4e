# shellcheck shell=bash
# What the schedules in voc/, ade/ and cityscapes/ share. They source this file from the project's folder, where relative paths start,
# state what is particular to their task, and call train_steps. Every value can be set in the environment:
#
#   DATA_ROOT    folder of the data sets (data)
#   METHOD       python run.py --list_methods names them (PLOP)
#   GPUS         processes (2)
#   STEPS        steps to train (all of the task)
#   FIRST_EPOCHS epochs of step 0; EPOCHS those of later steps (as published)
#   FIRST_LR     learning rate of step 0 (as published: 0.02 with AWT and NeST, and for RCIL on VOC, else 0.01); LR that of later ones
#   BATCH        images a process; GPUS x BATCH = 24 is the published batch (24 / GPUS)
#   NAME         name of the experiment (METHOD)
#   SEED         random seed (42)
#   OPT_LEVEL    O1: mixed precision; O0: float32 (O1)
#   PRETRAINED   ImageNet weights: torchvision, a file, or empty for pretrained/BODY_NORM.pth.tar (torchvision)
#   DATE         date in the name of the results (today)
#   STEP0_CKPT   checkpoint of step 0 that step 1 starts from, with STEPS="1 2 ...": most methods share the first step
#   PYTHON       interpreter (.venv/bin/python where it exists, else python3)
#
# Words after a script's name go to run.py. A script that was stopped continues when it is started again (with the DATE
# of the first start, if that was another day).

# refuse SENTENCE: a mistake in a variable is said before anything is started
refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

DATA_ROOT=${DATA_ROOT:-data}
METHOD=${METHOD:-PLOP}
GPUS=${GPUS:-2}
if [[ ! $GPUS =~ ^[1-9][0-9]*$ ]]; then refuse "GPUS=$GPUS is not a number of processes; give a whole number from 1 to 24"; fi
if [[ ! -d $DATA_ROOT ]]; then refuse "DATA_ROOT=$DATA_ROOT is not a folder; give the one that holds the data set"; fi

NAME=${NAME:-$METHOD}
SEED=${SEED:-42}
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
        --data_root "$DATA_ROOT" --name "$NAME" --date "$DATE" --random_seed "$SEED" --batch_size "${BATCH:-$((24 / GPUS))}" \
        --opt_level "${OPT_LEVEL:-O1}" --resume --step "$step" --lr "$lr" --epochs "$epochs" \
        ${optional[@]+"${optional[@]}"} "$@"
}

# Set by a schedule, not by the environment: epochs of step 1 alone, method and further options of step 0, and a file instead of --task.
SECOND_EPOCHS='' FIRST_METHOD='' TASK_FILE=''

# train_steps DATASET TASK EPOCHS [further options of run.py]: all of STEPS, then a table of their scores
train_steps() {
    local dataset=$1 task=$2 later=$3 step lr epochs method first_lr=0.01 classes=(--task "$2")
    shift 3
    if ((GPUS > 24)) && [[ -z ${BATCH:-} ]]; then refuse "GPUS=$GPUS is more than the batch of 24 images; give BATCH, images a process, too"; fi
    case $METHOD in *+AWT | *+NeST) first_lr=0.02 ;; esac
    if [[ -n $TASK_FILE ]]; then classes=(--task_file "$TASK_FILE"); fi
    for step in $STEPS; do
        lr=${LR:-0.001} epochs=$later method=("$METHOD")
        if [[ $step == 0 ]]; then
            lr=${FIRST_LR:-$first_lr} epochs=${FIRST_EPOCHS:-$later}
            read -r -a method <<<"${FIRST_METHOD:-$METHOD}"
        elif [[ $step == 1 ]]; then
            epochs=${SECOND_EPOCHS:-$later}
        fi
        train_step "$step" "$lr" "$epochs" --dataset "$dataset" "${classes[@]}" --method "${method[@]}" "$@"
    done
    "$PYTHON" scripts/average_csv.py "results/${DATE}_${dataset}_${task}_$NAME.csv"
}
