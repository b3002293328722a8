#!/usr/bin/env bash
# Prints the path of a CUDA compiler: the one on the PATH (or CUDACXX), else one that it installs
# with pip into build/cuda-toolchain, with the runtime, cuBLAS and NCCL beside it. It compiles and
# links; it needs no GPU and no driver.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cuda=13.0
nccl=2.28.9

if [ -n "${CUDACXX:-}" ]; then
  echo "$CUDACXX"
  exit
fi
if command -v nvcc; then exit; fi

root=$PWD/build/cuda-toolchain
done_mark=$root/$cuda-$nccl
if [ ! -e "$done_mark" ]; then
  rm -rf "$root"
  {
    python3 -m venv "$root"
    "$root/bin/pip" install --quiet --disable-pip-version-check \
      "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*" \
      "nvidia-cuda-runtime==$cuda.*" "nvidia-cuda-cccl==$cuda.*" "nvidia-cublas==$cuda.*" \
      "nvidia-nccl-cu13==$nccl"
  } >&2
  packages=$(echo "$root"/lib/python3*/site-packages/nvidia)
  # The wheels lack what compilers and linkers look for: lib64 and names without a version.
  ln -s lib "$packages/cu13/lib64"
  for library in cudart cublas cublasLt; do
    ln -s "$(basename "$packages/cu13/lib/lib$library".so.*)" "$packages/cu13/lib/lib$library.so"
  done
  ln -s "$(basename "$packages"/nccl/lib/libnccl.so.*)" "$packages/nccl/lib/libnccl.so"
  touch "$done_mark"
fi
echo "$root"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc
