#!/usr/bin/env bash
# The H100 evidence in one go, on the GPU host, after infra/gpu/unpack.sh: h100.sh OUT
# (about 25 minutes; the two exports can run before, beside the transfers: h100.sh export).
set -uo pipefail
clip() { python3 -W ignore -m benchmarks.tensorrt.clip "$@"; }
if [ "$1" = export ]; then clip /tmp/clip2 8 2 && clip /tmp/clip12 64 12; exit; fi
source /tmp/kit/env.sh
h100() { trt-python -m benchmarks.tensorrt.h100 "$@" 2>&1 | cut -c1-700; }
h100 int8refit /tmp/clip2 "$1/int8refit.json" &
h100 features /tmp/clip2 "$1/features2.json" "plain,timing cache new,timing cache again,ampere_plus,lean runtime,timeout,bad bytes" &
wait
h100 precision /tmp/clip12 "$1/precision.json"
h100 sparsity /tmp/clip12 "$1/sparsity.json"
