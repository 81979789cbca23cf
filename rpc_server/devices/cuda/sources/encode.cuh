// 32 floats to a block, of the types that a KV cache is kept in. As ggml encodes them, bit for bit
// but for NaN.
#pragma once

#include "kernel.cuh"
#include "tables.cuh"

// A float whose products and sums are rounded one by one. Of plain floats a compiler makes one
// rounding of a product and a sum, and which code or which scale is nearest hangs on the last bit.
struct Exact {
    float value;
    Exact() = default;
    __device__ Exact(float v) : value(v) {}
    __device__ friend Exact operator+(Exact a, Exact b) { return __fadd_rn(a.value, b.value); }
    __device__ friend Exact operator-(Exact a, Exact b) { return __fsub_rn(a.value, b.value); }
    __device__ friend Exact operator*(Exact a, Exact b) { return __fmul_rn(a.value, b.value); }
    __device__ friend Exact operator/(Exact a, Exact b) { return __fdiv_rn(a.value, b.value); }
    __device__ friend Exact operator-(Exact a) { return -a.value; }
    __device__ friend bool operator<(Exact a, Exact b) { return a.value < b.value; }
    __device__ friend bool operator>(Exact a, Exact b) { return a.value > b.value; }
    __device__ friend bool operator==(Exact a, Exact b) { return a.value == b.value; }
    __device__ friend bool operator!=(Exact a, Exact b) { return a.value != b.value; }
};

__device__ inline Exact magnitude(Exact x) { return fabsf(x.value); }
__device__ inline Exact inverse(Exact d) { return d != 0 ? 1 / d : Exact(0); }

__device__ inline void put_half(u8 *p, Exact x) { *reinterpret_cast<u16 *>(p) = float_to_half(x.value); }

// A group whose largest magnitude is below this counts as zeros where a scale is searched for.
#define GROUP_EPSILON 1e-15f

// The element of the largest magnitude, with its sign; of equals the first.
template <int N> __device__ inline Exact extreme(const Exact (&x)[N]) {
    Exact largest = 0, value = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (magnitude(x[i]) > largest) {
            largest = magnitude(x[i]);
            value = x[i];
        }
    return value;
}

template <int N> __device__ inline Exact largest_magnitude(const Exact (&x)[N]) {
    Exact largest = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (magnitude(x[i]) > largest) largest = magnitude(x[i]);
    return largest;
}

__device__ inline void bounds(const Exact (&x)[32], Exact &low, Exact &high) {
    low = INF;
    high = -INF;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
}

// Conversions to whole numbers are x86's: what 32 bits can't hold becomes the smallest number.
#define NO_NUMBER (-2147483647 - 1)
__device__ inline bool fits(float x) { return fabsf(x) < 2147483648.0f; }
__device__ inline int cut_off(Exact x) { return fits(x.value) ? (int)x.value : NO_NUMBER; }
__device__ inline int rounded(Exact x) { return fits(x.value) ? __float2int_rn(x.value) : NO_NUMBER; }

// As ggml's vector code for x86 rounds, not its reference.
__device__ inline int eight_bits(Exact x, Exact inverse) { return rounded(x * inverse); }
__device__ inline u8 saturated(int code) { return (u8)max(min(code, 127), -128); }

__device__ inline void encode_q8_0(u8 *block, const Exact (&x)[32]) {
    const Exact largest = largest_magnitude(x), inverse = largest != 0 ? 127 / largest : Exact(0);
    put_half(block, largest / 127);
#pragma unroll
    for (int i = 0; i < 32; i++) block[2 + i] = saturated(eight_bits(x[i], inverse));
}

// Codes of four bits, of the first half of a block in the low ones: `code` makes them of elements.
template <typename F> __device__ inline void put_nibbles(u8 *codes, const Exact (&x)[32], F code) {
#pragma unroll
    for (int i = 0; i < 16; i++) codes[i] = (u8)(code(x[i]) | code(x[i + 16]) << 4);
}

// Codes of five bits: the fifth ones come first.
template <typename F> __device__ inline void put_fifths(u8 *block, const Exact (&x)[32], F code) {
    u32 high = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 low_half = code(x[i]), high_half = code(x[i + 16]);
        block[4 + i] = (u8)((low_half & 15) | (high_half & 15) << 4);
        high |= low_half >> 4 << i | high_half >> 4 << (i + 16);
    }
    for (int i = 0; i < 4; i++) block[i] = (u8)(high >> (8 * i));
}

// The code of an element is how many steps it is above `low`.
struct Steps {
    Exact low, per_step, offset;
    int most;
    __device__ u32 operator()(Exact x) const {
        // Of what is cut off the low byte counts, before it is limited.
        return (u32)min((int)(i8)cut_off((x - low) * per_step + offset), most) & 31;
    }
};

// Q4_0, Q5_0: the extreme becomes the lowest code, whichever sign it has.
__device__ inline Steps symmetric(u8 *block, const Exact (&x)[32], int half) {
    const Exact d = extreme(x) / -(float)half;
    put_half(block, d);
    return {0, inverse(d), (float)half + 0.5f, 2 * half - 1};
}

// Q4_1, Q5_1
__device__ inline Steps affine(u8 *block, const Exact (&x)[32], int top) {
    Exact low, high;
    bounds(x, low, high);
    const Exact d = (high - low) / (float)top;
    put_half(block, d);
    put_half(block + 2, low);
    return {low, inverse(d), 0.5f, top};
}

// The code of the value nearest to `x`, of two as near the upper; NaN is the last.
__device__ inline int nearest_iq4(Exact x) {
    int code = 15;
#pragma unroll
    for (int i = 0; i < 15; i++) code -= x < (IQ4_VALUES[i] + IQ4_VALUES[i + 1]) * 0.5f;
    return code;
}

// What the codes nearest to `inverse` times a group make of it: the quotient of both sums is the
// scale that leaves the least over.
struct Fit {
    Exact along, squares;
    __device__ Exact scale() const { return squares > 0 ? along / squares : Exact(0); }
};
__device__ inline Fit fit_iq4(const Exact (&x)[32], Exact inverse) {
    Fit fit = {0, 0};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const Exact q = (float)IQ4_VALUES[nearest_iq4(inverse * x[i])], weighted = x[i] * x[i] * q;
        fit.along = fit.along + weighted * x[i];
        fit.squares = fit.squares + weighted * q;
    }
    return fit;
}

__device__ inline void encode_iq4_nl(u8 *block, const Exact (&x)[32]) {
    const Exact largest = extreme(x), per_step = 1 / (largest / (float)IQ4_VALUES[0]);
    const bool zero = magnitude(largest) < GROUP_EPSILON;
    put_nibbles(block + 2, x, [&](Exact v) { return zero ? 0 : nearest_iq4(per_step * v); });
    put_half(block, zero ? Exact(0) : fit_iq4(x, per_step).scale());
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

__device__ inline void encode_block(u8 *block, i64 type, const Exact (&x)[32]) {
    switch (type) {
    case TO_Q4_0: put_nibbles(block + 2, x, symmetric(block, x, 8)); break;
    case TO_Q4_1: put_nibbles(block + 4, x, affine(block, x, 15)); break;
    case TO_Q5_0: put_fifths(block + 2, x, symmetric(block, x, 16)); break;
    case TO_Q5_1: put_fifths(block + 4, x, affine(block, x, 31)); break;
    case TO_IQ4_NL: encode_iq4_nl(block, x); break;
    default: encode_q8_0(block, x); break;
    }
}

// Floats of a type that is known when a kernel runs, `stride` bytes from one to the next. Unrolled,
// so that they can stay in registers.
template <int N> __device__ inline void load_floats(Exact (&x)[N], const u8 *p, i64 stride, i64 type) {
    if (type == F32) {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = *reinterpret_cast<const float *>(p + i * stride);
    } else if (type == F16) {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = half_to_float(*reinterpret_cast<const u16 *>(p + i * stride));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = bfloat_to_float(*reinterpret_cast<const u16 *>(p + i * stride));
    }
}
