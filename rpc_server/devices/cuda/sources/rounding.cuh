// Columns of products in the form that the products read them, see columns.cuh: rounded as ggml's CPU
// backend rounds for the type of the weights, so that a model says the same here as it does there.
#pragma once

#include "columns.cuh"

// Columns that are being made; a warp makes a run.
struct Target {
    u8 *codes;
    float4 *factors;
    // Column number `row` of those at `base`, `stride` bytes apart; it has `k` elements.
    __device__ Target(i64 base, i64 stride, i64 row, i64 k)
        : codes(reinterpret_cast<u8 *>(base) + row * stride), factors(reinterpret_cast<float4 *>(codes + k)) {}

    // `sum` is what a lane's half of the run has for one.
    __device__ void write_factors(i64 run, float scale, float sum) const {
        const float second = __shfl_sync(ALL_LANES, sum, 16);
        if (threadIdx.x % 32 == 0) factors[run] = make_float4(scale, sum + second, sum, second);
    }
};

// The sum over 16 lanes, each half of a warp for itself.
__device__ inline float over_half_warp(float value) {
    for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

// 32 elements of a row of floats, by a warp: one lane each. As Q8_0, or Q8_1, whose sums are made with
// the scale before it is rounded.
__device__ inline void round_run(const Target &target, const u8 *source, const Slot &from, i64 run, bool with_sums) {
    const int lane = threadIdx.x % 32;
    const float x = load_f32(source + (32 * run + lane) * from.nb[0], from.type);
    const float largest = over_warp(fabsf(x), Largest());
    const int code = largest == 0 ? 0 : __float2int_rn(x * (127 / largest));
    const float exact = largest / 127, scale = half_to_float(float_to_half(exact));
    target.codes[32 * run + lane] = (u8)code;
    float sum = over_half_warp((float)code) * scale;
    if (with_sums) {
        // One sum of all, rounded to half precision too; weights have one minimum for both halves.
        const float all = half_to_float(float_to_half(over_warp((float)code, Sum()) * exact));
        sum = lane < 16 ? all : 0;
    }
    target.write_factors(run, scale, sum);
}

// 256 elements of a row of floats, by a warp. As Q8_K: one scale, which maps the largest to -127.
__device__ inline void round_unit(const Target &target, const u8 *source, const Slot &from, i64 unit) {
    const int lane = threadIdx.x % 32;
    float x[8];
    // The largest magnitude above the place it has, turned so that the first of equals wins.
    u64 best = 0;
    for (int j = 0; j < 8; j++) {
        const int place = 32 * j + lane;
        x[j] = load_f32(source + (256 * unit + place) * from.nb[0], from.type);
        const u32 magnitude = x[j] == x[j] ? __float_as_uint(fabsf(x[j])) : 0;
        const u64 key = (u64)magnitude << 32 | (u32)(255 - place);
        best = key > best ? key : best;
    }
    best = over_warp(best, Largest());
    const int place = 255 - (int)(u32)best;
    float largest = 0;
    for (int j = 0; j < 8; j++) {
        const float other = __shfl_sync(ALL_LANES, x[j], place % 32);
        if (j == place / 32) largest = other;
    }
    const bool zero = (best >> 32) == 0;
    const float inverse = zero ? 0 : -127 / largest, scale = zero ? 0 : 1 / inverse;
    for (int j = 0; j < 8; j++) {
        const int code = min(__float2int_rn(inverse * x[j]), 127);
        target.codes[256 * unit + 32 * j + lane] = (u8)code;
        target.write_factors(8 * unit + j, scale, scale * over_half_warp((float)code));
    }
}

// What activations are rounded as.
enum { ROUND_Q8_0, ROUND_Q8_1, ROUND_Q8_K };

// Elements `first` to `end` of a row of floats, whole blocks, to the same of a column; `warps` share
// them, this one is number `warp`. I: what holds the numbers of all.
template <typename I>
__device__ inline void round_part(
    const Target &target, const u8 *source, const Slot &from, I first, I end, int as, I warp, I warps) {
    if (as == ROUND_Q8_K)
        for (I unit = first / 256 + warp; unit < end / 256; unit += warps) round_unit(target, source, from, unit);
    else
        for (I run = first / 32 + warp; run < end / 32; run += warps) round_run(target, source, from, run, as == ROUND_Q8_1);
}

// All `k` elements of a row.
__device__ inline void round_row(
    const Target &target, const u8 *source, const Slot &from, i64 k, int as, i64 warp, i64 warps) {
    round_part<i64>(target, source, from, 0, k, as, warp, warps);
}
