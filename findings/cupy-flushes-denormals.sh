#!/usr/bin/env bash
# Surprise: CuPy compiles every kernel with -ftz=true, RawKernel and RawModule with options=() as
# well: values under 1.2e-38 become 0 in its products and sums, where the same source compiled by
# NVRTC's own defaults keeps them.
#
# Why a good guess is wrong: NVRTC's and nvcc's documented default is -ftz=false, and "raw" sounds
# like one's own source by one's own options. CuPy adds its own after them, so that -ftz=false
# among the options comes too early.
#
# Who it hurts: Whoever compares a kernel's results bit by bit with those of a CPU or of nvcc:
# half precision scales of quantized weights times small values get there.
#
# Seen with: cupy-cuda12x 14.2.0, nvidia-cuda-nvrtc-cu12 12.9.86; no GPU is needed
. "$(dirname "$0")/common.bash"
install cupy-cuda12x==14.2.0 numpy==2.2.6 nvidia-cuda-nvrtc-cu12==12.9.86
CUPY_CACHE_DIR=$folder/cache venv/bin/python - <<'PYTHON'
import cupy
from cupy.cuda import compiler, nvrtc

SOURCE = 'extern "C" __global__ void k(float *a) { a[0] = a[1] * a[2]; }'
asked = ("-ftz=false",)
used: list[tuple[str, ...]] = []
compile_really = compiler._NVRTCProgram.compile


def compile_and_note(self, options=(), *rest, **named):
    used.append(options)
    return compile_really(self, options, *rest, **named)


compiler._NVRTCProgram.compile = compile_and_note
# Asked for, so that no driver is.
compiler._get_arch_for_options_for_nvrtc = lambda arch=None: ("-arch=compute_80", "ptx")
# What RawModule calls; LTO IR is left as it is, a binary would be loaded onto a GPU.
compiler._compile_with_cache_cuda(SOURCE, asked, "80", to_ltoir=True)
print("CuPy", cupy.__version__, "asked:", asked, "used:", used[-1])


def multiplication(*options: str) -> str:
    program = nvrtc.createProgram(SOURCE, "k.cu", (), ())
    nvrtc.compileProgram(program, ("--gpu-architecture=compute_80", *options))
    lines = nvrtc.getPTX(program).decode().splitlines()
    return next(line.split()[0] for line in lines if "mul" in line and "f32" in line)


print("by NVRTC's defaults:", multiplication(), "| by CuPy's:", multiplication("-ftz=true"))
assert used[-1].index("-ftz=true") > used[-1].index("-ftz=false"), "this has changed"
assert (multiplication(), multiplication("-ftz=true")) == ("mul.f32", "mul.ftz.f32")
assert multiplication(*asked, "-ftz=true") == "mul.ftz.f32", "the last one doesn't count"
PYTHON
