#!/usr/bin/env bash
# Writes the lock files of the images anew from pyproject.toml and constraints.txt; needs uv (https://docs.astral.sh/uv).
#
# requirements.lock      all that runs need, with torch's default build and the CUDA libraries that it brings along
# requirements-cpu.lock  the same without torch and CUDA: the CPU image takes torch from PyTorch's own index
# build.lock             what builds packages from source; it stays out of the images
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() {
    uv pip compile --quiet --generate-hashes --no-annotate --constraints constraints.txt \
        --python-version 3.12 --python-platform x86_64-manylinux_2_28 --custom-compile-command docker/lock.sh "$@"
}

runs=(pyproject.toml --extra video --extra deepspeed --extra adapters --extra tensorboard --extra wandb --extra sweep)
compile "${runs[@]}" --output-file docker/requirements.lock
mapfile -t cuda < <(grep --only-matching --extended-regexp '^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==' \
    docker/requirements.lock | tr --delete '=')
compile "${runs[@]}" "${cuda[@]/#/--no-emit-package=}" --output-file docker/requirements-cpu.lock
compile docker/build.in --output-file docker/build.lock
