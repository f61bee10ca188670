#!/usr/bin/env bash
# The evidence of docs/tensorrt.md on a GPU host with TensorRT 8.6 (infra/gpu/unpack.sh), in order of worth.
#   usage: h100.sh export             with the host's own PyTorch: 1 to 2 minutes, can run beside the transfers
#          h100.sh OUT [SECONDS]      waits for the steps SECONDS long; run again, it goes on waiting
# One lane for each GPU takes the next step from one queue, so what is timed is alone on its GPU; lanes outlive
# this script. Each step is a process with a time limit of its own; OUT gets steps.log and h100.tar.gz
# (every report and log). Work lies in WORK (default /tmp/h100).
set -uo pipefail
cd "$(dirname "$0")/../.."
work=${WORK:-/tmp/h100}; mkdir -p "$work/results" "$work/taken"
field=(--models clip-text clip-image unet)

export_all() {
  clip() { python3 -W ignore -m benchmarks.tensorrt.clip "$@"; }
  clip "$work/clip2" 8 2 && clip "$work/clip24" 8 24 && clip "$work/clip12" 64 12
  python3 -W ignore -m benchmarks.tensorrt "$work/field" --export 17 "${field[@]}" --layers 2
  for model in clip-text unet clip-image; do
    python3 -W ignore -m benchmarks.tensorrt "$work/whole-$model" --export 17 --models $model
  done
  touch "$work/exported"
}

# step NAME LIMIT COMMAND…: once, by the lane that takes it first.
step() {
  local name=$1 limit=$2 start=$(date +%s) status; shift 2
  mkdir "$work/taken/$name" 2>/dev/null || return
  timeout -k 5 "$limit" "$@" >"$work/results/$name.log" 2>&1; status=$?
  echo "$name: status $status, $(($(date +%s) - start)) s, GPU $CUDA_VISIBLE_DEVICES" >>"$work/steps.log"
}

# h100 NAME LIMIT STEP CLIP [ONLY]; ONLY: of `sparsity` and `features`, the rows to make
h100() {
  local name=$1 limit=$2 what=$3 clip=$4; shift 4
  step "$name" "$limit" trt-python -m benchmarks.tensorrt.h100 "$what" "$work/$clip" "$work/results/$name.json" "$@"
}

sparse() { h100 "sparse-$1-$2-$3" 900 sparsity clip2 "$1 $2 wide $3 rows"; }

whole() {  # a model of the field tables at full size
  step "whole-$1" 900 trt-python -m benchmarks.tensorrt "$work/whole-$1" --level 2 --models "$1"
}

lane() {
  # What the seconds are is what these steps took, or a guess from their parts ("~").
  h100 refit 900 refit clip24                                                     # ~ 600 s
  step field 500 trt-python -m benchmarks.tensorrt "$work/field" --level 0 --batch 16 "${field[@]}" --layers 2  # 242 s
  sparse int8 4096 8192; sparse fp16 4096 8192                                      # ~ 300 s each at level 5
  h100 sparseclip 600 sparseclip clip12                                             # ~ 300 s
  sparse fp16 4096 128; sparse int8 4096 128
  sparse fp16 1024 8192; sparse int8 1024 8192; sparse fp16 1024 128; sparse int8 1024 128
  sparse fp16 8192 8192; sparse fp16 8192 128; sparse int8 8192 8192; sparse int8 8192 128  # 4 plans of 350 s each
  whole clip-text; whole unet; whole clip-image
  h100 rounds 150 rounds clip24                                                     # 72 s
  h100 features 500 features clip2
  h100 int8trial 180 int8trial clip2                                                # 74 s
  h100 lean 120 lean clip2                                                          # 35 s
  h100 int8refit 120 int8refit clip2
  h100 precision 400 precision clip12
  echo "GPU $CUDA_VISIBLE_DEVICES: nothing left" >>"$work/steps.log"
}

case $1 in
export) export_all; exit ;;
lane) lane; exit ;;
esac

out=$1; end=$(($(date +%s) + ${2:-1200})); mkdir -p "$out"
source "${KIT:-/tmp/kit}/env.sh"
command -v trt-python >/dev/null || { echo "no trt-python: run infra/gpu/unpack.sh first"; exit 2; }
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader)
if mkdir "$work/lanes" 2>/dev/null; then
  for gpu in $gpus; do
    CUDA_VISIBLE_DEVICES=$gpu setsid nohup bash "$0" lane >"$work/lane-$gpu.log" 2>&1 </dev/null &
  done
fi
until [ "$(date +%s)" -ge "$end" ] || [ "$(grep -c 'nothing left' "$work/steps.log" 2>/dev/null)" = "$(wc -w <<<"$gpus")" ]; do
  sleep 2
done
tar -C "$work/results" -czf "$out/h100.tar.gz" --exclude='*.plan' --exclude='*.onnx' --exclude='*.npz' --exclude=cache .
cp "$work/steps.log" "$work"/lane-*.log "$out/" 2>/dev/null
for report in "$work"/field/report.json "$work"/whole-*/report.json; do
  cp "$report" "$out/$(basename "$(dirname "$report")").json" 2>/dev/null
done
cat "$work/steps.log"; ls "$work/taken"
