#!/usr/bin/env bash
# Surprise: libnvrtc.so.13 of nvidia-cuda-nvrtc 13.0.88, loaded by its path, answers every
# question about itself and compiles nothing: it doesn't look for libnvrtc-builtins beside itself.
# The libraries of the cu12 package before it and of 13.5 after it do (they have a RUNPATH or
# RPATH of $ORIGIN).
#
# Why a good guess is wrong: Loading worked, the version and the architectures are right, and the
# same loader works with other releases of the package. The message sounds like an incomplete
# installation, but the file is in the same folder.
#
# Who it hurts: Hosts in Python that load NVRTC from the wheels with ctypes. Load libnvrtc-
# builtins.so.13.0 with RTLD_GLOBAL first; it is found then.
#
# Seen with: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, nvidia-cuda-nvrtc-cu12 12.9.86, Linux x86-64
. "$(dirname "$0")/common.bash"
for package in nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvrtc==13.5.37; do
    install --no-deps --target "${package##*=}" "$package"
done

cat > compile.py <<'PYTHON'
"""The result of a compilation by one library, after loading others."""

import ctypes
import os
import sys

*first, path = sys.argv[1:]
for other in first:
    ctypes.CDLL(other, mode=os.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(path)
nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
program = ctypes.c_void_p()
source = b'extern "C" __global__ void k(float *a) { a[0] = a[1] * a[2] + a[3]; }'
nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"k.cu", 0, None, None)
options = (ctypes.c_char_p * 1)(b"--gpu-architecture=compute_80")
result = nvrtc.nvrtcCompileProgram(program, 1, options)
print(nvrtc.nvrtcGetErrorString(result).decode())
PYTHON

check() {
    local result
    result=$(env -u LD_LIBRARY_PATH venv/bin/python compile.py "${@:3}")
    echo "$1: $result"
    [ "$result" = "$2" ] || { echo "this has changed"; exit 1; }
}
old=$folder/12.9.86/nvidia/cuda_nvrtc/lib
new=$folder/13.0.88/nvidia/cu13/lib
newest=$folder/13.5.37/nvidia/cu13/lib
ls "$new"
check 12.9.86 NVRTC_SUCCESS "$old/libnvrtc.so.12"
check 13.0.88 NVRTC_ERROR_BUILTIN_OPERATION_FAILURE "$new/libnvrtc.so.13"
check "13.0.88, with the other file loaded first" NVRTC_SUCCESS \
    "$new/libnvrtc-builtins.so.13.0" "$new/libnvrtc.so.13"
check 13.5.37 NVRTC_SUCCESS "$newest/libnvrtc.so.13"
