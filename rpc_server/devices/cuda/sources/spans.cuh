// What a lane multiplies of a row at once, in decoding: runs of 32 that share bytes, by few wide loads.
//
// For types without a span of their own it is one run, decoded as weights.cuh does it. Codes that lie in
// the high halves of bytes stay there and count sixteenfold: that spares a shift a word. `dot` is what
// the span adds to a row's product with a column, see columns.cuh.
#pragma once

#include "columns.cuh"
#include "weights.cuh"

// One run, of a row that begins anywhere. RUNS: how many a span has; ALIGNMENT: what number of bytes
// rows have to begin at a multiple of.
template <typename T> struct RunSpan {
    enum { RUNS = 1, ALIGNMENT = 1 };
    Run run;
    __device__ void load(const u8 *row, u32 number) { decode_run<T>(run, row, number); }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * number;
        const float4 f = factors[number];
        const int first = dot16(run.front(), codes[0], 0), second = dot16(run.back(), codes[1], 0);
        return f.x * (run.scale[0] * first + run.scale[1] * second) +
               (run.minimum[0] * f.z + run.minimum[1] * f.w);
    }
};

template <typename T> struct Span : RunSpan<T> {};

__device__ inline int4 masked(uint4 words, u32 mask) {
    return make_int4(words.x & mask, words.y & mask, words.z & mask, words.w & mask);
}
__device__ inline int4 low_halves(uint4 words) { return masked(words, 0x0f0f0f0fu); }
__device__ inline int4 high_halves(uint4 words) { return masked(words, 0xf0f0f0f0u); }

// -- two blocks, of a number of half precision and whole words each: words together -------------------

// Of the first block words are put together of halves of two.
template <int WORDS> struct TwoBlocks {
    u32 first[WORDS], second[WORDS];
    float d, e;

    __device__ TwoBlocks(const u8 *blocks) {
        const u32 *words = reinterpret_cast<const u32 *>(blocks);
        u32 last = words[0];
        d = half_to_float((u16)last);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const u32 next = words[1 + i];
            first[i] = __funnelshift_r(last, next, 16);
            last = next;
        }
        e = half_to_float((u16)(last >> 16));
#pragma unroll
        for (int i = 0; i < WORDS; i++) second[i] = words[1 + WORDS + i];
    }
};

__device__ inline uint4 four(const u32 *words) { return make_uint4(words[0], words[1], words[2], words[3]); }

template <> struct Span<Q4_0> {
    enum { RUNS = 2, ALIGNMENT = 4 };
    uint4 first, second;
    float d, e;
    __device__ void load(const u8 *row, u32 number) {
        const TwoBlocks<4> blocks(row + (u64)number * (2 * Q4_0::SIZE));
        first = four(blocks.first);
        second = four(blocks.second);
        d = blocks.d;
        e = blocks.e;
    }
    __device__ static float one(uint4 q, const int4 *codes, float4 f) {
        const int low = dot16(low_halves(q), codes[0], 0);
        return f.x * 0.0625f * unsigned_dot16(high_halves(q), codes[1], 16 * low) - 8 * f.y;
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        return d * one(first, codes, factors[0]) + e * one(second, codes + 2, factors[1]);
    }
};

template <> struct Span<Q8_0> {
    enum { RUNS = 2, ALIGNMENT = 4 };
    uint4 words[4];
    float d, e;
    __device__ void load(const u8 *row, u32 number) {
        const TwoBlocks<8> blocks(row + (u64)number * (2 * Q8_0::SIZE));
        words[0] = four(blocks.first);
        words[1] = four(blocks.first + 4);
        words[2] = four(blocks.second);
        words[3] = four(blocks.second + 4);
        d = blocks.d;
        e = blocks.e;
    }
    __device__ int one(int which, const int4 *codes) const {
        const int4 front = masked(words[2 * which], ALL_LANES), back = masked(words[2 * which + 1], ALL_LANES);
        return dot16(front, codes[2 * which], dot16(back, codes[2 * which + 1], 0));
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        return d * factors[0].x * one(0, codes) + e * factors[1].x * one(1, codes);
    }
};

// -- blocks of 256 at multiples of 16 bytes -----------------------------------------------------------

// Two runs whose codes share bytes, with the six-bit scales and minima of Q4_K and Q5_K.
struct Pair {
    uint4 front, back;
    u32 scales, minima;  // two bytes each
    float d, m;

    // `head` are a block's first 16 bytes, `number` which pair of it this is.
    __device__ void take_head(uint4 head, u32 number) {
        const u32 shift = 16 * (number & 1);
        const u32 first = head.y >> shift, second = head.z >> shift, third = head.w >> shift;
        const bool plain = !(number & 2);
        scales = plain ? first & 0x3f3f : (third & 0x0f0f) | (first >> 2 & 0x3030);
        minima = plain ? second & 0x3f3f : (third >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
        d = half_to_float((u16)head.x);
        m = half_to_float((u16)(head.x >> 16));
    }
    // What the sums of products of the two runs come to.
    __device__ float scaled(int first, int second, float4 f, float4 g) const {
        const float sum = f.x * (first * (int)(scales & 255)) + g.x * (second * (int)(scales >> 8));
        const float shift = f.y * (minima & 255) + g.y * (minima >> 8);
        return d * sum - m * shift;
    }
};

template <> struct Span<Q4_K> : Pair {
    enum { RUNS = 2, ALIGNMENT = 16 };
    __device__ void load(const u8 *row, u32 number) {
        const uint4 *block = reinterpret_cast<const uint4 *>(row + (u64)(number / 4) * Q4_K::SIZE);
        const uint4 *qs = block + 1 + 2 * (number % 4);
        front = qs[0];
        back = qs[1];
        take_head(block[0], number);
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        const int first = dot16(low_halves(front), codes[0], dot16(low_halves(back), codes[1], 0));
        const int second = unsigned_dot16(
            high_halves(front), codes[2], unsigned_dot16(high_halves(back), codes[3], 0));
        return scaled(first, second >> 4, factors[0], factors[1]);
    }
};

template <> struct Span<Q5_K> : Pair {
    enum { RUNS = 2, ALIGNMENT = 16 };
    uint4 high_front, high_back;  // the two fifth bits of each code, in bits 4 and 5
    __device__ void load(const u8 *row, u32 number) {
        const uint4 *block = reinterpret_cast<const uint4 *>(row + (u64)(number / 4) * Q5_K::SIZE);
        const uint4 *qs = block + 3 + 2 * (number % 4);
        front = qs[0];
        back = qs[1];
        high_front = fifths(block[1], number % 4);
        high_back = fifths(block[2], number % 4);
        take_head(block[0], number);
    }
    __device__ static uint4 fifths(uint4 bits, u32 number) {
        const u32 shift = 2 * number;
        return make_uint4(bits.x >> shift << 4, bits.y >> shift << 4, bits.z >> shift << 4, bits.w >> shift << 4);
    }
    __device__ static int4 joined(int4 low, uint4 high) {
        return make_int4(low.x | (high.x & 0x10101010u), low.y | (high.y & 0x10101010u),
                         low.z | (high.z & 0x10101010u), low.w | (high.w & 0x10101010u));
    }
    __device__ static uint4 shifted(uint4 w, int by) {
        return make_uint4(w.x >> by, w.y >> by, w.z >> by, w.w >> by);
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        const int first = dot16(joined(low_halves(front), high_front), codes[0],
                                dot16(joined(low_halves(back), high_back), codes[1], 0));
        const int4 after = joined(low_halves(shifted(front, 4)), shifted(high_front, 1));
        const int4 last = joined(low_halves(shifted(back, 4)), shifted(high_back, 1));
        const int second = dot16(after, codes[2], dot16(last, codes[3], 0));
        return scaled(first, second, factors[0], factors[1]);
    }
};

// -- Q6_K: blocks of 210 bytes, at even addresses ------------------------------------------------------

// 16 bytes from an even address on; two behind them may be read as well.
__device__ inline uint4 sixteen_at_2(const u8 *p) {
    const u32 odd = (u32)(u64)p & 2;
    const u32 *words = reinterpret_cast<const u32 *>(p + odd);
    // By 16 bits the word before is needed, and by 32 none is.
    const u32 before = load_u16(p) << 16, shift = 32 - 8 * odd;
    const u32 a = words[0], b = words[1], c = words[2], d = words[3];
    return make_uint4(__funnelshift_rc(before, a, shift), __funnelshift_rc(a, b, shift),
                      __funnelshift_rc(b, c, shift), __funnelshift_rc(c, d, shift));
}

// 16 of each of the four runs of a half block: those whose codes share bytes.
template <> struct Span<Q6_K> {
    enum { RUNS = 2, ALIGNMENT = 2 };
    uint4 a, b, high;
    int scale[4];
    float d;

    __device__ void load(const u8 *row, u32 number) {
        const u8 *block = row + (u64)(number / 4) * Q6_K::SIZE;
        const u32 half = number / 2 % 2, part = number % 2;
        const u8 *ql = block + 64 * half + 16 * part;
        a = sixteen_at_2(ql);
        b = sixteen_at_2(ql + 32);
        high = sixteen_at_2(block + 128 + 32 * half + 16 * part);
#pragma unroll
        for (int g = 0; g < 4; g++)
            scale[g] = (i8)(load_u16(block + 192 + 8 * half + 2 * g) >> (8 * part));
        d = half_at(block + 208);
    }
    // Codes of group g, 0 to 63.
    __device__ static u32 word(u32 low, u32 high, int g) {
        const u32 top = g == 0 ? high << 4 : g == 1 ? high << 2 : g == 2 ? high : high >> 2;
        return ((g < 2 ? low : low >> 4) & 0x0f0f0f0fu) | (top & 0x30303030u);
    }
    __device__ int4 words(int g) const {
        const uint4 low = g % 2 ? b : a;
        return make_int4(word(low.x, high.x, g), word(low.y, high.y, g), word(low.z, high.z, g),
                         word(low.w, high.w, g));
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        const u32 part = number % 2, first = 4 * (number / 2);
        codes += 2 * first + part;
        factors += first;
        float sum = 0;
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const float4 f = factors[g];
            const float of_codes = part ? f.w : f.z;
            sum += scale[g] * (f.x * dot16(words(g), codes[2 * g], 0) - 32 * of_codes);
        }
        return d * sum;
    }
};
