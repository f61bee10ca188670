#!/usr/bin/env bash
# Packs what a GPU host with no network needs to run this project's TensorRT code for real:
# TensorRT 8.6.0 (the newest release whose builder is on PyPI as a wheel) with its lean runtime,
# CPython 3.10 (the newest Python that wheel supports), NumPy, ONNX, Polygraphy, and any further
# wheels named in WHEELS310.
# Writes DIR/p01 … DIR/pNN, each a folder below PART (default 57M; DIR: .gpu, which git must ignore).
#   usage: pack.sh [DIR]          then, on the GPU host, once all folders are there: unpack.sh DIR
# Needs: pyenv's CPython 3.10, gcc, zstd, about 4 GB of disk. LEVEL is zstd's (default 3: 35 s on 2 cores
# and 11 folders; 19: about 10 minutes and fewer folders, worth it where each folder is a slow transfer).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:-.gpu}; work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
py=${PYTHON310:-$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3.10 | tail -1)}
home=$(cd "$(dirname "$py")/.." && pwd)
mkdir -p "$dir" "$work/kit/site" "$work/wheels"

"$py" -m pip download -q --no-deps -d "$work/wheels" tensorrt==8.6.0 tensorrt_lean==8.6.0
"$py" -m pip download -q --no-deps --only-binary=:all: -d "$work/wheels" \
  'numpy<2' 'onnx==1.17.0' 'protobuf<6' polygraphy ${WHEELS310:-}
for wheel in "$work"/wheels/*.whl; do "$py" -m zipfile -e "$wheel" "$work/kit/site"; done

# CPython without what a run never needs.
mkdir -p "$work/kit/python/bin" "$work/kit/python/lib"
cp -L "$py" "$work/kit/python/bin/python3.10"
cp -L "$home"/lib/libpython3.10.so.1.0 "$work/kit/python/lib/" 2>/dev/null || true
tar -C "$home/lib" --exclude=site-packages --exclude='*/test' --exclude='*/tests' --exclude=__pycache__ \
  --exclude='*.a' --exclude=idlelib --exclude=tkinter --exclude=ensurepip --exclude=lib2to3 -cf - python3.10 |
  tar -C "$work/kit/python/lib" -xf -

# libnvinfer_plugin links cuBLAS 12 and cuDNN 8, which TensorRT 8.6 no longer calls for core layers
# (PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805 is on by default): empty stand-ins let it load.
mkdir -p "$work/kit/stubs"
nm -D --undefined-only "$work/kit/site/tensorrt/libnvinfer_plugin.so.8" |
  grep -oE '\b(cublas|cudnn)[A-Za-z0-9_]+' | sort -u | sed 's/.*/int &(void){return 1;}/' >"$work/stub.c"
for lib in libcublas.so.12 libcublasLt.so.12 libcudnn.so.8; do
  printf '%s { global: *; };\n' "$lib" >"$work/$lib.map"
  gcc -shared -fPIC -o "$work/kit/stubs/$lib" -Wl,-soname,"$lib" -Wl,--version-script="$work/$lib.map" "$work/stub.c"
done

tar -C "$work/kit" -cf - . | zstd -q -T0 "-${LEVEL:-3}" --long=27 -o "$work/kit.tar.zst"
rm -rf "$dir"/p[0-9][0-9]
split -b "${PART:-57M}" -d -a 2 --numeric-suffixes=1 "$work/kit.tar.zst" "$work/part."
for part in "$work"/part.*; do n=${part##*.}; mkdir -p "$dir/p$n"; mv "$part" "$dir/p$n/kit.part"; done
cp "$here/unpack.sh" "$dir/p01/"
# zstandard for the host's own Python, to unpack with (CPython 3.12 there).
"$py" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$work" zstandard
cp "$work"/zstandard-*.whl "$dir/p$n/"  # the last folder, which is the smallest
ls -d "$dir"/p[0-9][0-9] | tr '\n' ' '; echo; du -sm "$dir"/p[0-9][0-9] | awk '{s+=$1} END {print NR" folders, "s" MB"}'
