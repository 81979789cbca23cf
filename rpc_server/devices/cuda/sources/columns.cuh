// Columns of products as columns.cu makes them, and which of them a block of threads multiplies.
#pragma once

#include "bytes.cuh"

// A column of K elements is K signed bytes, then a float4 for each run of 32: its scale, and the sums
// of its codes times the scale: of all, of the first half, of the second.
__device__ inline const int4 *codes_of(const u8 *column) { return reinterpret_cast<const int4 *>(column); }
__device__ inline const float4 *factors_of(const u8 *column, i64 k) {
    return reinterpret_cast<const float4 *>(column + k);
}

// For weights of half precision or BF16 it is K elements of that type, then what products with the column
// are to be multiplied with.
__device__ inline float &factor_of_floats(u8 *column, i64 k) { return *reinterpret_cast<float *>(column + 2 * k); }
__device__ inline float factor_of_floats(const u8 *column, i64 k) {
    return *reinterpret_cast<const float *>(column + 2 * k);
}

// Products of four bytes and their sum. GP100 has no instruction for it, but one that multiplies either
// half of a register: bytes 0 and 2, and 1 and 3, are made numbers of 16 bits.
union Halves {
    u32 word;
    struct {
        i16 low, high;
    };
};
__device__ inline int dot2(u32 a, u32 b, int c) {
    const Halves x = {a}, y = {b};
    return x.low * y.low + x.high * y.high + c;
}
__device__ inline int dot4_by_halves(u32 a, u32 b, int c) {
    c = dot2(permuted(a, 0, 0xa280), permuted(b, 0, 0xa280), c);
    return dot2(permuted(a, 0, 0xb391), permuted(b, 0, 0xb391), c);
}
// The same for bytes of `a` without a sign.
__device__ inline int unsigned_dot4_by_halves(u32 a, u32 b, int c) {
    c = dot2(a & 0x00ff00ff, permuted(b, 0, 0xa280), c);
    return dot2(a >> 8 & 0x00ff00ff, permuted(b, 0, 0xb391), c);
}
#if defined(CUDA_EMULATION)
__device__ inline int dot4(int a, int b, int c) { return __dp4a(a, b, c); }
__device__ inline int unsigned_dot4(int a, int b, int c) { return unsigned_dot4_by_halves(a, b, c); }
#elif __CUDA_ARCH__ < 610
__device__ inline int dot4(int a, int b, int c) { return dot4_by_halves(a, b, c); }
__device__ inline int unsigned_dot4(int a, int b, int c) { return unsigned_dot4_by_halves(a, b, c); }
#else
__device__ inline int dot4(int a, int b, int c) { return __dp4a(a, b, c); }
__device__ inline int unsigned_dot4(int a, int b, int c) {
    int result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
#endif
__device__ inline int dot16(int4 a, int4 b, int c) {
    return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, c))));
}
__device__ inline int unsigned_dot16(int4 a, int4 b, int c) {
    c = unsigned_dot4(a.y, b.y, unsigned_dot4(a.x, b.x, c));
    return unsigned_dot4(a.w, b.w, unsigned_dot4(a.z, b.z, c));
}

// Which weights and columns a block of threads multiplies.
struct Job {
    const u8 *weights;  // row 0 of its matrix
    i64 rows, row_bytes;
    // The first block along x that does rows of it.
    u32 first_block;
    int columns;
    bool valid;
    // The number of its first column among the rows of slot 2, and element 0 of the result's.
    i64 column;
    u8 *result;
    // For columns that are not neighbours: the pairs of expert and token that they belong to.
    const i32 *pairs;

    __device__ Job(const Slot &w) : rows(w.ne[1]), row_bytes(w.nb[1]), first_block(0) {}

    __device__ i64 number(const Record &r, int c) const {
        if (!pairs) return column + c;
        const i64 used = r.slot[DST].ne[1], pair = pairs[c], inputs = r.slot[SRC1].ne[1];
        return pair % used % inputs + pair / used * inputs;
    }
    // Where columns.cu has put it: extra[0] is where they begin, extra[1] their stride.
    __device__ const u8 *source(const Record &r, int c) const {
        return reinterpret_cast<const u8 *>(r.extra[0]) + number(r, c) * r.extra[1];
    }
    __device__ u8 *target(const Record &r, int c) const {
        const Slot &to = r.slot[DST];
        if (!pairs) return result + c * to.nb[1];
        return to.data + pairs[c] % to.ne[1] * to.nb[1] + pairs[c] / to.ne[1] * to.nb[2];
    }
};

// slot 0: (M, N, ...), slot 1: weights (K, M, ...), slot 2: columns (K, N, ...).
// Blocks along y are groups of so many columns, along z the matrices of the result.
//
// extra[6] to extra[8] divide numbers below 2^16: by ne[2] of the result, and by how many matrices of it
// share one of weights along dimensions 2 and 3 (2^32 over those, rounded up).
__device__ inline u32 divided(u32 n, i64 reciprocal) { return (u32)((u64)n * (u64)reciprocal >> 32); }

__device__ inline Job plain_job(const Record &r, int columns) {
    const Slot &to = r.slot[DST], &w = r.slot[SRC0], &x = r.slot[SRC1];
    const u32 first = blockIdx.y * columns;
    Job job(w);
    job.weights = w.data;
    job.column = first;
    job.result = to.data + first * to.nb[1];
    // Most products are of one matrix, and to find another takes some cards a hundred instructions.
    if (gridDim.z > 1) {
        const u32 i3 = divided(blockIdx.z, r.extra[6]), i2 = blockIdx.z - i3 * (u32)to.ne[2];
        job.weights += divided(i2, r.extra[7]) * w.nb[2] + divided(i3, r.extra[8]) * w.nb[3];
        job.column += (u32)x.ne[1] * (i2 + (u32)x.ne[2] * i3);
        job.result += i2 * to.nb[2] + i3 * to.nb[3];
    }
    // A grid has no more groups than there are columns.
    job.columns = columns == 1 ? 1 : min(columns, (int)to.ne[1] - (int)first);
    job.valid = true;
    job.pairs = nullptr;
    return job;
}

// slot 1: (K, M, experts), slot 2: (K, used or a divisor of it, tokens), slot 3: ids (used, tokens).
// Blocks along y are experts of a token, along z tokens: one column each.
__device__ inline i64 routed_expert(const Record &r) {
    const Slot &ids = r.slot[SRC2];
    return index_of_warp(ids.data + blockIdx.y * ids.nb[0] + blockIdx.z * ids.nb[1], ids.type);
}

// By weights `w` to the result `to`, those of slots 1 and 0 or others of their shapes.
__device__ inline Job routed_job(const Record &r, const Slot &to, const Slot &w, i64 expert) {
    const Slot &x = r.slot[SRC1];
    const i64 used = blockIdx.y, token = blockIdx.z;
    Job job(w);
    job.valid = is_index(r, expert, w.ne[2]);
    job.weights = w.data + (job.valid ? expert : 0) * w.nb[2];
    job.column = used % x.ne[1] + token * x.ne[1];
    job.result = to.data + used * to.nb[1] + token * to.nb[2];
    job.columns = 1;
    job.pairs = nullptr;
    return job;
}

// The same, for many tokens: blocks along y are groups of columns of one expert, as route_columns has
// sorted them: extra[4] is where. Those that no group is left for do nothing.
__device__ inline Job grouped_job(const Record &r) {
    const Slot &w = r.slot[SRC0];
    const i32 *routing = reinterpret_cast<const i32 *>(r.extra[4]);
    const i32 *group = routing + 1 + 3 * blockIdx.y;
    Job job(w);
    job.valid = (i32)blockIdx.y < routing[0];
    job.columns = job.valid ? group[2] : 0;
    job.weights = w.data + (job.valid ? group[0] : 0) * w.nb[2];
    job.column = 0;
    job.result = nullptr;
    job.pairs = reinterpret_cast<const i32 *>(r.extra[5]) + (job.valid ? group[1] : 0);
    return job;
}

// One column, and one of up to three matrices whose results and weights are slots 0 and 1, 3 and 4, 5 and
// 6; extra[4] and extra[5] are the first blocks along x of the second and the third.
__device__ inline Job joint_job(const Record &r, int which) {
    const Slot &to = which == 0 ? r.slot[DST] : which == 1 ? r.slot[SRC2] : r.slot[SRC4];
    Job job(which == 0 ? r.slot[SRC0] : which == 1 ? r.slot[SRC3] : r.slot[SRC5]);
    job.weights = (which == 0 ? r.slot[SRC0] : which == 1 ? r.slot[SRC3] : r.slot[SRC5]).data;
    job.first_block = which ? (u32)r.extra[3 + which] : 0;
    job.column = 0;
    job.result = to.data;
    job.columns = 1;
    job.valid = true;
    job.pairs = nullptr;
    return job;
}
