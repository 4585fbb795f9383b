#!/usr/bin/env bash
# Tests and benchmarks on one Hopper GPU, a stage at a time; each ends within ten minutes.
#
#   benchmarks/h200.sh tests       every attention kernel against the reference, on the GPU
#   benchmarks/h200.sh fused       builds csrc/, tests its kernels, and times them against torch's
#   benchmarks/h200.sh prefix      prefix-LM with a prefix of its own in each row, 8k, head size 128
#   benchmarks/h200.sh packed      packed documents, against FlexAttention
#   benchmarks/h200.sh masks       every mask type and length
#   benchmarks/h200.sh training    eight presets at 1.3 B parameters, rows of 2048, bf16
#   benchmarks/h200.sh             all of them
#
# Needs torch 2.11 or later and this package's requirements (setup.py). OUT: where JSON and plots go
# (default: benchmarks). PYTHON: the interpreter. What follows the stage goes to the benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
KERNELS=(auto sdpa cudnn cudnn_ragged cudnn_flex torch_varlen flash2 flash3 flash4 flex flex_flash)

benchmark() { timeout 580 "$PYTHON" tools/benchmark.py "$@" --device cuda --output "$OUT"; }

# eight rows of 8192 tokens, 16 heads of 128
attention() {
  benchmark attention --tokens 65536 --heads 16 --head-sizes 128 --dtype bf16 \
    --kernels "${KERNELS[@]}" "$@"
}

tests() { timeout 580 "$PYTHON" -m pytest tests/attention/test_cuda.py -rs "$@"; }
fused() {
  "$PYTHON" setup.py build_ext --inplace
  timeout 300 "$PYTHON" -m pytest tests/kernels/test_cuda.py -rs
  benchmark fused --tokens 16384 --length 8192 --width 2048 --vocabulary-size 32128 --dtype bf16 \
    --masks prefix_random packed_prefix turns --repetitions 50 "$@"
}
prefix() {
  attention --lengths 8192 --repetitions 20 \
    --masks causal full prefix_eighth prefix_quarter prefix_half prefix_random "$@"
}
packed() {
  attention --lengths 8192 --repetitions 20 --masks causal packed_causal packed_prefix "$@"
}
masks() { attention --lengths 2048 8192 --repetitions 9 "$@"; }
training() {
  benchmark train configs/benchmark.yaml --repetitions 8 \
    --presets gpt prefix_lm unilm bert glm xlnet "$@"
  benchmark train configs/benchmark.yaml --repetitions 8 --presets t5 bart \
    --set model.encoder_layers=11 model.decoder_layers=11 "$@"
}

stage=${1:-all}
shift || true
case "$stage" in
  tests | fused | prefix | packed | masks | training) "$stage" "$@" ;;
  all) for each in tests fused prefix packed masks training; do "$each"; done ;;
  *) echo "h200.sh: no stage $stage: choose tests, fused, prefix, packed, masks, training or all" >&2; exit 2 ;;
esac
