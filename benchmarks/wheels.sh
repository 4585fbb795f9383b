#!/usr/bin/env bash
# Collects, on a machine with a package index, the wheels that h200.sh takes to one without.
usage() {
  cat <<'EOF'
usage: benchmarks/wheels.sh [OPTION...] [PACKAGE...]

Wheels for Linux on x86-64: this package's requirements but torch and numpy (and what comes with
these), and what its GPU tests need. PACKAGE: more of them.

  --to DIR          where they go (default: .wheels)
  --part-size SIZE  splits what is larger, e.g. 60M; h200.sh joins the parts (default: no splitting)
  --have FILE       leaves out what that machine has: its pip list --format=freeze
  --optional        with flash-attn-4, nvidia-cudnn-frontend and nvidia-cutlass-dsl, for their kernels, and
                    torchao, for float8
  --python X.Y      of the machine that they go to (default: 3.12)
  --torch VERSION   of that machine (default: 2.11.0)

PYTHON: an interpreter with pip, best of that version, as requirements that depend on it are read with
this one's (default: python3).
EOF
}
set -euo pipefail
cd "$(dirname "$0")/.."
TO=.wheels PART='' HAVE='' VERSION=3.12 TORCH=2.11.0 PYTHON=${PYTHON:-python3}
TESTS=(pytest pytest-timeout hypothesis)
OPTIONAL=() MORE=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --to) TO=$2 && shift ;;
    --part-size) PART=$2 && shift ;;
    --have) HAVE=$2 && shift ;;
    --python) VERSION=$2 && shift ;;
    --torch) TORCH=$2 && shift ;;
    --optional)
      OPTIONAL=('flash-attn-4[cu13]>=4.0.0b1' nvidia-cudnn-frontend 'nvidia-cutlass-dsl[cu13]'
        'torchao>=0.18')
      ;;
    -*) echo "wheels.sh: no option $1; see --help" >&2 && exit 2 ;;
    *) MORE+=("$1") ;;
  esac
  shift
done

target=(--only-binary=:all: --implementation cp --python-version "$VERSION" --platform manylinux2014_x86_64)
for minor in $(seq 17 35); do target+=(--platform "manylinux_2_${minor}_x86_64"); done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$TO"

# setup.py says what the package needs; this file repeats none of it
mapfile -t required < <("$PYTHON" - <<'EOF'
import ast
for node in ast.parse(open("setup.py").read()).body:
    if isinstance(node, ast.Assign) and node.targets[0].id == "REQUIRED":
        print(*ast.literal_eval(node.value), sep="\n")
EOF
)
echo "torch==$TORCH" >"$work/constraints"
"$PYTHON" -m pip install --quiet --dry-run --ignore-installed --report "$work/report" \
  --target "$work/none" "${target[@]}" --constraint "$work/constraints" \
  "${required[@]}" "${TESTS[@]}" "${OPTIONAL[@]}" "${MORE[@]}"

# all that was resolved, but for torch, numpy, what is there, and what these alone ask for
"$PYTHON" - "$work/report" "$HAVE" >"$work/names" <<'EOF'
import json, re, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

found = {normal(i["metadata"]["name"]): i for i in json.load(open(sys.argv[1]))["install"]}
there = {"torch", "numpy"}
if sys.argv[2]:
    there |= {normal(re.match(r"[\w.-]*", line)[0]) for line in open(sys.argv[2])}

def needs(name, extras):
    """(name, its extras) of what a package asks for."""
    for text in found[name]["metadata"].get("requires_dist", ()):
        asked = set(re.findall(r"extra\s*==\s*['\"]([\w.-]+)['\"]", text))
        if not asked or asked & extras:
            other, more = re.match(r"([\w.-]+)\s*(?:\[([\w.,\s-]+)\])?", text).groups()
            yield normal(other), frozenset(re.split(r"[,\s]+", more or ""))

waiting = [(n, frozenset(i.get("requested_extras", ()))) for n, i in found.items() if i["requested"]]
seen = set()
while waiting:
    name, extras = waiting.pop()
    if name in found and name not in there and (name, extras) not in seen:
        seen.add((name, extras))
        waiting += needs(name, extras)
for name in sorted({name for name, _ in seen}):
    print(f"{name}=={found[name]['metadata']['version']}")
EOF
mapfile -t names <"$work/names"
"$PYTHON" -m pip download --quiet --no-deps --dest "$work/wheels" "${target[@]}" "${names[@]}"
rm -f "$TO"/*.whl "$TO"/*.whl.part*
mv "$work"/wheels/*.whl "$TO"
if [ -n "$PART" ]; then
  find "$TO" -name '*.whl' -size +"${PART%B}" | while read -r wheel; do
    split --bytes="$PART" --numeric-suffixes "$wheel" "$wheel.part" && rm "$wheel"
  done
fi
(cd "$TO" && du -h --apparent-size -- *.whl* | sort -k 2)
du -ch --apparent-size "$TO"/*.whl* | tail -n 1
