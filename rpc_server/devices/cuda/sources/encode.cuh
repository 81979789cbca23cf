// 32 floats to a block, of the types that a KV cache is kept in. As ggml encodes them, bit for bit
// but for NaN.
#pragma once

#include "kernel.cuh"
#include "tables.cuh"

__device__ inline void put_half(u8 *p, float value) { *reinterpret_cast<u16 *>(p) = float_to_half(value); }

// The value of the largest magnitude, with its sign; of equals the first.
__device__ inline float extreme(const float *x, int n) {
    float largest = 0, value = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > largest) {
            largest = fabsf(x[i]);
            value = x[i];
        }
    return value;
}

__device__ inline void bounds(const float *x, int n, float &low, float &high) {
    low = INF;
    high = -INF;
    for (int i = 0; i < n; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
}

__device__ inline int limited(float value, int most) { return min((int)value, most); }

// As ggml's vector code for x86 rounds, not its reference.
__device__ inline void encode_q8_0(u8 *block, const float *x) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[i]));
    const float inverse = largest != 0 ? 127 / largest : 0;
    put_half(block, largest / 127);
    for (int i = 0; i < 32; i++) block[2 + i] = (u8)(i8)__float2int_rn(x[i] * inverse);
}

__device__ inline void encode_q4_0(u8 *block, const float *x) {
    const float d = extreme(x, 32) / -8, inverse = d != 0 ? 1 / d : 0;
    put_half(block, d);
    for (int i = 0; i < 16; i++)
        block[2 + i] = (u8)(limited(x[i] * inverse + 8.5f, 15) | limited(x[i + 16] * inverse + 8.5f, 15) << 4);
}

__device__ inline void encode_q4_1(u8 *block, const float *x) {
    float low, high;
    bounds(x, 32, low, high);
    const float d = (high - low) / 15, inverse = d != 0 ? 1 / d : 0;
    put_half(block, d);
    put_half(block + 2, low);
    for (int i = 0; i < 16; i++)
        block[4 + i] = (u8)(limited((x[i] - low) * inverse + 0.5f, 15) | limited((x[i + 16] - low) * inverse + 0.5f, 15) << 4);
}

__device__ inline void put_fifths(u8 *block, u8 *codes, const int *q) {
    u32 high = 0;
    for (int i = 0; i < 16; i++) {
        codes[i] = (u8)((q[i] & 15) | (q[i + 16] & 15) << 4);
        high |= (u32)(q[i] >> 4 & 1) << i | (u32)(q[i + 16] >> 4 & 1) << (i + 16);
    }
    for (int i = 0; i < 4; i++) block[i] = (u8)(high >> (8 * i));
}

__device__ inline void encode_q5_0(u8 *block, const float *x) {
    const float d = extreme(x, 32) / -16, inverse = d != 0 ? 1 / d : 0;
    put_half(block, d);
    int q[32];
    for (int i = 0; i < 32; i++) q[i] = limited(x[i] * inverse + 16.5f, 31);
    put_fifths(block + 2, block + 6, q);
}

__device__ inline void encode_q5_1(u8 *block, const float *x) {
    float low, high;
    bounds(x, 32, low, high);
    const float d = (high - low) / 31, inverse = d != 0 ? 1 / d : 0;
    put_half(block, d);
    put_half(block + 2, low);
    int q[32];
    for (int i = 0; i < 32; i++) q[i] = (int)((x[i] - low) * inverse + 0.5f);
    put_fifths(block + 4, block + 8, q);
}

__device__ inline int nearest_iq4(float x) {
    if (x <= IQ4_VALUES[0]) return 0;
    if (x >= IQ4_VALUES[15]) return 15;
    int low = 0, high = 15;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (x < IQ4_VALUES[middle]) high = middle;
        else low = middle;
    }
    return x - IQ4_VALUES[high - 1] < IQ4_VALUES[high] - x ? high - 1 : high;
}

__device__ inline void encode_iq4_nl(u8 *block, const float *x) {
    const float largest = extreme(x, 32), first = largest / IQ4_VALUES[0];
    const float inverse = first != 0 ? 1 / first : 0;
    float along = 0, squares = 0;
    for (int i = 0; i < 16; i++) {
        const int a = nearest_iq4(x[i] * inverse), b = nearest_iq4(x[i + 16] * inverse);
        block[2 + i] = (u8)(a | b << 4);
        const float va = IQ4_VALUES[a], vb = IQ4_VALUES[b], wa = x[i] * x[i], wb = x[i + 16] * x[i + 16];
        along += wa * va * x[i] + wb * vb * x[i + 16];
        squares += wa * va * va + wb * vb * vb;
    }
    put_half(block, squares > 0 ? along / squares : first);
}

// ggml's type numbers of those above.
enum { TO_Q4_0 = 2, TO_Q4_1 = 3, TO_Q5_0 = 6, TO_Q5_1 = 7, TO_Q8_0 = 8, TO_IQ4_NL = 20 };

__device__ inline int block_bytes(i64 type) {
    switch (type) {
    case TO_Q4_0: case TO_IQ4_NL: return 18;
    case TO_Q4_1: return 20;
    case TO_Q5_0: return 22;
    case TO_Q5_1: return 24;
    default: return 34;
    }
}

__device__ inline void encode_block(u8 *block, i64 type, const float *x) {
    switch (type) {
    case TO_Q4_0: encode_q4_0(block, x); break;
    case TO_Q4_1: encode_q4_1(block, x); break;
    case TO_Q5_0: encode_q5_0(block, x); break;
    case TO_Q5_1: encode_q5_1(block, x); break;
    case TO_IQ4_NL: encode_iq4_nl(block, x); break;
    default: encode_q8_0(block, x); break;
    }
}
