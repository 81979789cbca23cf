// Products of small matrices by the tensor cores of a warp (mma.sync): of signed bytes, with whole sums,
// and of half precision or BF16, with sums of floats.
//
// All 32 lanes come here together. Which lane has what is said in the PTX ISA ("Matrix Fragments for
// mma.m16n8k32 ..."). A word is neighbours along K, four bytes or two floats; lane 4 * g + t has
//   of 16 rows of 8 words: word t of row g, the same of row g + 8, then word t + 4 of both;
//   of 8 columns of 8 words: words t and t + 4 of column g;
//   of the sums: columns 2 * t and 2 * t + 1 of row g, then of row g + 8.
// Where K is 4 words only, or there are 8 rows, that is the first half of each.
#pragma once

#include "kernel.cuh"

#if defined(CUDA_EMULATION)
#define ARCHITECTURE EMULATED_ARCHITECTURE
#else
#define ARCHITECTURE __CUDA_ARCH__
#endif

// Older cards have no such instructions, or not all; some newer ones are slow with bytes, says card.py.
#if ARCHITECTURE >= 750 && !defined(WITHOUT_TENSOR_CORES)
#define TENSOR_CORES
#endif
#if ARCHITECTURE >= 750

struct RowWords {
    int word[4];
};
struct ColumnWords {
    int word[2];
};
struct Sums {
    int of[4];
};
struct FloatSums {
    float of[4];
};

// This lane's part of rows, or columns, that are `pitch` times 16 bytes apart.
__device__ inline const int *words_of_lane(const int4 *matrix, int pitch) {
    const int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
    return reinterpret_cast<const int *>(matrix + group * pitch) + in_group;
}
__device__ inline RowWords rows_of_lane(const int4 *rows, int pitch) {
    const int *upper = words_of_lane(rows, pitch), *lower = words_of_lane(rows + 8 * pitch, pitch);
    return {{upper[0], lower[0], upper[4], lower[4]}};
}
__device__ inline ColumnWords columns_of_lane(const int4 *columns, int pitch) {
    const int *both = words_of_lane(columns, pitch);
    return {{both[0], both[4]}};
}
// The row and the column of its sum number `i`.
__device__ inline int row_of_sum(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ inline int column_of_sum(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// The instructions, by M, N and K; they add to the sums.
#if defined(CUDA_EMULATION)
#define MULTIPLY(of, m, k, a, b, sums) \
    emulation::multiply_matrices(EMULATED_SITE, {emulation::of, m, k, a, b, sums})
__device__ inline void mma_8_8_16(int *sums, int a, int b) { MULTIPLY(BYTES, 8, 16, &a, &b, sums); }
__device__ inline void mma_16_8_16(int *sums, const int *a, int b) { MULTIPLY(BYTES, 16, 16, a, &b, sums); }
__device__ inline void mma_16_8_32(int *sums, const int *a, const int *b) { MULTIPLY(BYTES, 16, 32, a, b, sums); }
__device__ inline void mma_16_8_8(float *sums, const int *a, int b) { MULTIPLY(HALVES, 16, 8, a, &b, sums); }
__device__ inline void mma_16_8_16(float *sums, const int *a, const int *b) { MULTIPLY(HALVES, 16, 16, a, b, sums); }
__device__ inline void mma_16_8_16_bfloats(float *sums, const int *a, const int *b) {
    MULTIPLY(BFLOATS, 16, 16, a, b, sums);
}
#else
__device__ inline void mma_8_8_16(int *sums, int a, int b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sums[0]), "+r"(sums[1])
                 : "r"(a), "r"(b));
}
__device__ inline void mma_16_8_8(float *sums, const int *a, int b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}
#if ARCHITECTURE >= 800
__device__ inline void mma_16_8_16(int *sums, const int *a, int b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}
__device__ inline void mma_16_8_32(int *sums, const int *a, const int *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_16_8_16(float *sums, const int *a, const int *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_16_8_16_bfloats(float *sums, const int *a, const int *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
#endif

// Adds what the first, or the second, 16 bytes of K come to.
template <int HALF> __device__ inline void add_half(Sums &sums, const RowWords &a, const ColumnWords &b) {
#if ARCHITECTURE >= 800
    mma_16_8_16(sums.of, a.word + 2 * HALF, b.word[HALF]);
#else
    mma_8_8_16(sums.of, a.word[2 * HALF], b.word[HALF]);
    mma_8_8_16(sums.of + 2, a.word[2 * HALF + 1], b.word[HALF]);
#endif
}
__device__ inline void add_whole(Sums &sums, const RowWords &a, const ColumnWords &b) {
#if ARCHITECTURE >= 800
    mma_16_8_32(sums.of, a.word, b.word);
#else
    add_half<0>(sums, a, b);
    add_half<1>(sums, a, b);
#endif
}

// The same of half precision, or of BF16, all 16 of K.
template <int TYPE = F16> __device__ inline void add_whole(FloatSums &sums, const RowWords &a, const ColumnWords &b) {
#if ARCHITECTURE >= 800
    if (TYPE == F16) mma_16_8_16(sums.of, a.word, b.word);
    else mma_16_8_16_bfloats(sums.of, a.word, b.word);
#else
    static_assert(TYPE == F16, "BF16 is multiplied from 8.0 on");
    mma_16_8_8(sums.of, a.word, b.word[0]);
    mma_16_8_8(sums.of, a.word + 2, b.word[1]);
#endif
}
#endif
