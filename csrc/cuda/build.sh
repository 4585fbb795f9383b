#!/usr/bin/env bash
# Compiles the CUDA kernels into one library, for Ampere and Hopper, with PTX for what comes later:
#   csrc/cuda/build.sh OUT.so [more for nvcc]        NVCC: the compiler (default: nvcc)
set -euo pipefail
cd "$(dirname "$0")"
case "$1" in /*) out=$1 ;; *) out=$OLDPWD/$1 ;; esac
exec "${NVCC:-nvcc}" -O3 -std=c++17 --shared -Xcompiler -fPIC --threads 0 \
  -gencode arch=compute_80,code='[sm_80,compute_80]' -gencode arch=compute_90a,code=sm_90a \
  "${@:2}" -o "$out" rms_norm.cu rows.cu cross_entropy.cu
