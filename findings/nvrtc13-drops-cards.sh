#!/usr/bin/env bash
# Surprise: NVRTC of CUDA 13 refuses Pascal and Volta (sm_60, sm_61, sm_70: GTX 10 series, P100,
# V100), and sm_101, which CUDA 12.9 knew: it is called sm_110 now. nvidia-smi of a 580 driver
# says "CUDA Version: 13.0" for these cards all the same, since they are supported by the driver.
#
# Why a good guess is wrong: What nvidia-smi prints is the newest CUDA that the driver can run,
# not one that can compile for the card. And numbers of architectures have never been given away
# before: a table that maps names to numbers is wrong for one that was only renamed.
#
# Who it hurts: Hosts in Python that choose cu12 or cu13 packages by what nvidia-smi prints. Ask
# nvrtcGetSupportedArchs, and keep cu12 for cards below 7.5.
#
# Seen with: nvidia-cuda-nvrtc 13.5.37, nvidia-cuda-nvrtc-cu12 12.9.86, Linux x86-64
. "$(dirname "$0")/common.bash"
install nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvrtc-cu12==12.9.86

venv/bin/python - <<'PYTHON'
import ctypes
from pathlib import Path

SOURCE = b'extern "C" __global__ void k(float *a) { a[0] = a[1] * a[2] + a[3]; }'


class Nvrtc:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        numbers = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(*map(ctypes.byref, numbers))
        self.version = ".".join(str(n.value) for n in numbers)

    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(numbers)
        return list(numbers)

    def compile(self, architecture: str) -> str:
        """The name of the result."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self.library.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"k.cu", 0, None, None)
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        result = self.library.nvrtcCompileProgram(program, 1, options)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return self.library.nvrtcGetErrorString(result).decode()

packages = next(Path("venv/lib").glob("python3*")).absolute() / "site-packages/nvidia"
old = Nvrtc(packages / "cuda_nvrtc/lib/libnvrtc.so.12")
print(old.version, old.architectures())
new = Nvrtc(packages / "cu13/lib/libnvrtc.so.13")
print(new.version, new.architectures())
for name in ("sm_61", "sm_70", "sm_101", "sm_110"):
    results = old.compile(name), new.compile(name)
    print(name, *results)
    expected = ("NVRTC_SUCCESS", "NVRTC_ERROR_INVALID_OPTION")
    assert results == (expected[::-1] if name == "sm_110" else expected), "this has changed"
PYTHON
