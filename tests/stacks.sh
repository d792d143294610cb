#!/usr/bin/env bash
# tests/stacks.sh oldest|newest [...]    lint and tests on the oldest or the newest packages that pyproject.toml allows, in
# an environment of their own, .venv-oldest or .venv-newest (5 GB each), by uv where there is one; further arguments go to
# pytest. PYTHON=... replaces python3.10 (oldest) and python3 (newest).
set -euo pipefail
cd "$(dirname "$0")/.."
tools=(pytest hypothesis pytest-xdist "$(grep ^ruff requirements-dev.txt)") # the pinned ones need Python 3.11
case ${1:-} in
    oldest)
        python=${PYTHON:-python3.10}
        packages=(torch==2.4.1 torchvision==0.19.1 numpy==1.26.0 scikit-learn==1.3.0 matplotlib==3.8.0 tqdm==4.66.1)
        ;;
    newest)
        python=${PYTHON:-python3}
        packages=(--upgrade torch torchvision numpy scikit-learn matplotlib tqdm)
        ;;
    *)
        echo "stacks.sh: error: say which: oldest or newest" >&2
        exit 2
        ;;
esac
env=$PWD/.venv-$1
if type -P uv >/dev/null; then
    [[ -d $env ]] || uv venv --python "$python" "$env"
    uv pip install --python "$env/bin/python" "${packages[@]}" "${tools[@]}"
else
    [[ -d $env ]] || "$python" -m venv "$env"
    "$env/bin/python" -m pip install "${packages[@]}" "${tools[@]}"
fi
export PYTHON=$env/bin/python
"$PYTHON" -c 'import torch; from dldr.checkpoint import provenance; print(provenance(torch.device("cpu"))["versions"])'
./run.sh lint
./run.sh test "${@:2}"
