#!/usr/bin/env bash
# ./run.sh          the paper's CIFAR demo: SGD, then P-BFGS and P-SGD in the subspace of its trajectory, for each model
#                   DATASETS="CIFAR10" (or CIFAR100), MODELS="resnet20 ...", CORRUPT=0 (label noise), SAVE_ROOT=.
# ./run.sh cifar100 the same on CIFAR-100 for eleven networks of the zoo, into one table; MODELS, CORRUPT, SAVE_ROOT
# ./run.sh imagenet the paper's ImageNet run: ResNet-18, 90 epochs of SGD, 4 of P-BFGS in 120 dimensions; DLDR_DATA=DIR
# ./run.sh finetune pretrained ResNet-18: 5, 10, 15 epochs of SGD, 1 of P-BFGS in the subspace of each; PRETRAINED=FILE
# ./run.sh quick    the same pipeline on scikit-learn's digits with a ResNet-8: minutes on two CPU cores, no download;
#                   SEED=1
# ./run.sh table-cifar10, table-cifar100, table-noise, table-dims, table-basis, table-sampling
#                   the tables, into SAVE_ROOT/SCALE/tables; SCALE=full (or cpu), SEEDS="1 2 3", SAVE_ROOT=runs
# ./run.sh trajectory   how far SGD strays from the subspace, the paths over the loss surface; likewise
# ./run.sh evidence  all of these in order of interest, LIMIT=560 seconds of them: status 75 says that there is more to
#                   do, and the same command goes on; 0 that all is done. SEEDS="1 2 3", SCALE, SAVE_ROOT as above
# ./run.sh test     the test suite; further arguments go to pytest
# ./run.sh lint     ruff
# NPROC=N (or NPROC=gpu, all visible GPUs) trains with that many processes on this machine, through torchrun; FLAGS are
# added to each training command of imagenet and finetune, "--half --workers 8" say.
# Each uses the active python where it has the packages, else a .venv made from requirements.txt here.
# A demo or quick start that was interrupted goes on where it stopped when it is called again; FORCE=1 starts over.
# Relative paths in the environment variables are relative to this directory.
# A stage that fails stops the script with that stage's exit status (with NPROC torchrun's, which is 1).
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
    [[ $1 != train_* || -z ${NPROC:-} ]] || set -- -m torch.distributed.run --standalone "--nproc_per_node=$NPROC" "$@"
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
            stage report.py "$root/save_labelnoise${c}_$name" --figures "$root/save_labelnoise${c}_$name"
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

imagenet() {
    local root=${SAVE_ROOT:-.} name=${MODELS:-resnet18}
    log=$root/log_ImageNet_$name
    mkdir -p "$root"
    # shellcheck disable=SC2206
    local common=(--datasets ImageNet --arch "$name" ${FLAGS:-} --save-dir "$root/save_ImageNet_$name")
    stage train_sgd.py "${common[@]}" --epochs 90 --batch-size 256 --lr 0.1 --samples-per-epoch 6
    # the first 40 epochs' snapshots, every second one: 121
    stage train_pbfgs.py "${common[@]}" --epochs 4 --batch-size 256 --params_start 0 --params_end 241 --params_step 2 \
        --n_components 120
    stage report.py "$root/save_ImageNet_$name" --figures "$root/save_ImageNet_$name"
}

finetune() {
    local root=${SAVE_ROOT:-.} name=${MODELS:-resnet18} epochs k
    log=$root/log_finetune_$name
    mkdir -p "$root"
    # shellcheck disable=SC2206
    local common=(--datasets ImageNet --arch "$name" ${FLAGS:-} --save-dir "$root/save_finetune_$name")
    # the learning rate never drops, so the first 5 and 10 of 15 epochs are the shorter runs
    stage train_sgd.py "${common[@]}" --pretrained ${PRETRAINED:+"$PRETRAINED"} --lr 0.005 --epochs 15 \
        --batch-size 256 --samples-per-epoch 6
    for epochs in 5 10 15; do
        k=$((6 * epochs - 1 < 30 ? 6 * epochs - 1 : 30)) # 30 snapshots have 29 components
        stage train_pbfgs.py "${common[@]}" --output-dir "$root/save_finetune_$name/pbfgs_$epochs" --epochs 1 \
            --batch-size 256 --params_start 1 --params_end $((6 * epochs + 1)) --n_components "$k"
    done
    stage report.py "$root/save_finetune_$name"
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
    stage report.py "$dir" --figures "$dir"
}

# ------------------------------------------------------------------------------------------------- tables
# SCALE=full is the paper's size; cpu one that two cores finish in under an hour a table. Tables share their SGD runs:
# all lie in $SAVE_ROOT/$SCALE/<data set>_c<label noise>_seed<seed>/<run>, and `leaves` lists those of the table at hand.

scale() {
    root=${SAVE_ROOT:-runs}/${SCALE:-full}
    case ${SCALE:-full} in
        full) arch=resnet20 part=() sgd=(--epochs 150) adam=(--epochs 150) window=81 k=40 dims="3 5 6 9 12 15 20 25 40"
            noises="0 0.1 0.2 0.4" noise_dims="5 15 25 40" psgd=(--epochs 40 --batch-size 128)
            pbfgs=(--epochs 20 --batch-size 1024) ;;
        cpu) arch=resnet8 part=(--smalldatasets 0.2) sgd=(--epochs 30 --milestones 20 27) adam=("${sgd[@]}") window=21
            k=15 dims="3 5 10 15 20" noises="0 0.2 0.4" noise_dims="15"
            psgd=(--epochs 20 --batch-size 128 --milestones 12 18) pbfgs=(--epochs 10 --batch-size 256) ;;
        *) echo "run.sh: error: SCALE is full or cpu" >&2; exit 2 ;;
    esac
    dataset=CIFAR10 leaves=()
}

# begin SEED NOISE: the directory of one sampling run and what is compared with it
begin() {
    seed=$1 noise=$2 group=$root/${dataset}_${arch}_c$2_seed$1
    mkdir -p "$group"
    log=$group/console.log
    common=(--datasets "$dataset" --arch "$arch" "${part[@]}" --corrupt "$noise" --randomseed "$seed")
}

# whether the driver need not start a stage to hear that it has nothing to do: that takes seconds for each
finished() { [[ -n ${driven:-} && -f $1 ]]; }

# leaf NAME SCRIPT FLAG ...: one run of the table, skipped if it is finished
leaf() {
    leaves+=("$group/$1")
    ! finished "$group/$1"/*_summary.json || return 0
    case $2 in
        train_sgd.py) stage "$2" "${common[@]}" "${@:3}" --save-dir "$group/$1" ;;
        *) stage "$2" "${common[@]}" --save-dir "$group/sgd" --output-dir "$group/$1" --params_start 0 "${@:3}" ;;
    esac
}

sample() { leaf sgd train_sgd.py --lr 0.1 "${sgd[@]}"; }
in_psgd() { leaf "psgd_$1" train_psgd.py --params_end "$window" --lr 1 "${psgd[@]}" "${@:2}"; }
in_pbfgs() { leaf "pbfgs_$1" train_pbfgs.py --params_end "$window" "${pbfgs[@]}" "${@:2}"; }

# publish NAME: the table of the leaves, and what it was made from, in $root/tables/NAME (no weights)
publish() {
    local directory leaf
    directory=$root/tables/$1
    for leaf in "${leaves[@]}"; do
        mkdir -p "$directory/${leaf#"$root"/}"
        cp "$leaf"/*.json "$leaf"/*.jsonl "$directory/${leaf#"$root"/}"
        cp "${leaf%/*}/console.log" "$directory/$(basename "${leaf%/*}")"
    done
    log=$directory/report.log
    stage report.py "$directory" --table "$directory/table.md" --csv "$directory/runs.csv" \
        --figures "$directory"
}

table_methods() { # SGD, Adam, P-SGD and P-BFGS
    for seed in ${SEEDS:-1}; do
        begin "$seed" 0
        sample
        leaf adam train_sgd.py --optimizer adam "${adam[@]}"
        in_psgd "k$k" --n_components "$k"
        in_pbfgs "k$k" --n_components "$k"
    done
}

table_noise() {
    for seed in ${SEEDS:-1}; do
        for noise in $noises; do
            begin "$seed" "$noise"
            sample
            for d in $noise_dims; do in_psgd "k$d" --n_components "$d"; done
            in_pbfgs "k$k" --n_components "$k"
        done
    done
}

table_dims() {
    for seed in ${SEEDS:-1}; do
        begin "$seed" 0
        sample
        for d in $dims; do in_psgd "k$d" --n_components "$d"; done
    done
}

table_basis() { # principal directions against random ones and the span of snapshots
    for seed in ${SEEDS:-1}; do
        begin "$seed" 0
        sample
        in_psgd "k$k" --n_components "$k"
        in_psgd "random_k$k" --n_components "$k" --basis random
        in_psgd "snapshots_k$k" --n_components "$k" --basis snapshots
    done
}

table_sampling() { # where the window ends, how dense it is
    local end ends samples=2
    case $root in */full) ends="21 41 61 81 101" ;; *) ends="11 16 21" ;; esac
    k=$((${ends%% *} - 1 < 15 ? ${ends%% *} - 1 : 15))
    for seed in ${SEEDS:-1}; do
        begin "$seed" 0
        sample
        for end in $ends; do
            leaf "psgd_end${end}_k$k" train_psgd.py --params_end "$end" --n_components "$k" --lr 1 "${psgd[@]}"
        done
        leaf "psgd_second_k$k" train_psgd.py --params_end "$window" --params_step 2 --n_components "$k" --lr 1 "${psgd[@]}"
        leaf "sgd_twice" train_sgd.py --lr 0.1 "${sgd[@]}" --samples-per-epoch "$samples"
        leaves+=("$group/psgd_twice_k$k") # a window of the same epochs, twice as dense
        finished "$group/psgd_twice_k$k/psgd_summary.json" || stage train_psgd.py "${common[@]}" \
            --save-dir "$group/sgd_twice" --output-dir "$group/psgd_twice_k$k" \
            --params_start 0 --params_end "$((samples * (window - 1) + 1))" --n_components "$k" --lr 1 "${psgd[@]}"
    done
}

table_trajectory() { # how far SGD strays from the subspace, and all three paths over the loss surface
    for seed in ${SEEDS:-1}; do
        begin "$seed" 0
        sample
        in_psgd "k$k" --n_components "$k"
        in_pbfgs "k$k" --n_components "$k"
        finished "$group/trajectory.json" || stage trajectory.py "${common[@]}" \
            --save-dir "$group/sgd" --params_end "$window" --n_components "$k" \
            --runs "$group/psgd_k$k" "$group/pbfgs_k$k" --json "$group/trajectory.json" --figure "$group/trajectory.png"
    done
    for seed in ${SEEDS:-1}; do
        leaf=${dataset}_${arch}_c0_seed$seed
        mkdir -p "$root/tables/trajectory/$leaf"
        cp "$root/$leaf/trajectory.json" "$root/tables/trajectory/$leaf"
    done
}

cifar100_scale() {
    dataset=CIFAR100
    [[ ${SCALE:-full} == full ]] || return 0
    arch=resnet32 sgd=(--epochs 200) adam=("${sgd[@]}") window=101
}

# recipe NAME: a table from its runs to its files
recipe() {
    scale
    case $1 in
        cifar10) table_methods ;;
        cifar100) cifar100_scale; table_methods ;;
        noise | dims | basis | sampling | trajectory) "table_$1" ;;
        *) echo "run.sh: error: there is no table-$1" >&2; exit 2 ;;
    esac
    publish "$1"
}

# every table, those with a figure on record first and for the first seed before the others
tables() {
    local seeds=${SEEDS:-1 2 3} driven=1 done first="cifar10 cifar100 noise" table SEEDS
    for SEEDS in "${seeds%% *}" "$seeds"; do
        for table in $first; do
            scale
            done=$root/tables/finished
            if grep -qxsF "$table $SEEDS" "$done"; then continue; fi
            echo "== $table, seeds $SEEDS"
            recipe "$table"
            echo "$table $SEEDS" >>"$done"
        done
        first+=" basis dims sampling trajectory"
    done
}

# the tables for LIMIT seconds at most; the script at work then saves a checkpoint
evidence() {
    local child status=0 up=
    [[ ${FORCE:-0} != 1 ]] || { echo "run.sh: error: FORCE=1 would start evidence over at each call" >&2; exit 2; }
    [[ ${LIMIT:=560} =~ ^[1-9][0-9]*$ ]] || { echo "run.sh: error: LIMIT is a number of seconds" >&2; exit 2; }
    ./run.sh tables &
    child=$!
    trap 'kill -TERM $child' TERM HUP INT # a child in the background does not get Ctrl-C
    while kill -0 "$child" 2>/dev/null; do
        sleep 1 || true
        if [[ -z $up ]] && ((SECONDS >= LIMIT)); then up=1; kill -TERM "$child" 2>/dev/null || true; fi
    done
    wait "$child" || status=$?
    ((status == 0)) && echo "run.sh: all tables are done" && return
    if [[ -n $up && $status == 143 ]]; then
        echo "run.sh: time is up; call it again to go on"
        exit 75
    fi
    exit "$status"
}

runtime="torch, torchvision, numpy, sklearn, matplotlib, tqdm"
case ${1:-demo} in
    demo) environment requirements.txt "$runtime"; demo ;;
    cifar100) environment requirements.txt "$runtime"; zoo ;;
    imagenet | finetune) environment requirements.txt "$runtime"; "$1" ;;
    trajectory) environment requirements.txt "$runtime"; recipe trajectory ;;
    table-*) environment requirements.txt "$runtime"; recipe "${1#table-}" ;;
    tables) environment requirements.txt "$runtime"; tables ;;
    evidence) evidence ;;
    quick) environment requirements.txt "$runtime"; quick ;;
    test) environment requirements-dev.txt "$runtime, pytest, hypothesis"; exec "$python" -m pytest "${@:2}" ;;
    lint) environment requirements-dev.txt "ruff"; exec "$python" -m ruff check . ;;
    *) sed -n '2,/^# A stage/s/^# *//p' "$0" >&2; exit 2 ;;
esac
