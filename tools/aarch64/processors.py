"""The processors that are emulated: how QEMU, LLVM and GCC call each."""

from __future__ import annotations

from dataclasses import dataclass

# What every 64-bit ARM processor of interest has, as LLVM calls it.
_BASE = ("neon", "fp-armv8", "crc", "aes", "sha2")
_V8_2 = (*_BASE, "lse", "fullfp16", "rdm", "dotprod")


@dataclass(frozen=True)
class Processor:
    """A processor by QEMU's name of it.

    ``model`` and ``features`` are LLVM's, as kernels are compiled for it; ``gcc`` are the options
    that upstream's server is compiled with. ``part`` is its number in /proc/cpuinfo and ``told``
    its features there, as Linux calls them.
    """

    name: str
    model: str
    features: tuple[str, ...]
    gcc: str
    part: str
    told: str

    @property
    def cpuinfo(self) -> str:
        """The text of /proc/cpuinfo on a machine with one core of it."""
        return (
            f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {self.told}\n"
            "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {self.part}\nCPU revision\t: 0\n"
        )


_TOLD = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_TOLD_V8_2 = f"{_TOLD} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"

PROCESSORS: dict[str, Processor] = {
    p.name: p
    for p in (
        # Raspberry Pi 4.
        Processor("cortex-a72", "cortex-a72", _BASE, "-mcpu=cortex-a72", "0xd08", _TOLD),
        # Raspberry Pi 5.
        Processor("cortex-a76", "cortex-a76", _V8_2, "-mcpu=cortex-a76", "0xd0b", _TOLD_V8_2),
        # All that QEMU knows; of that what newer servers' and Apple's processors have alike.
        Processor(
            "max",
            "generic",
            (*_V8_2, "fp16fml", "i8mm", "bf16"),
            "-march=armv8.6-a+fp16+fp16fml+dotprod+i8mm+bf16",
            "0x000",
            f"{_TOLD_V8_2} asimdfhm i8mm bf16",
        ),
    )
}
