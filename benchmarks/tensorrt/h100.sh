#!/usr/bin/env bash
# The evidence of docs/tensorrt.md in one go, on the GPU host, after infra/gpu/unpack.sh.
#   usage: h100.sh export     with the host's own PyTorch (1 minute; can run beside the transfers)
#          h100.sh OUT        about 40 minutes; each step writes its own file, so that it can be cut short
set -uo pipefail
cd "$(dirname "$0")/../.."
clip() { python3 -W ignore -m benchmarks.tensorrt.clip "$@"; }
if [ "$1" = export ]; then clip /tmp/clip2 8 2 && clip /tmp/clip12 64 12 && clip /tmp/clip24 64 24; exit; fi
source "${KIT:-/tmp/kit}/env.sh"
h100() { trt-python -m benchmarks.tensorrt.h100 "$@" 2>&1 | cut -c1-700; }
h100 refit /tmp/clip24 "$1/refit.json"
h100 precision /tmp/clip12 "$1/precision.json"
h100 sparsity /tmp/clip12 "$1/sparsity.json"
h100 int8refit /tmp/clip2 "$1/int8refit.json"
trt-python -m benchmarks.tensorrt.puzzle "$1/puzzle.json" | cut -c1-700
h100 features /tmp/clip2 "$1/features.json"
