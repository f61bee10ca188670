#!/usr/bin/env bash
# The evidence of docs/tensorrt.md on a GPU host with TensorRT 8.6 (infra/gpu/unpack.sh), in order of worth.
#   usage: h100.sh export             with the host's own PyTorch: 1 to 2 minutes, can run beside the transfers
#          h100.sh OUT [SECONDS]      the steps, as many as fit; run again, it goes on where it ended
# Each step is a process with a time limit of its own; OUT gets steps.log and h100.tar.gz (every report and
# log) after each. Work lies in WORK (default /tmp/h100).
set -uo pipefail
cd "$(dirname "$0")/../.."
work=${WORK:-/tmp/h100}; mkdir -p "$work/results"
clip() { python3 -W ignore -m benchmarks.tensorrt.clip "$@"; }
field=(--models clip-text clip-image unet --layers 2)

if [ "$1" = export ]; then
  clip "$work/clip2" 8 2 && clip "$work/clip12" 64 12 && clip "$work/clip24" 64 24
  python3 -W ignore -m benchmarks.tensorrt "$work/field" --export 17 "${field[@]}"
  touch "$work/exported"
  exit
fi

out=$1; end=$(($(date +%s) + ${2:-1200})); mkdir -p "$out"
source "${KIT:-/tmp/kit}/env.sh"
command -v trt-python >/dev/null || { echo "no trt-python: run infra/gpu/unpack.sh first"; exit 2; }

collect() {
  (flock 9
   tar -C "$work/results" -czf "$out/.tar" --exclude='*.plan' --exclude='*.onnx' --exclude='*.npz' --exclude=cache . &&
     mv "$out/.tar" "$out/h100.tar.gz"
   cp "$work/steps.log" "$out/") 9>"$work/lock"
}

# step NAME NEEDS LIMIT COMMAND…: not again when done; not begun with less than NEEDS seconds left.
step() {
  local name=$1 needs=$2 limit=$3 start left status; shift 3
  [ -e "$work/$name.done" ] && return
  start=$(date +%s); left=$((end - start))
  if [ "$left" -lt "$needs" ]; then echo "$name: not begun, $left s left" >>"$work/steps.log"; return; fi
  timeout -k 5 "$((left < limit ? left : limit))" "$@" >"$work/results/$name.log" 2>&1; status=$?
  case $status in 124 | 137) [ "$left" -lt "$limit" ] || touch "$work/$name.done" ;; *) touch "$work/$name.done" ;; esac
  echo "$name: status $status, $(($(date +%s) - start)) s" >>"$work/steps.log"
  collect
}

# h100 NAME NEEDS LIMIT STEP CLIP [ONLY]
h100() {
  local name=$1 needs=$2 limit=$3 what=$4 clip=$5; shift 5
  step "$name" "$needs" "$limit" trt-python -m benchmarks.tensorrt.h100 "$what" "$work/$clip" "$work/results/$name.json" "$@"
}

echo "$(date -u +%T) begins, ${2:-1200} s" >>"$work/steps.log"
# Beside each other: what is only to work (their seconds are not comparable).
h100 lean 30 120 lean clip2 &
h100 int8trial 40 180 int8trial clip2 &
h100 features1 60 200 features clip2 "refit always,refit with new weights,int8 refit,workspace of 1 MiB,weights of another graph,bad bytes" &
h100 features3 30 120 features clip2 "lean runtime" &
step field 60 280 trt-python -m benchmarks.tensorrt "$work/field" --level 0 --batch 16 "${field[@]}" &
wait
cp "$work/field/report.json" "$work/results/field.json" 2>/dev/null; collect
# Alone on the GPU: what is timed. One plan 4096 wide takes minutes at level 5, so the first table is of level 3.
export LEVEL=3
h100 sparse1024 40 200 sparsity clip2 "fp16 1024 wide 8192 rows,int8 1024 wide 8192 rows"
h100 sparse4096 90 400 sparsity clip2 "fp16 4096 wide 8192 rows,int8 4096 wide 8192 rows"
h100 refit 220 300 refit clip12
h100 rebuild8 110 260 rebuild8 clip12
h100 rounds 50 150 rounds clip12
h100 sparseclip 300 420 sparseclip clip12
h100 sparse128 90 400 sparsity clip2 "fp16 4096 wide 128 rows,int8 4096 wide 128 rows,fp16 1024 wide 128 rows,int8 1024 wide 128 rows"
h100 rebuild 200 330 rebuild clip24
h100 int8refit 30 120 int8refit clip2
h100 features2 60 300 features clip2 "two profiles,fastest of three,timing cache new,timing cache again,ampere_plus"
h100 sparse8192 150 500 sparsity clip2 "fp16 8192 wide 8192 rows,int8 8192 wide 8192 rows,fp16 8192 wide 128 rows,int8 8192 wide 128 rows"
h100 precision 200 400 precision clip12
LEVEL=5 h100 sparselevel5 500 580 sparsity clip2 "fp16 4096 wide 8192 rows"
collect; cat "$work/steps.log"
