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
// What is used where rows don't begin at such multiples as a span needs, of types that have two.
template <typename T> struct NarrowSpan : Span<T> {};

__device__ inline int4 masked(uint4 words, u32 mask) {
    return make_int4(words.x & mask, words.y & mask, words.z & mask, words.w & mask);
}
__device__ inline int4 low_halves(uint4 words) { return masked(words, 0x0f0f0f0fu); }
__device__ inline int4 high_halves(uint4 words) { return masked(words, 0xf0f0f0f0u); }

// -- blocks of a number of half precision and whole words each: words together, by two ----------------

// Of the first block words are put together of halves of two.
template <int WORDS> struct TwoBlocks {
    u32 first[WORDS], second[WORDS];
    float d, e;

    __device__ TwoBlocks(const u32 *words) {
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

// Sixteen times the product of 32 codes of four bits, those without a sign, with a column's.
__device__ inline int sixteenfold(uint4 q, const int4 *codes) {
    const int low = dot16(low_halves(q), codes[0], 0);
    return unsigned_dot16(high_halves(q), codes[1], 16 * low);
}

template <> struct Span<Q4_0> {
    enum { RUNS = 2, ALIGNMENT = 4 };
    uint4 first, second;
    float d, e;
    __device__ void load(const u8 *row, u32 number) {
        const TwoBlocks<4> blocks(reinterpret_cast<const u32 *>(row + (u64)number * (2 * Q4_0::SIZE)));
        first = four(blocks.first);
        second = four(blocks.second);
        d = blocks.d;
        e = blocks.e;
    }
    __device__ static float one(uint4 q, const int4 *codes, float4 f) {
        return f.x * 0.0625f * sixteenfold(q, codes) - 8 * f.y;
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        return d * one(first, codes, factors[0]) + e * one(second, codes + 2, factors[1]);
    }
};

// Words of as many pairs of blocks: of one by 4 bytes, of two by 8.
template <int PAIRS, int WORDS> __device__ inline void load_pairs(u32 (&to)[PAIRS * WORDS], const u8 *from) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        if (PAIRS == 1) {
            to[i] = reinterpret_cast<const u32 *>(from)[i];
        } else {
            const uint2 two = reinterpret_cast<const uint2 *>(from)[i];
            to[2 * i] = two.x;
            to[2 * i + 1] = two.y;
        }
    }
}

// Two blocks of Q8_0, or four, which are 17 times 8 bytes.
template <int PAIRS> struct SpanOfBytes {
    enum { RUNS = 2 * PAIRS, ALIGNMENT = 4 * PAIRS, WORDS = 2 * Q8_0::SIZE / 4 };
    uint4 words[4 * PAIRS];
    float scale[RUNS];
    __device__ void load(const u8 *row, u32 number) {
        u32 loaded[PAIRS * WORDS];
        load_pairs<PAIRS, WORDS>(loaded, row + (u64)number * (RUNS * Q8_0::SIZE));
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const TwoBlocks<8> blocks(loaded + p * WORDS);
            words[4 * p] = four(blocks.first);
            words[4 * p + 1] = four(blocks.first + 4);
            words[4 * p + 2] = four(blocks.second);
            words[4 * p + 3] = four(blocks.second + 4);
            scale[2 * p] = blocks.d;
            scale[2 * p + 1] = blocks.e;
        }
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int4 front = masked(words[2 * i], ALL_LANES), back = masked(words[2 * i + 1], ALL_LANES);
            sum += scale[i] * factors[i].x * dot16(front, codes[2 * i], dot16(back, codes[2 * i + 1], 0));
        }
        return sum;
    }
};
template <> struct Span<Q8_0> : SpanOfBytes<2> {};
template <> struct NarrowSpan<Q8_0> : SpanOfBytes<1> {};

// The fifth bits of 32 codes, the first in the lowest bit, put above four bits of each: words of four.
__device__ inline int4 with_fifths(int4 low, u32 high) {
    return make_int4(low.x | spread_bits(high, 4), low.y | spread_bits(high >> 4, 4),
                     low.z | spread_bits(high >> 8, 4), low.w | spread_bits(high >> 12, 4));
}
__device__ inline int dot_of_five_bits(uint4 q, u32 high, const int4 *codes) {
    const uint4 shifted = make_uint4(q.x >> 4, q.y >> 4, q.z >> 4, q.w >> 4);
    const int first = dot16(with_fifths(low_halves(q), high), codes[0], 0);
    return dot16(with_fifths(low_halves(shifted), high >> 16), codes[1], first);
}

// Two blocks of Q5_0, or four, which are 11 times 8 bytes.
template <int PAIRS> struct SpanOfFiveBits {
    enum { RUNS = 2 * PAIRS, ALIGNMENT = 4 * PAIRS, WORDS = 2 * Q5_0::SIZE / 4 };
    uint4 q[RUNS];
    u32 high[RUNS];
    float scale[RUNS];
    __device__ void load(const u8 *row, u32 number) {
        u32 loaded[PAIRS * WORDS];
        load_pairs<PAIRS, WORDS>(loaded, row + (u64)number * (RUNS * Q5_0::SIZE));
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const TwoBlocks<5> blocks(loaded + p * WORDS);
            high[2 * p] = blocks.first[0];
            q[2 * p] = four(blocks.first + 1);
            scale[2 * p] = blocks.d;
            high[2 * p + 1] = blocks.second[0];
            q[2 * p + 1] = four(blocks.second + 1);
            scale[2 * p + 1] = blocks.e;
        }
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const float4 f = factors[i];
            sum += scale[i] * (f.x * dot_of_five_bits(q[i], high[i], codes + 2 * i) - 16 * f.y);
        }
        return sum;
    }
};
template <> struct Span<Q5_0> : SpanOfFiveBits<2> {};
template <> struct NarrowSpan<Q5_0> : SpanOfFiveBits<1> {};

// -- blocks of whole words, by two: a scale and a minimum, and codes ----------------------------------

// Two blocks of Q4_1, by 8 bytes.
template <> struct Span<Q4_1> {
    enum { RUNS = 2, ALIGNMENT = 8, WORDS = Q4_1::SIZE / 4 };
    u32 words[RUNS * WORDS];
    __device__ void load(const u8 *row, u32 number) {
        load_pairs<2, WORDS>(words, row + (u64)number * (RUNS * Q4_1::SIZE));
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const u32 *block = words + i * WORDS;
            const float4 f = factors[i];
            const float product = f.x * 0.0625f * sixteenfold(four(block + 1), codes + 2 * i);
            sum += half_to_float((u16)block[0]) * product + half_to_float((u16)(block[0] >> 16)) * f.y;
        }
        return sum;
    }
};

// Two blocks of Q5_1, by 16 bytes.
template <> struct Span<Q5_1> {
    enum { RUNS = 2, ALIGNMENT = 16 };
    uint4 front, middle, back;
    __device__ void load(const u8 *row, u32 number) {
        const uint4 *from = reinterpret_cast<const uint4 *>(row + (u64)number * (RUNS * Q5_1::SIZE));
        front = from[0];
        middle = from[1];
        back = from[2];
    }
    __device__ static float one(u32 head, u32 high, uint4 q, const int4 *codes, float4 f) {
        const float product = f.x * dot_of_five_bits(q, high, codes);
        return half_to_float((u16)head) * product + half_to_float((u16)(head >> 16)) * f.y;
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        const uint4 first = make_uint4(front.z, front.w, middle.x, middle.y);
        return one(front.x, front.y, first, codes, factors[0]) +
               one(middle.z, middle.w, back, codes + 2, factors[1]);
    }
};

// -- codes that are places in a table -----------------------------------------------------------------

// The product of 32 of them with a column's codes.
__device__ inline int dot_of_places(const u32 *table, uint4 q, const int4 *codes) {
    const uint2 x = look_up(table, q.x), y = look_up(table, q.y), z = look_up(table, q.z), w = look_up(table, q.w);
    const int4 low = make_int4(x.x, y.x, z.x, w.x), high = make_int4(x.y, y.y, z.y, w.y);
    return dot16(low, codes[0], dot16(high, codes[1], 0));
}

template <> struct Span<IQ4_NL> {
    enum { RUNS = 2, ALIGNMENT = 4 };
    uint4 first, second;
    float d, e;
    __device__ void load(const u8 *row, u32 number) {
        const TwoBlocks<4> blocks(reinterpret_cast<const u32 *>(row + (u64)number * (2 * IQ4_NL::SIZE)));
        first = four(blocks.first);
        second = four(blocks.second);
        d = blocks.d;
        e = blocks.e;
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 4 * number;
        factors += 2 * number;
        return d * factors[0].x * dot_of_places(IQ4_WORDS, first, codes) +
               e * factors[1].x * dot_of_places(IQ4_WORDS, second, codes + 2);
    }
};

// Half a block, by 8 bytes.
template <> struct Span<IQ4_XS> {
    enum { RUNS = 4, ALIGNMENT = 8 };
    uint4 q[RUNS];
    int scale[RUNS];
    float d;
    __device__ void load(const u8 *row, u32 number) {
        const uint2 *block = reinterpret_cast<const uint2 *>(row + (u64)(number / 2) * IQ4_XS::SIZE);
        const u32 first = 4 * (number % 2);
        const uint2 head = block[0];
        d = half_to_float((u16)head.x);
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const uint2 front = block[1 + 2 * (first + i)], back = block[2 + 2 * (first + i)];
            q[i] = make_uint4(front.x, front.y, back.x, back.y);
            const u32 low = head.y >> (4 * (first + i)) & 15, high = head.x >> (16 + 2 * (first + i)) & 3;
            scale[i] = (int)(low | high << 4) - 32;
        }
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            sum += factors[i].x * (scale[i] * dot_of_places(IQ4_WORDS, q[i], codes + 2 * i));
        return d * sum;
    }
};

// Four blocks of a byte and four words each, at an even address.
template <> struct Span<MXFP4> {
    enum { RUNS = 4, ALIGNMENT = 2, WORDS = RUNS * MXFP4::SIZE / 4 };
    uint4 q[RUNS];
    float scale[RUNS];
    __device__ void load(const u8 *row, u32 number) {
        const u8 *blocks = row + (u64)number * (RUNS * MXFP4::SIZE);
        const u32 odd = (u32)(u64)blocks & 2;
        const u32 *around = reinterpret_cast<const u32 *>(blocks - odd);
        u32 words[WORDS];
        u32 last = around[0];
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            // Of the last one only what is there.
            const u32 next = i < WORDS - 1 ? around[i + 1] : odd ? load_u16(blocks + 4 * WORDS - 2) : 0;
            words[i] = __funnelshift_r(last, next, 8 * odd);
            last = next;
        }
#pragma unroll
        for (int b = 0; b < RUNS; b++) {
            // A block begins at byte b of word 4 * b.
            scale[b] = half_of_power(words[4 * b] >> (8 * b) & 255);
            u32 codes[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 first = words[4 * b + i], second = words[4 * b + 1 + i];
                codes[i] = b == 3 ? second : __funnelshift_r(first, second, 8 * (b + 1));
            }
            q[b] = four(codes);
        }
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 2 * RUNS * number;
        factors += RUNS * number;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++) sum += scale[i] * factors[i].x * dot_of_places(FP4_WORDS, q[i], codes + 2 * i);
        return sum;
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

// What is read by 8 bytes of a block that begins at an even address: what lies around it, too, by less
// than 8 bytes.
struct Around {
    const uint2 *units;
    u32 address;
    __device__ Around(const u8 *block)
        : units(reinterpret_cast<const uint2 *>(block - ((u64)block & 7))), address((u32)(u64)block) {}
    // WORDS words from `unit` times 8 bytes behind its begin on.
    template <int WORDS> __device__ void read(u32 (&to)[WORDS], u32 unit) const {
        u32 all[WORDS + 2];
#pragma unroll
        for (int i = 0; i < WORDS / 2 + 1; i++) {
            const uint2 two = units[unit + i];
            all[2 * i] = two.x;
            all[2 * i + 1] = two.y;
        }
        const bool later = address & 4;
        const u32 shift = 8 * (address & 2);
        u32 last = later ? all[1] : all[0];
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const u32 next = later ? all[i + 2] : all[i + 1];
            to[i] = __funnelshift_r(last, next, shift);
            last = next;
        }
    }
};

// Half a block: four runs, whose codes share bytes.
template <> struct Span<Q6_K> {
    enum { RUNS = 4, ALIGNMENT = 2 };
    u32 low[16], high[8];
    u32 scales[4];  // two bytes each
    float d;

    __device__ void load(const u8 *row, u32 number) {
        const u8 *block = row + (u64)(number / 2) * Q6_K::SIZE;
        const u32 half = number % 2;
        const Around around(block);
        around.read(low, 8 * half);
        around.read(high, 16 + 4 * half);
#pragma unroll
        for (int g = 0; g < 4; g++) scales[g] = load_u16(block + 192 + 8 * half + 2 * g);
        d = half_at(block + 208);
    }
    // Codes of run g, 0 to 63: four of those at `i`, of eight times four.
    __device__ int word(int g, int i) const {
        const u32 nibbles = low[8 * (g % 2) + i], bits = high[i];
        const u32 top = g == 0 ? bits << 4 : g == 1 ? bits << 2 : g == 2 ? bits : bits >> 2;
        return ((g < 2 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu) | (top & 0x30303030u);
    }
    __device__ int4 words(int g, int part) const {
        const int i = 4 * part;
        return make_int4(word(g, i), word(g, i + 1), word(g, i + 2), word(g, i + 3));
    }
    __device__ float dot(const int4 *codes, const float4 *factors, u32 number) const {
        codes += 8 * number;
        factors += 4 * number;
        float sum = 0;
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const float4 f = factors[g];
            const int first = (i8)scales[g], second = (i8)(scales[g] >> 8);
            const int front = dot16(words(g, 0), codes[2 * g], 0), back = dot16(words(g, 1), codes[2 * g + 1], 0);
            sum += f.x * (first * front + second * back) - 32 * (first * f.z + second * f.w);
        }
        return d * sum;
    }
};
