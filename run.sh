#!/usr/bin/env bash
# ./run.sh          the paper's CIFAR demo: SGD, then P-BFGS and P-SGD in the subspace of its trajectory, for each model
#                   DATASETS="CIFAR10" (or CIFAR100), MODELS="resnet20 ...", CORRUPT=0 (label noise), SAVE_ROOT=.
# ./run.sh cifar100 the same on CIFAR-100 for eleven networks of the zoo, into one table; MODELS, CORRUPT, SAVE_ROOT
# ./run.sh quick    the same pipeline on scikit-learn's digits with a ResNet-8: minutes on two CPU cores, no download;
#                   SEED=1
# ./run.sh test     the test suite; further arguments go to pytest
# ./run.sh lint     ruff
# Each uses the active python where it has the packages, else a .venv made from requirements.txt here.
# A demo or quick start that was interrupted goes on where it stopped when it is called again; FORCE=1 starts over.
# Relative paths in the environment variables are relative to this directory.
# A stage that fails stops the script with that stage's exit status.
set -euo pipefail
python3=$(type -P "${PYTHON:-python3}") || { echo "run.sh: error: there is no ${PYTHON:-python3}; set PYTHON" >&2; exit 1; }
python3=$(realpath --no-symlinks "$python3")
cd "$(dirname "$0")"

# set $python to an interpreter that can import the modules $2, installing the requirements file $1 if there is none
environment() {
    local requirements=$1 modules=$2
    for python in "$python3" .venv/bin/python; do
        if "$python" -c "from datetime import UTC; import $modules" 2>/dev/null; then return; fi
    done
    if ! "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "run.sh: error: Python 3.11 or later is needed; set PYTHON to one" >&2
        exit 1
    fi
    echo "run.sh: installing $requirements into .venv (once; the CUDA build of torch is about 5 GB)"
    "$python3" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
}

# run a script with the console's lines appended to $log too; a signal to this shell (or its process group, which the
# script is not in) is passed on to the script once, and waited for; tee outlives it for the script's last line
stage() {
    [[ $1 != train_* || ${FORCE:-0} == 1 ]] || set -- "$@" --resume auto
    echo "+ python $*" | tee -a "$log"
    local out tee child status=0
    exec {out}> >(trap '' INT TERM HUP; exec tee -a "$log")
    tee=$!
    set -m # a process group of its own
    "$python" -u "$@" >&"$out" 2>&1 &
    child=$!
    set +m
    trap 'kill -TERM $child' TERM HUP
    trap 'kill -INT $child' INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done # a signal ends a wait early
    trap - TERM HUP INT
    exec {out}>&-
    wait "$tee" || true
    ((status == 0)) || exit "$status"
}

demo() {
    local root=${SAVE_ROOT:-.} c=${CORRUPT:-0} dataset model epochs window name
    mkdir -p "$root"
    for dataset in ${DATASETS:-CIFAR10}; do
        # sampling epochs and end of the window, as published for each data set
        case $dataset in CIFAR100) epochs=200 window=101 ;; *) epochs=150 window=81 ;; esac
        for model in ${MODELS:-resnet20}; do
            name=${model}
            [[ $dataset == CIFAR10 ]] || name=${dataset}_${model}
            log=$root/log_$name
            local common=(--datasets "$dataset" --corrupt "$c" --arch "$model" --save-dir "$root/save_labelnoise${c}_$name")
            local subspace=("${common[@]}" --params_start 0 --params_end "$window" --n_components 40)
            stage train_sgd.py "${common[@]}" --lr 0.1 --epochs "$epochs"
            stage train_pbfgs.py "${subspace[@]}" --epochs 20 --batch-size 1024
            stage train_psgd.py "${subspace[@]}" --epochs 40 --lr 1 --batch-size 128
            stage report.py "$root/save_labelnoise${c}_$name" --figure "$root/save_labelnoise${c}_$name/figure.png"
            runs+=("$root/save_labelnoise${c}_$name")
        done
    done
}

zoo() {
    local zoo="vgg11 densenet121 efficientnet googlenet inceptionv3 mobilenet nasnet seresnet18 shufflenetv2 squeezenet"
    DATASETS=CIFAR100 MODELS=${MODELS:-$zoo xception}
    local runs=()
    demo
    log=${SAVE_ROOT:-.}/log_cifar100
    stage report.py "${runs[@]}" --table "${SAVE_ROOT:-.}/cifar100.md"
}

quick() {
    local dir=${SAVE_ROOT:-runs}/quick
    [[ ${SEED:-1} == 1 ]] || dir+=_seed$SEED
    mkdir -p "$dir"
    log=$dir/log
    local common=(--datasets digits --arch resnet8 --randomseed "${SEED:-1}" --save-dir "$dir")
    local subspace=("${common[@]}" --params_start 0 --params_end 46 --n_components 15)
    stage train_sgd.py "${common[@]}" --lr 0.1 --epochs 60 --milestones 45
    stage train_pbfgs.py "${subspace[@]}" --epochs 30 --batch-size 64
    stage train_psgd.py "${subspace[@]}" --epochs 40 --lr 1 --batch-size 128
    stage report.py "$dir" --figure "$dir/figure.png"
}

runtime="torch, torchvision, numpy, sklearn, matplotlib, tqdm"
case ${1:-demo} in
    demo) environment requirements.txt "$runtime"; demo ;;
    cifar100) environment requirements.txt "$runtime"; zoo ;;
    quick) environment requirements.txt "$runtime"; quick ;;
    test) environment requirements-dev.txt "$runtime, pytest"; exec "$python" -m pytest "${@:2}" ;;
    lint) environment requirements-dev.txt "ruff"; exec "$python" -m ruff check . ;;
    *) sed -n '2,/^# A stage/s/^# *//p' "$0" >&2; exit 2 ;;
esac
