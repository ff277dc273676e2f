#!/usr/bin/env bash
# Everything there is to know of a GPU machine, in one call: build, GPU tests, gpu suites, pictures.
#
#   benchmarks/gpu.sh --output DIR [--wheels DIR] [--seconds N] [--stages LIST] [--dry-run]
#
# --output   where results go; every stage's file is there as soon as the stage has rows
# --wheels   wheels to install first, such as diffusers and lycoris-lora; nothing is downloaded
# --seconds  all that may be used, 540 unless told; what no longer fits is left out and said so
# --stages   of: build tests gpu-unet gpu-ops gpu-step gpu-kv pictures; separated by commas
# --dry-run  the same on the CPU in small, without installing anything
#
# Needs Python with torch, Triton, setuptools, wheel, pytest, matplotlib, typer, rich and pydantic,
# and a C++ compiler. Wheels and the tree go into the folder .gpu-site and the active environment.
# PYTHON names the interpreter, python3 unless set. Status 1 if a stage failed or was left out.
set -uo pipefail

fail() { echo "gpu.sh: $*" >&2; exit 2; }

STAGES=build,tests,gpu-unet,gpu-ops,gpu-step,gpu-kv,pictures
output='' wheels='' seconds=540 dry=0 stages=$STAGES
while [ $# -gt 0 ]; do
  case "$1" in
    --output | --wheels | --seconds | --stages)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift 2 ;;
    --dry-run) dry=1; shift ;;
    *) fail "unknown argument $1" ;;
  esac
done
[ -n "$output" ] || fail "--output is missing: the folder for the results"
[[ "$seconds" =~ ^[1-9][0-9]*$ ]] || fail "--seconds must be a whole number above 0, got $seconds"
IFS=, read -ra names <<<"$stages"
for name in "${names[@]:-}"; do
  [[ ",$STAGES," == *",$name,"* ]] || fail "--stages must be of ${STAGES//,/ }, got '$name'"
done
[ -z "$wheels" ] || compgen -G "$wheels/*.whl" >/dev/null || fail "--wheels $wheels has no wheel"
mkdir -p "$output" || fail "--output $output cannot be made"
output=$(cd "$output" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
cd "$(dirname "$0")/.." || fail "cannot enter the repository"

python=${PYTHON:-python3}
site=$PWD/.gpu-site
export PYTHONPATH="$PWD:$PWD/python:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
deadline=$((SECONDS + seconds))
PICTURE_SECONDS=30 # kept for the pictures of what there is
device=cuda quick='' collect=''
if [ "$dry" = 1 ]; then device=cpu quick=--quick collect=--collect-only; fi
failed=0

gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())' 2>&1) \
  || fail "$python cannot import torch: ${gpu##*$'\n'}"
[ "$dry" = 1 ] || [ "${gpu##*$'\n'}" = True ] \
  || fail "torch.cuda.is_available() is false for $python; without a GPU there is --dry-run"

# What became of every stage, for the screen and for the record.
printf '| stage | seconds | outcome |\n| --- | ---: | --- |\n' >"$output/stages.md"
say() {
  printf '%-10s %4s s  %s\n' "$1" "$2" "$3"
  printf '| %s | %s | %s |\n' "$1" "$2" "$3" >>"$output/stages.md"
}

# stage NAME SECONDS FUNCTION [ARGUMENT]: the function within its own time and the whole's, its text in a log
stage() {
  local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) status
  shift 2
  [[ ",$stages," == *",$name,"* ]] || return 0
  [ "$name" = pictures ] || left=$((left - PICTURE_SECONDS))
  if [ "$left" -lt 5 ]; then
    say "$name" 0 "left out: the $seconds s are used up"
    failed=1
    return 0
  fi
  [ "$limit" -le "$left" ] || limit=$left
  export STAGE_SECONDS=$limit
  timeout -k 5 "$limit" bash -c '"$@"' "$name" "$@" >"$output/$name.log" 2>&1
  status=$?
  case $status in
    0) say "$name" $((SECONDS - began)) ok ;;
    124 | 137) say "$name" $((SECONDS - began)) "stopped after $limit s; what it had is kept" ;;
    *) say "$name" $((SECONDS - began)) "status $status: $(grep -v '^ *$' "$output/$name.log" | tail -n 1 | cut -c 1-200)" ;;
  esac
  [ "$status" = 0 ] || failed=1
}

build() {
  if [ "$dry" = 1 ]; then
    "$python" -c 'import stamina_kernels; print(stamina_kernels.info())'
    return
  fi
  if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" \
      "$wheels"/*.whl || return
  fi
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . || return
  "$python" -c 'import stamina_kernels; print(stamina_kernels.info())'
}

# What is marked so, and Triton's kernels whole: where there is a GPU they run on it.
tests() {
  local workers=() files=(tests/kernels/test_*.py)
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
  "$python" -c 'import diffusers' 2>/dev/null && files+=(tests/adapters/test_unet_on_gpu.py)
  # shellcheck disable=SC2086 # no word where there is nothing
  "$python" -m pytest -q -m "not aot" -k "gpu or test_triton or embedding_mlp" $collect "${workers[@]}" "${files[@]}"
}

suite() {
  # the last fifth is for the task that is running then
  # shellcheck disable=SC2086 # no word where there is nothing
  "$python" -m benchmarks run "$1" --json "$output/$1.json" --device "$device" $quick \
    --seconds $((STAGE_SECONDS * 8 / 10))
}

pictures() {
  local file status=0
  echo '# Results: GPU' >"$output/tables.md"
  for file in "$output"/gpu-*.json; do
    [ -e "$file" ] || continue
    "$python" -m benchmarks plot "$file" --output "$output" || status=1
    { printf '\n## %s\n\n' "$(basename "$file" .json)"
      "$python" -m benchmarks table "$file"; } >>"$output/tables.md" || status=1
  done
  return $status
}

export -f build tests suite pictures
export python site wheels output device dry quick collect

stage build 60 build
stage tests 170 tests
stage gpu-unet 70 suite gpu-unet
stage gpu-ops 75 suite gpu-ops
stage gpu-step 120 suite gpu-step
stage gpu-kv 150 suite gpu-kv
stage pictures 60 pictures

if [ -e "$output/tables.md" ]; then
  { echo; echo '## Stages'; echo; cat "$output/stages.md"; } >>"$output/tables.md"
  echo 'Goals, and what was reached:'
  grep -E '^\| `[^|]*\| [^|]* \| (>=|<=|>) ' "$output/tables.md"
fi
exit $failed
