// Bytes of words in another order.
#pragma once

#include "kernel.cuh"

// Four of the eight bytes of two words: four bits for each say which, and the fourth of these asks for
// copies of its sign. (__byte_perm takes three, and an instruction more to have no others.)
#ifdef CUDA_EMULATION
__device__ inline u32 permuted(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
#else
__device__ inline u32 permuted(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}
#endif
