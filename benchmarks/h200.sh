#!/usr/bin/env bash
# Tests and benchmarks on one Hopper GPU. Every stage runs, whatever fails in it or before it.
usage() {
  cat <<'EOF'
usage: benchmarks/h200.sh [--smoke] [STAGE...]

  tests      attention and fused kernels against fp64, each test with its outcome and reason
  prefix     prefix-LM with a prefix of its own in each row, 8k, head size 128
  packed     packed documents, against FlexAttention
  training   all presets at 1.3 B parameters, rows of 2048, bf16
  fused      csrc/'s kernels against torch's and torch.compile's
  masks      every mask type, 2k and 8k (only when named)
  float8     training of gpt, t5 and bert with float8 products (only when named; needs torchao)

Without a STAGE the first five, in 25 minutes. Each writes one JSON into OUT as it goes, within ten
minutes; a summary follows. Exit code: 0 if all stages passed, 1 if one failed or ran out of time.

Needs torch 2.11 or later with CUDA and numpy; no network. What else it needs comes from WHEELS, which
benchmarks/wheels.sh fills on a machine with a package index.

  OUT       where results go (default: benchmarks)       PYTHON   the interpreter (default: python3)
  WHEELS    a folder of wheels (default: .wheels)        LIMIT    seconds for all (default: 1500)
  CONFIG    what training trains (default: configs/benchmark.yaml)
  RECIPE    of float8: tensorwise or rowwise (default: tensorwise)
  --smoke   tiny sizes on a CPU, to try this script
EOF
}
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-benchmarks} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.wheels} LIMIT=${LIMIT:-1500}
CONFIG=${CONFIG:-configs/benchmark.yaml} RECIPE=${RECIPE:-tensorwise}
DEVICE=cuda
ATTENTION=(--tokens 65536 --heads 16 --head-sizes 128 --dtype bf16 --repetitions 20)
KERNELS=(auto sdpa cudnn cudnn_ragged cudnn_flex torch_varlen flash2 flash3 flash4 flex flex_flash)
LENGTH=8192
FUSED=(--tokens 16384 --length 8192 --width 2048 --vocabulary-size 32128 --dtype bf16 --repetitions 50)
TRAINING=(--repetitions 20 --warm-up 10 --set model.encoder_layers=11 model.decoder_layers=11)
FLOAT8=(--presets gpt t5 bert --set "training.float8=$RECIPE")

smoke() {
  DEVICE=cpu LENGTH=64 CONFIG=${SMOKE_CONFIG:-configs/tiny.yaml}
  ATTENTION=(--tokens 128 --heads 2 --head-sizes 16 --repetitions 2)
  KERNELS=(auto sdpa reference cudnn)
  FUSED=(--tokens 64 --length 32 --width 64 --vocabulary-size 128 --repetitions 2)
  TRAINING=(--presets t5 --repetitions 2 --warm-up 1)
  FLOAT8=(--set "training.float8=$RECIPE" training.float8_emulate=true training.precision=bf16)
}

wheels() { # what is in WHEELS, unpacked into SITE, whatever of it does not fit here
  mkdir -p "$SITE/whole"
  local part whole
  for part in "$WHEELS"/*.part00; do
    whole=$(basename "${part%.part00}")
    [ -e "$part" ] && cat "$WHEELS/$whole".part* >"$SITE/whole/$whole"
  done
  shopt -s nullglob
  local found=("$WHEELS"/*.whl "$SITE"/whole/*.whl)
  local install=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps
    --no-compile --upgrade --target "$SITE")
  if [ ${#found[@]} -gt 0 ] && ! "${install[@]}" "${found[@]}"; then
    for whole in "${found[@]}"; do "${install[@]}" "$whole" || echo "h200.sh: left out $whole"; done
  fi
  rm -rf "$SITE/whole"
  # some packages are found by a .pth file alone, which Python reads in site directories
  echo 'import os, site; site.addsitedir(os.path.dirname(__file__))' >"$SITE/sitecustomize.py"
}

packages() { # says which packages this machine lacks
  "$PYTHON" - <<'EOF'
from importlib.util import find_spec
def missing(names):
    return ", ".join(n for n in names.split() if not find_spec(n)) or "none"
print("h200.sh: missing packages that stages need:", missing(
    "torch numpy pydantic pydantic_core annotated_types typing_inspection typing_extensions yaml "
    "sentencepiece tokenizers pyarrow safetensors zstandard tensorboard rich jinja2 pytest"))
print("h200.sh: missing packages that add to them:", missing(
    "matplotlib hypothesis flash_attn flash_attn_interface cudnn cutlass triton torchao"))
EOF
}

build() { # the fused kernels, where this machine can
  [ "$DEVICE" = cuda ] && [ ! -e megaarch/kernels/cuda.so ] || return 0
  timeout 200 csrc/cuda/build.sh megaarch/kernels/cuda.so ||
    echo "h200.sh: the fused kernels were not built; their tests are skipped, and the stage fused fails"
}

benchmark() { # BENCHMARK ARGUMENTS...: within SECONDS, named by the stage
  timeout -k 10 $((SECONDS_LEFT + 30)) "$PYTHON" tools/benchmark.py "$@" --device "$DEVICE" \
    --output "$OUT" --name "$STAGE" --time-limit "$SECONDS_LEFT"
}
attention() { benchmark attention --isolate "${ATTENTION[@]}" --kernels "${KERNELS[@]}" "$@"; }

stage() {
  case $STAGE in
    tests) benchmark tests ;;
    prefix)
      attention --lengths "$LENGTH" \
        --masks causal full prefix_eighth prefix_quarter prefix_half prefix_random
      ;;
    packed) attention --lengths "$LENGTH" --masks causal packed_causal packed_prefix ;;
    masks) attention --lengths $((LENGTH / 4)) "$LENGTH" ;;
    training) benchmark train "$CONFIG" "${TRAINING[@]}" ;;
    float8) benchmark train "$CONFIG" "${TRAINING[@]}" "${FLOAT8[@]}" ;;
    fused) benchmark fused --isolate "${FUSED[@]}" --masks prefix_random packed_prefix turns ;;
  esac
}

declare -A MOST=([tests]=300 [prefix]=240 [packed]=200 [training]=500 [fused]=160 [masks]=500 [float8]=400)

result() { # STAGE: the JSON that it has written since it began
  find "$OUT" -name "*-$1-*.json" -newer "$SITE/began" 2>/dev/null | sort | tail -n 1
}

without() { # STAGE REASON: the JSON of a stage that has written none
  mkdir -p "$OUT"
  "$PYTHON" -c 'import json, sys
path, stage, reason = sys.argv[1:]
found = {"benchmark": stage, "complete": False, "failed": reason, "results": []}
open(path, "w").write(json.dumps(found, indent=1) + "\n")' \
    "$OUT/$(date +%Y-%m-%d)-$1-failed-$$.json" "$1" "$2"
}

run() { # STAGE: runs it, and adds a line to SUMMARY
  STAGE=$1
  local began=$SECONDS code word reason=
  local left=$((LIMIT - SECONDS - 45))
  SECONDS_LEFT=$((left < MOST[$STAGE] ? left : MOST[$STAGE]))
  touch "$SITE/began"
  echo "== $STAGE, at most $SECONDS_LEFT s"
  if [ "$SECONDS_LEFT" -gt 0 ]; then
    stage 2>&1 | tee "$SITE/log"
    code=${PIPESTATUS[0]}
    reason=$(grep -E '^benchmark: |^[0-9]+ good, ' "$SITE/log" | tail -n 1)
    reason=${reason:-$(tail -n 1 "$SITE/log")}
  else
    code=3 reason="no time was left"
  fi
  case $code in
    0) word=passed ;;
    3 | 124 | 137) word='out of time' ;;
    *) word=failed ;;
  esac
  [ "$word" = passed ] || FAILED=1
  [ -n "$(result "$STAGE")" ] || without "$STAGE" "$word (exit code $code): $reason"
  SUMMARY+=$(printf '%-10s%-13s%5d s  %s  %s' "$STAGE" "$word" $((SECONDS - began)) \
    "$(result "$STAGE")" "$reason")$'\n'
}

stages=()
for word in "$@"; do
  case $word in
    -h | --help) usage && exit 0 ;;
    --smoke) smoke ;;
    tests | prefix | packed | training | fused | masks | float8) stages+=("$word") ;;
    *) echo "h200.sh: no stage $word; see --help" >&2 && exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(tests prefix packed training fused)

SITE=$(mktemp -d) SUMMARY='' FAILED=0
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
wheels
packages
build
for each in "${stages[@]}"; do run "$each"; done
printf '== summary, %d s in all\n%s' $SECONDS "$SUMMARY"
exit $FAILED
