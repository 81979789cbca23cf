// How 32 weights of each type become codes, scales and minima: all that kernels know of a type.
//
// A weight is `scale * code + minimum`; a code is a signed byte. Runs of 32 are numbered from the
// start of a row. Two groups of 16 have a scale and a minimum each; for most types they are equal.
// Where a type's block begins on even addresses only, or on any, words are put together of what can
// be loaded. The grids of the IQ types are in tables.cuh, made from Python's tables.
#pragma once

#include "bytes.cuh"
#include "tables.cuh"

struct Run {
    int codes[8];  // 4 codes each, the first in the lowest byte
    float scale[2], minimum[2];

    __device__ void scaled(float d, float m = 0) {
        scale[0] = scale[1] = d;
        minimum[0] = minimum[1] = m;
    }
    __device__ int4 front() const { return make_int4(codes[0], codes[1], codes[2], codes[3]); }
    __device__ int4 back() const { return make_int4(codes[4], codes[5], codes[6], codes[7]); }
};

// What the types of weights are: whether the halves of a run have one scale (and minimum) or each its
// own, and whether there are minima other than 0.
template <int SCALES_, int MINIMA_> struct Kind {
    enum { SCALES = SCALES_, MINIMA = MINIMA_ };
};
typedef Kind<1, 0> Scaled;
typedef Kind<1, 1> Shifted;
typedef Kind<2, 0> HalvesScaled;
typedef Kind<2, 1> HalvesShifted;

__device__ inline u32 load_u16(const u8 *p) { return *reinterpret_cast<const u16 *>(p); }
__device__ inline u32 word_at_4(const u8 *p) { return *reinterpret_cast<const u32 *>(p); }
__device__ inline u32 word_at_2(const u8 *p) { return load_u16(p) | load_u16(p + 2) << 16; }
__device__ inline u32 word_at_1(const u8 *p) {
    return (u32)p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24;
}
__device__ inline float half_at(const u8 *p) { return half_to_float((u16)load_u16(p)); }

// Each of four bytes plus a number; no byte may leave its range.
__device__ inline u32 plus_each(u32 bytes, int n) {
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= ((bytes >> (8 * i)) + n & 255u) << (8 * i);
    return result;
}

// Bit i of the low four, as the byte 1 << shift at place i: of four copies of them one bit each is kept.
__device__ inline u32 spread_bits(u32 bits, int shift) {
    return (bits & 15) * (0x00204081u << shift) & 0x01010101u << shift;
}

// What a table of 16 bytes has for the low four bits of four bytes, and for the high ones. One instruction
// chooses four of eight bytes by three bits of each, so that half of the table is chosen by the fourth.
__device__ inline uint2 look_up(const u32 *table, u32 nibbles) {
    const u32 places = nibbles & 0x77777777u, halves = (nibbles >> 1 & 0x44444444u) | 0x32103210u;
    u32 found[2];
    for (int i = 0; i < 2; i++) {
        const u32 place = places >> (16 * i);
        const u32 first = permuted(table[0], table[1], place), second = permuted(table[2], table[3], place);
        found[i] = permuted(first, second, halves >> (16 * i));
    }
    return make_uint2(permuted(found[0], found[1], 0x6420), permuted(found[0], found[1], 0x7531));
}

// Negates the bytes whose bit among the low four is set.
__device__ inline u32 negate_bytes(u32 bytes, u32 bits) {
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 byte = bytes >> (8 * i) & 255;
        result |= ((bits >> i & 1) ? (0u - byte) & 255 : byte) << (8 * i);
    }
    return result;
}

// The eighth sign of a group of eight makes their number even.
__device__ inline u32 eight_signs(u32 seven) { return seven | (u32)(__popc(seven) & 1) << 7; }

__device__ inline void nibbles(Run &run, const u8 *qs, u32 (*load)(const u8 *)) {
    for (int i = 0; i < 4; i++) {
        u32 word = load(qs + 4 * i);
        run.codes[i] = word & 0x0f0f0f0fu;
        run.codes[4 + i] = word >> 4 & 0x0f0f0f0fu;
    }
}

// The bits of `mask` of 32 bytes moved down by `shift`, a code each.
__device__ inline void fields(Run &run, const u8 *qs, int shift, u32 mask, u32 (*load)(const u8 *)) {
    for (int i = 0; i < 8; i++) run.codes[i] = load(qs + 4 * i) >> shift & mask;
}

struct Q4_0 : Shifted {
    enum { BLOCK = 32, SIZE = 18 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        float d = half_at(block);
        nibbles(run, block + 2, word_at_2);
        run.scaled(d, -8 * d);
    }
};

struct Q4_1 : Shifted {
    enum { BLOCK = 32, SIZE = 20 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        nibbles(run, block + 4, word_at_4);
        run.scaled(half_at(block), half_at(block + 2));
    }
};

__device__ inline void fifth_bits(Run &run, u32 high) {
    for (int i = 0; i < 8; i++) run.codes[i] |= spread_bits(high >> (4 * i), 4);
}

struct Q5_0 : Shifted {
    enum { BLOCK = 32, SIZE = 22 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        float d = half_at(block);
        nibbles(run, block + 6, word_at_2);
        fifth_bits(run, word_at_2(block + 2));
        run.scaled(d, -16 * d);
    }
};

struct Q5_1 : Shifted {
    enum { BLOCK = 32, SIZE = 24 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        nibbles(run, block + 8, word_at_4);
        fifth_bits(run, word_at_4(block + 4));
        run.scaled(half_at(block), half_at(block + 2));
    }
};

struct Q8_0 : Scaled {
    enum { BLOCK = 32, SIZE = 34 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        for (int i = 0; i < 8; i++) run.codes[i] = word_at_2(block + 2 + 4 * i);
        run.scaled(half_at(block));
    }
};

struct Q8_1 : Scaled {
    enum { BLOCK = 32, SIZE = 36 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        for (int i = 0; i < 8; i++) run.codes[i] = word_at_4(block + 4 + 4 * i);
        run.scaled(half_at(block));
    }
};

struct Q8_K : Scaled {
    enum { BLOCK = 256, SIZE = 292 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        for (int i = 0; i < 8; i++) run.codes[i] = word_at_4(block + 4 + 32 * r + 4 * i);
        run.scaled(__uint_as_float(word_at_4(block)));
    }
};

struct Q2_K : HalvesShifted {
    enum { BLOCK = 256, SIZE = 84 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        fields(run, block + 16 + 32 * (r / 4), 2 * (r % 4), 0x03030303u, word_at_4);
        float d = half_at(block + 80), m = half_at(block + 82);
        for (int g = 0; g < 2; g++) {
            u8 both = block[2 * r + g];
            run.scale[g] = d * (both & 15);
            run.minimum[g] = -m * (both >> 4);
        }
    }
};

struct Q3_K : HalvesScaled {
    enum { BLOCK = 256, SIZE = 110 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 32 + 32 * (r / 4), *scales = block + 96;
        for (int i = 0; i < 8; i++) {
            u32 low = word_at_2(qs + 4 * i) >> (2 * (r % 4)) & 0x03030303u;
            u32 high = word_at_2(block + 4 * i) >> r & 0x01010101u;
            run.codes[i] = plus_each(low | high << 2, -4);
        }
        float d = half_at(block + 108);
        for (int g = 0; g < 2; g++) {
            int i = 2 * r + g;
            int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
            int high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
            run.scale[g] = d * ((low | high << 4) - 32);
            run.minimum[g] = 0;
        }
    }
};

// The six-bit scale and minimum of a run of Q4_K and Q5_K.
__device__ inline void scale_and_minimum(Run &run, const u8 *block, int r) {
    const u8 *s = block + 4;
    int scale, minimum;
    if (r < 4) {
        scale = s[r] & 63;
        minimum = s[r + 4] & 63;
    } else {
        scale = (s[r + 4] & 15) | (s[r - 4] >> 6) << 4;
        minimum = (s[r + 4] >> 4) | (s[r] >> 6) << 4;
    }
    run.scaled(half_at(block) * scale, -half_at(block + 2) * minimum);
}

struct Q4_K : Shifted {
    enum { BLOCK = 256, SIZE = 144 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        fields(run, block + 16 + 32 * (r / 2), 4 * (r % 2), 0x0f0f0f0fu, word_at_4);
        scale_and_minimum(run, block, r);
    }
};

struct Q5_K : Shifted {
    enum { BLOCK = 256, SIZE = 176 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 48 + 32 * (r / 2);
        for (int i = 0; i < 8; i++) {
            u32 low = word_at_4(qs + 4 * i) >> (4 * (r % 2)) & 0x0f0f0f0fu;
            u32 high = word_at_4(block + 16 + 4 * i) >> r & 0x01010101u;
            run.codes[i] = low | high << 4;
        }
        scale_and_minimum(run, block, r);
    }
};

struct Q6_K : HalvesScaled {
    enum { BLOCK = 256, SIZE = 210 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const int half = r / 4, part = r % 4;
        const u8 *ql = block + 64 * half + 32 * (part % 2), *qh = block + 128 + 32 * half;
        for (int i = 0; i < 8; i++) {
            u32 low = word_at_2(ql + 4 * i) >> (4 * (part / 2)) & 0x0f0f0f0fu;
            u32 high = word_at_2(qh + 4 * i) >> (2 * part) & 0x03030303u;
            run.codes[i] = plus_each(low | high << 4, -32);
        }
        float d = half_at(block + 208);
        for (int g = 0; g < 2; g++) {
            run.scale[g] = d * (i8)block[192 + 2 * r + g];
            run.minimum[g] = 0;
        }
    }
};

__device__ inline void looked_up(Run &run, const u8 *qs, u32 (*load)(const u8 *), const u32 *table) {
    for (int i = 0; i < 4; i++) {
        const uint2 codes = look_up(table, load(qs + 4 * i));
        run.codes[i] = codes.x;
        run.codes[4 + i] = codes.y;
    }
}

struct IQ4_NL : Scaled {
    enum { BLOCK = 32, SIZE = 18 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        looked_up(run, block + 2, word_at_2, IQ4_WORDS);
        run.scaled(half_at(block));
    }
};

struct IQ4_XS : Scaled {
    enum { BLOCK = 256, SIZE = 136 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        looked_up(run, block + 8 + 16 * r, word_at_4, IQ4_WORDS);
        int low = block[4 + r / 2] >> (4 * (r % 2)) & 15;
        int high = load_u16(block + 2) >> (2 * r) & 3;
        run.scaled(half_at(block) * ((low | high << 4) - 32));
    }
};

// Half of what a byte of MXFP4's scales stands for: 2^(byte - 128), of which the first two are subnormal.
__device__ inline float half_of_power(u32 byte) {
    return __uint_as_float(byte < 2 ? 0x00200000u << byte : (byte - 1) << 23);
}

struct MXFP4 : Scaled {
    enum { BLOCK = 32, SIZE = 17 };
    __device__ static void decode(Run &run, const u8 *block, int) {
        looked_up(run, block + 1, word_at_1, FP4_WORDS);
        run.scaled(half_of_power(block[0]));
    }
};

struct NVFP4 : HalvesScaled {
    enum { BLOCK = 64, SIZE = 36 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        for (int g = 0; g < 2; g++) {
            const int sub = 2 * r + g;
            for (int i = 0; i < 2; i++) {
                const uint2 codes = look_up(FP4_WORDS, word_at_4(block + 4 + 8 * sub + 4 * i));
                run.codes[4 * g + i] = codes.x;
                run.codes[4 * g + 2 + i] = codes.y;
            }
            run.scale[g] = UE4M3_VALUES[block[sub]];
            run.minimum[g] = 0;
        }
    }
};

struct Q1_0 : Scaled {
    enum { BLOCK = 128, SIZE = 18 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        u32 bits = word_at_2(block + 2 + 4 * r);
        // 2 or 0, less 1: plus or minus the scale.
        for (int i = 0; i < 8; i++) run.codes[i] = plus_each(spread_bits(bits >> (4 * i), 1), -1);
        run.scaled(half_at(block));
    }
};

struct Q2_0 : Shifted {
    enum { BLOCK = 64, SIZE = 18 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        float d = half_at(block);
        for (int i = 0; i < 8; i++) {
            u32 four = block[2 + 8 * r + i];
            run.codes[i] = (four & 3) | (four >> 2 & 3) << 8 | (four >> 4 & 3) << 16 | (four >> 6) << 24;
        }
        run.scaled(d, -d);
    }
};

// A trit of a byte that holds five, the first for n = 0.
__device__ inline u32 trit(u32 byte, int n) {
    u32 power = 1;
    for (int i = 0; i < n; i++) power *= 3;
    return ((byte * power & 255) * 3) >> 8;
}

struct TQ1_0 : Shifted {
    enum { BLOCK = 256, SIZE = 54 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        for (int i = 0; i < 32; i++) {
            const int e = 32 * r + i;
            u32 code;
            if (e < 160) code = trit(block[e % 32], e / 32);
            else if (e < 240) code = trit(block[32 + (e - 160) % 16], (e - 160) / 16);
            else code = trit(block[48 + (e - 240) % 4], (e - 240) / 4);
            if (i % 4 == 0) run.codes[i / 4] = 0;
            run.codes[i / 4] |= code << (8 * (i % 4));
        }
        float d = half_at(block + 52);
        run.scaled(d, -d);
    }
};

struct TQ2_0 : Shifted {
    enum { BLOCK = 256, SIZE = 66 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        fields(run, block + 32 * (r / 4), 2 * (r % 4), 0x03030303u, word_at_2);
        float d = half_at(block + 64);
        run.scaled(d, -d);
    }
};

// Eight values of a grid, with signs.
__device__ inline void eight(Run &run, int l, u32 low, u32 high, u32 signs) {
    run.codes[2 * l] = negate_bytes(low, signs & 15);
    run.codes[2 * l + 1] = negate_bytes(high, signs >> 4);
}
__device__ inline void eight(Run &run, int l, const u64 *grid, int at, u32 signs) {
    u64 values = grid[at];
    eight(run, l, (u32)values, (u32)(values >> 32), signs);
}

struct IQ2_XXS : Scaled {
    enum { BLOCK = 256, SIZE = 66 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 2 + 8 * r;
        u32 signs = word_at_2(qs + 4);
        for (int l = 0; l < 4; l++)
            eight(run, l, IQ2XXS_GRID, qs[l], eight_signs(signs >> (7 * l) & 127));
        run.scaled(half_at(block) * (0.5f + (signs >> 28)) * 0.25f);
    }
};

__device__ inline void two_scales(Run &run, float d, u8 both) {
    run.scale[0] = d * (0.5f + (both & 15)) * 0.25f;
    run.scale[1] = d * (0.5f + (both >> 4)) * 0.25f;
    run.minimum[0] = run.minimum[1] = 0;
}

struct IQ2_XS : HalvesScaled {
    enum { BLOCK = 256, SIZE = 74 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        for (int l = 0; l < 4; l++) {
            u32 code = load_u16(block + 2 + 8 * r + 2 * l);
            eight(run, l, IQ2XS_GRID, code & 511, eight_signs(code >> 9));
        }
        two_scales(run, half_at(block), block[66 + r]);
    }
};

struct IQ2_S : HalvesScaled {
    enum { BLOCK = 256, SIZE = 82 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 2 + 4 * r, high = block[66 + r];
        for (int l = 0; l < 4; l++)
            eight(run, l, IQ2S_GRID, qs[l] | ((u32)high << (8 - 2 * l) & 0x300), qs[32 + l]);
        two_scales(run, half_at(block), block[74 + r]);
    }
};

struct IQ3_XXS : Scaled {
    enum { BLOCK = 256, SIZE = 98 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 2 + 8 * r;
        u32 signs = word_at_2(block + 66 + 4 * r);
        for (int l = 0; l < 4; l++)
            eight(run, l, IQ3XXS_GRID[qs[2 * l]], IQ3XXS_GRID[qs[2 * l + 1]],
                  eight_signs(signs >> (7 * l) & 127));
        run.scaled(half_at(block) * (0.5f + (signs >> 28)) * 0.5f);
    }
};

struct IQ3_S : Scaled {
    enum { BLOCK = 256, SIZE = 110 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 2 + 8 * r, *signs = block + 74 + 4 * r;
        u32 high = block[66 + r];
        for (int l = 0; l < 4; l++)
            eight(run, l, IQ3S_GRID[qs[2 * l] | (high << (8 - 2 * l) & 256)],
                  IQ3S_GRID[qs[2 * l + 1] | (high << (7 - 2 * l) & 256)], signs[l]);
        run.scaled(half_at(block) * (1 + 2 * (block[106 + r / 2] >> (4 * (r % 2)) & 15)));
    }
};

// Eight values of the IQ1 grid, -1, 0 or 1, plus or minus an eighth: eight times all that.
__device__ inline void eight_and_shift(Run &run, int l, int at, bool minus) {
    u64 values = IQ1S_GRID[at];
    for (int h = 0; h < 2; h++) {
        u32 word = (u32)(values >> (32 * h)), codes = 0;
        for (int i = 0; i < 4; i++)
            codes |= (u32)(u8)(8 * (i8)(word >> (8 * i)) + (minus ? -1 : 1)) << (8 * i);
        run.codes[2 * l + h] = codes;
    }
}

struct IQ1_S : Scaled {
    enum { BLOCK = 256, SIZE = 50 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 2 + 4 * r;
        const u32 high = load_u16(block + 34 + 2 * r);
        for (int l = 0; l < 4; l++)
            eight_and_shift(run, l, qs[l] | (high >> (3 * l) & 7) << 8, high & 0x8000);
        run.scaled(half_at(block) * (2 * (high >> 12 & 7) + 1) * 0.125f);
    }
};

struct IQ1_M : HalvesScaled {
    enum { BLOCK = 256, SIZE = 56 };
    __device__ static void decode(Run &run, const u8 *block, int r) {
        const u8 *qs = block + 4 * r, *qh = block + 32 + 2 * r, *scales = block + 48;
        u32 bits = 0;
        for (int i = 0; i < 4; i++) bits |= (load_u16(scales + 2 * i) >> 12) << (4 * i);
        float d = half_to_float((u16)bits) * 0.125f;
        u32 both = load_u16(scales + 2 * (r / 2)) >> (6 * (r % 2));
        for (int l = 0; l < 4; l++) {
            u32 high = qh[l / 2] >> (4 * (l % 2));
            eight_and_shift(run, l, qs[l] | (high & 7) << 8, high & 8);
        }
        for (int g = 0; g < 2; g++) {
            run.scale[g] = d * (2 * (both >> (3 * g) & 7) + 1);
            run.minimum[g] = 0;
        }
    }
};

// The run with this number of a row.
template <typename T> __device__ inline void decode_run(Run &run, const u8 *row, int number) {
    const int per_block = T::BLOCK / 32;
    T::decode(run, row + (i64)(number / per_block) * T::SIZE, number % per_block);
}
