#!/usr/bin/env bash
# ./run.sh              the demo: SGD, then P-BFGS and P-SGD in the subspace of its trajectory, under 20% label noise
# ./run.sh quick        the same on scikit-learn's digits: 10 to 19 minutes on one busy core, downloads packages only
# ./run.sh table NAME   a table below, into runs/SCALE/tables/NAME
# ./run.sh test [...]   the test suite; further arguments go to pytest
# ./run.sh lint         ruff
#
# Variables, for all tables with the demo and quick: SCALE=full, tenth or cpu; SEEDS="1 2 3", CORRUPT=0 (label noise) and
# MODELS="resnet20 resnet32" in place of the table's; FLAGS="--half --workers 8" for each training command;
# SAVE_ROOT=DIR for all that is written; DLDR_DATA=DIR with the data sets; PRETRAINED=FILE with weights to fine-tune;
# NPROC=N (or gpu) trains with N processes of this machine, through torchrun; PYTHON=python3. Relative paths are
# relative to this directory. Uses the active environment if it has the packages (pyproject.toml says from which version
# on), else a .venv that it makes here from requirements-dev.txt, with uv where there is one.
# Called again it resumes where it stopped, and skips what is finished; FORCE=1 starts over. Each run is logged to log_*
# beside its directory. A stage that fails ends it with the stage's exit status (with NPROC torchrun's, which is 1).

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # for sh run.sh
set -euo pipefail

fail() {
    echo "run.sh: error: $2" >&2
    exit "$1"
}

case $(uname -s) in Linux | Darwin) ;; *) fail 1 "Linux and macOS only (it needs POSIX file locks); on Windows use WSL" ;; esac
python3=$(type -P "${PYTHON:-python3}") || fail 1 "there is no ${PYTHON:-python3}; set PYTHON"
[[ $python3 == /* ]] || python3=$PWD/$python3
self=$0
while [[ -L $self ]]; do # this script may be a link to run.sh
    link=$(readlink "$self")
    [[ $link == /* ]] || link=$(dirname "$self")/$link
    self=$link
done
cd "$(dirname "$self")"

# set $python to an interpreter with the packages $@: the active one, else that of .venv, which is made if need be
environment() {
    local problem another
    python=$python3
    ! problem=$("$python" packages.py "$@" 2>&1) || return 0
    python=.venv/bin/python
    if [[ -e .venv/unfinished ]]; then # it holds the process that installs, or was killed at it
        ! kill -0 "$(<.venv/unfinished)" 2>/dev/null || fail 1 "another run.sh is installing into .venv; wait for it"
        rm -r .venv
    elif [[ -e .venv ]]; then
        another=$("$python" packages.py "$@" 2>&1) || fail 1 "$problem; and .venv is no better: $another"
        echo "run.sh: using .venv, since the active environment will not do: $problem" >&2
        return
    fi
    "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail 1 "$problem; or set PYTHON to Python 3.11 or later, for which requirements.txt is"
    echo "run.sh: the active environment will not do: $problem" >&2
    echo "run.sh: installing requirements-dev.txt into .venv instead, once: about 5 GB (smaller builds: docs/install.md)" >&2
    mkdir .venv
    echo $$ >.venv/unfinished
    if ! install >log_install 2>&1; then
        rm -r .venv
        fail 1 "the installation failed: $(grep . log_install | tail -n 1) (all of it: log_install; docs/install.md)"
    fi
    rm .venv/unfinished
}

install() {
    if type -P uv >/dev/null; then
        uv venv --allow-existing --python "$python3" .venv && uv pip install --python "$python" -r requirements-dev.txt
    elif "$python3" -m venv .venv; then
        "$python" -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
    else
        echo "$python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" && return 1
    fi
}

# run a script, its lines appended to a log too. A signal to this shell, or to its process group, in which the script is
# not, is passed on to the script once and waited for; tee ignores it, for the script's last line.
stage() {
    local before='' word arch='' log=/dev/null fifo tee child status=0
    for word; do
        case $before in --arch) arch=${word##*:} ;; --save-dir) log=$(dirname "$word")/log_$arch ;; esac
        before=$word
    done
    mkdir -p "$(dirname "$log")"
    if [[ $1 == train_* ]]; then
        if [[ ${FORCE:-0} == 1 ]]; then set -- "$@" --overwrite; else set -- "$@" --resume auto; fi
        [[ -z ${NPROC:-} ]] || set -- -m torch.distributed.run --standalone "--nproc_per_node=$NPROC" "$@"
    fi
    echo "+ python $*" | tee -a "$log"
    fifo=$(mktemp -d)/log
    mkfifo "$fifo"
    (trap '' INT TERM HUP && exec tee -a "$log" <"$fifo") &
    tee=$!
    exec 3>"$fifo"
    rm -r "${fifo%/*}"
    set -m # a process group of its own
    "$python" -u "$@" </dev/null >&3 2>&1 3>&- &
    child=$!
    set +m
    trap 'kill -TERM $child' TERM HUP
    trap 'kill -INT $child' INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done # a signal ends a wait early
    trap - TERM HUP INT
    exec 3>&-
    wait "$tee" || true
    ((status == 0)) || exit "$status"
}

table() {
    local lines line
    lines=$("$python3" recipes.py table "$1") # refuses an unknown name before anything is installed
    environment "${runtime[@]}"
    while IFS= read -r line; do
        eval "stage $line"
    done <<<"$lines"
}

runtime=(torch torchvision numpy scikit-learn matplotlib tqdm)
case ${1:-demo} in
    demo | quick) table "${1:-demo}" ;;
    table) table "${2:-}" ;;
    test)
        environment "${runtime[@]}" pytest hypothesis pytest-xdist
        exec "$python" -m pytest --numprocesses auto --dist loadfile "${@:2}" # a process for each core
        ;;
    lint) environment ruff; exec "$python" -m ruff check . ;;
    -h | --help | help) sed -n '2,/^$/s/^# \{0,1\}//p' run.sh; echo; exec "$python3" recipes.py list ;;
    *) fail 2 "no command $1; ./run.sh --help lists them" ;;
esac
