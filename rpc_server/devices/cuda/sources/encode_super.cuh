// Floats to blocks of the types that encode.cuh doesn't write. As ggml encodes them, bit for bit but
// for NaN.
//
// Neighbouring lanes share a block: each has one of its groups, whose elements it keeps in registers
// while it searches for a scale. Sums run in ggml's order; which of several scales wins hangs on the
// last bit. Codes go to shared memory, and from there the lanes put them into their fields together.
#pragma once

#include "encode.cuh"
#include "weights.cuh"

// A lane's share in the encoding of a block of type T.
template <typename T> struct Share {
    enum { LANES = T::BLOCK / T::GROUP };
    Exact x[T::GROUP];
    int group;  // which of the block's groups x is
    u8 *codes;  // shared memory for the codes of the whole block
    u8 *block;  // null if the lane only keeps the others company

    __device__ bool first() const { return block && group == 0; }
};

// All lanes of a block get what `combine` makes of the values of all.
template <int LANES, typename V, typename F> __device__ inline V over_lanes(V value, F combine) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}
struct Union {
    __device__ int operator()(int a, int b) const { return a | b; }
};

template <int LANES> __device__ inline Exact largest_of_lanes(Exact x) {
    return over_lanes<LANES>(x > 0 ? x.value : 0.0f, Largest());
}

// The value of the largest magnitude, with its sign; of equals that of the first lane.
template <int LANES> __device__ inline Exact extreme_of_lanes(Exact x) {
    float value = magnitude(x) > 0 ? x.value : 0.0f;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, value, step);
        const bool later = threadIdx.x & step;
        if (fabsf(other) > fabsf(value) || (later && fabsf(other) == fabsf(value))) value = other;
    }
    return value;
}

// The nearest whole number below 2^22, ties to even, as ggml reads it off a float's bits. What is too
// large gives the number that those bits happen to be, NaN of x86's arithmetic 0.
__device__ inline int nearest_int(Exact x) {
    const float moved = (x + 12582912).value;
    return moved == moved ? (__float_as_int(moved) & 0x7fffff) - 0x400000 : 0;
}
__device__ inline int clipped(Exact x, int low, int high) { return max(min(nearest_int(x), high), low); }

__device__ inline Exact as_half(Exact x) { return half_to_float(float_to_half(x.value)); }

// Codes of the lane's group: `code(i)` is that of element i. Those of other lanes can be read behind
// the next __syncwarp().
template <typename T, typename F> __device__ inline void put_codes(const Share<T> &s, F code) {
#pragma unroll
    for (int i = 0; i < T::GROUP; i++) s.codes[s.group * T::GROUP + i] = (u8)code(i);
}

// All codes of the block, `shift` bits lower, in fields of BITS: a byte has those of as many elements
// as fit, WIDTH elements apart.
template <int BITS, int WIDTH, typename T>
__device__ inline void put_fields(const Share<T> &s, int offset, int shift = 0) {
    const int count = 8 / BITS, mask = (1 << BITS) - 1;
    if (!s.block) return;
    for (int i = s.group; i < T::BLOCK / count; i += Share<T>::LANES) {
        const u8 *codes = s.codes + i / WIDTH * WIDTH * count + i % WIDTH;
        int byte = 0;
        for (int k = 0; k < count; k++) byte |= (codes[k * WIDTH] >> shift & mask) << (BITS * k);
        s.block[offset + i] = (u8)byte;
    }
}

namespace encoders {

// -- Without a search for scales, and IQ4_XS --------------------------------------------------------

struct Q8_1 : ::Q8_1 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<Q8_1> &s) {
        const Exact largest = largest_magnitude(s.x), inverse = largest != 0 ? 127 / largest : Exact(0);
        if (!s.block) return;
        u32 sum = 0;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int code = eight_bits(s.x[i], inverse);
            sum += (u32)code;
            s.block[4 + i] = saturated(code);
        }
        // The sum is of codes that are not yet saturated, and d not yet rounded.
        put_half(s.block, largest / 127);
        put_half(s.block + 2, Exact((float)(int)sum) * (largest / 127));
    }
};

struct Q8_K : ::Q8_K {
    enum { GROUP = 16 };
    __device__ static void encode(const Share<Q8_K> &s) {
        const Exact largest = extreme_of_lanes<16>(extreme(s.x));
        const Exact scale = largest != 0 ? -127 / largest : Exact(0);
        if (!s.block) return;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const i8 code = (i8)min(nearest_int(scale * s.x[i]), 127);
            sum += code;
            s.block[4 + GROUP * s.group + i] = (u8)code;
        }
        *reinterpret_cast<i16 *>(s.block + 260 + 2 * s.group) = (i16)sum;
        if (s.group == 0) *reinterpret_cast<float *>(s.block) = (largest != 0 ? 1 / scale : Exact(0)).value;
    }
};

struct Q1_0 : ::Q1_0 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<Q1_0> &s) {
        // From the first element to the last: each lane goes on where the one before has stopped.
        Exact sum = 0;
        u32 bits = 0;
        for (int turn = 0; turn < BLOCK / GROUP; turn++) {
            const float before = __shfl_up_sync(ALL_LANES, sum.value, 1);
            if (turn != s.group) continue;
            sum = turn ? before : 0.0f;
#pragma unroll
            for (int i = 0; i < GROUP; i++) sum = sum + magnitude(s.x[i]);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) bits |= (u32)(s.x[i] > 0 || s.x[i] == 0) << i;
        if (!s.block) return;
        for (int i = 0; i < 4; i++) s.block[2 + 4 * s.group + i] = (u8)(bits >> (8 * i));
        if (s.group == BLOCK / GROUP - 1) put_half(s.block, sum / BLOCK);
    }
};

// The elements as -1, 0 or 1 times the largest magnitude, plus 1. The inverse of a subnormal may be
// infinite: `otherwise` is what counts then.
template <typename T> __device__ inline Exact put_ternary(const Share<T> &s, int otherwise) {
    const Exact d = largest_of_lanes<Share<T>::LANES>(largest_magnitude(s.x)), per_step = inverse(d);
    put_codes(s, [&](int i) {
        const Exact part = s.x[i] * per_step;
        return 1 + (fits(part.value) ? (int)roundf(part.value) : otherwise);
    });
    __syncwarp();
    return d;
}

struct Q2_0 : ::Q2_0 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<Q2_0> &s) {
        const Exact d = put_ternary(s, -1);
        put_fields<2, 1>(s, 2);
        if (s.first()) put_half(s.block, d);
    }
};

struct TQ2_0 : ::TQ2_0 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<TQ2_0> &s) {
        const Exact d = put_ternary(s, 0);
        put_fields<2, 32>(s, 0);
        if (s.first()) put_half(s.block + 64, d);
    }
};

struct TQ1_0 : ::TQ1_0 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<TQ1_0> &s) {
        const Exact d = put_ternary(s, 0);
        if (!s.block) return;
        // A byte has five digits as the fraction n / 243, the last four bytes have four.
        for (int i = s.group; i < 52; i += BLOCK / GROUP) {
            const u8 *codes = s.codes + (i < 32 ? i : i < 48 ? 128 + i : 192 + i);
            const int apart = i < 32 ? 32 : i < 48 ? 16 : 4;
            int n = 0;
            for (int k = 0; k < 5; k++) n = 3 * n + (i < 48 || k < 4 ? codes[k * apart] : 0);
            s.block[i] = (u8)((n * 256 + 242) / 243);
        }
        if (s.group == 0) put_half(s.block + 52, d);
    }
};

// Codes of the values nearest to the group's elements, of equally near ones the first.
template <typename T> __device__ inline void put_nearest_fp4(const Share<T> &s, Exact scale) {
    put_codes(s, [&](int i) {
        int nearest = 0;
        Exact least = INF;
        for (int code = 0; code < 16; code++) {
            const Exact error = magnitude(scale * (float)FP4_VALUES[code] - s.x[i]);
            if (error < least) {
                nearest = code;
                least = error;
            }
        }
        return nearest;
    });
    __syncwarp();
}

struct MXFP4 : ::MXFP4 {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<MXFP4> &s) {
        const float largest = largest_magnitude(s.x).value;
        // Rounded to single precision before the floor: just below a power of two counts as that.
        const float power = floorf((float)log2((double)largest));
        const u8 e = largest > 0 && fits(power) ? (u8)((int)power - 2 + 127) : 0;
        put_nearest_fp4(s, E8M0_VALUES[e]);
        put_fields<4, 16>(s, 1);
        if (s.block) s.block[0] = e;
    }
};

// To unsigned E4M3, ties of the mantissa up; from 248 on it is 448.
__device__ inline u8 to_ue4m3(Exact x) {
    if (!(x > 0)) return 0;
    if (x > 448) x = 448;
    const int bits = __float_as_int(x.value), exponent = (bits >> 23) - 127 + 7;
    if (exponent <= 0) return (u8)min((int)(x * 512 + 0.5f).value, 7);
    // A mantissa that is rounded up to 8 is carried into the exponent.
    const int code = (exponent << 3) + (bits >> 20 & 7) + (bits >> 19 & 1);
    return (u8)(code >= 15 << 3 ? 0x7e : code);
}

struct NVFP4 : ::NVFP4 {
    enum { GROUP = 16 };
    __device__ static void encode(const Share<NVFP4> &s) {
        const u8 scale = to_ue4m3(largest_magnitude(s.x) / 6);
        put_nearest_fp4(s, UE4M3_VALUES[scale]);
        put_fields<4, 8>(s, 4);
        if (s.block) s.block[s.group] = scale;
    }
};

struct IQ4_XS : ::IQ4_XS {
    enum { GROUP = 32, TRIES = 7 };
    __device__ static Exact searched_scale(const Exact (&x)[GROUP]) {
        const Exact largest = extreme(x);
        if (magnitude(largest) < GROUP_EPSILON) return 0;
        Fit fit = fit_iq4(x, 1 / (-largest / (float)IQ4_VALUES[0]));
        Exact scale = fit.scale(), best = scale * fit.along;
        for (int step = -TRIES; step <= TRIES; step++) {
            fit = fit_iq4(x, (float)(step + IQ4_VALUES[0]) / largest);
            if (fit.squares > 0 && fit.along * fit.along > best * fit.squares) {
                scale = fit.scale();
                best = scale * fit.along;
            }
        }
        return scale;
    }
    __device__ static void encode(const Share<IQ4_XS> &s) {
        const Exact scale = searched_scale(s.x), unit = -extreme_of_lanes<8>(scale) / 32;
        const int multiple = clipped(inverse(unit) * scale, -32, 31), six_bits = multiple + 32;
        // Codes are for the scale before it is rounded to half precision.
        const Exact per_step = inverse(unit * (float)multiple);
        put_codes(s, [&](int i) { return nearest_iq4(per_step * s.x[i]); });
        const int upper = over_lanes<8>(six_bits >> 4 << (2 * s.group), Union());
        const int next = __shfl_down_sync(ALL_LANES, six_bits, 1);
        __syncwarp();
        put_fields<4, 16>(s, 8);
        if (!s.block) return;
        if (s.group % 2 == 0) s.block[4 + s.group / 2] = (u8)((six_bits & 15) | (next & 15) << 4);
        if (s.group == 0) {
            put_half(s.block, unit);
            *reinterpret_cast<u16 *>(s.block + 2) = (u16)upper;
        }
    }
};

// -- Q2_K, Q4_K, Q5_K: a scale and a minimum for each group ----------------------------------------

// A group's scale and minus its minimum, and what its codes were made with.
struct Affine {
    Exact scale, minimum, inverse, low;
};

// Codes up to TOP for a group. Candidates divide the range from the best minimum so far into
// TOP + start + 0.1 * (0 to `steps`) parts; the least-squares scale and minimum for the codes that
// this gives count by their error, by squares or absolute.
template <int TOP, bool SQUARES, int N, typename W>
__device__ inline Affine search_affine(const Exact (&x)[N], W weight, float start, int steps) {
    Exact low = x[0], high = x[0], sum_w = weight(x[0]), sum_x = sum_w * x[0];
#pragma unroll
    for (int i = 1; i < N; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
        const Exact w = weight(x[i]);
        sum_w = sum_w + w;
        sum_x = sum_x + w * x[i];
    }
    if (low > 0) low = 0;
    if (high == low) return {0, -low, 0, low};

    const auto code = [&](int i, Exact inverse, Exact low) -> Exact {
        return (float)clipped(inverse * (x[i] - low), 0, TOP);
    };
    const auto error = [&](const Affine &a, Exact minimum) {
        Exact sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const Exact difference = a.scale * code(i, a.inverse, a.low) + minimum - x[i];
            sum = sum + weight(x[i]) * (SQUARES ? difference * difference : magnitude(difference));
        }
        return sum;
    };
    Affine best = {0, -low, TOP / (high - low), low};
    best.scale = 1 / best.inverse;
    Exact least = error(best, low), minimum = low;
    for (int step = 0; step <= steps; step++) {
        Affine tried = {0, 0, (Exact(start) + Exact(0.1f) * (float)step + TOP) / (high - minimum), minimum};
        Exact sum_l = 0, sum_l2 = 0, sum_xl = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const Exact l = code(i, tried.inverse, tried.low), weighted = weight(x[i]) * l;
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * l;
            sum_xl = sum_xl + weighted * x[i];
        }
        const Exact determinant = sum_w * sum_l2 - sum_l * sum_l;
        if (!(determinant > 0)) continue;
        tried.scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        Exact fitted = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if (fitted > 0) {
            fitted = 0;
            tried.scale = sum_xl / sum_l2;
        }
        const Exact left = error(tried, fitted);
        if (left < least) {
            least = left;
            best = tried;
            minimum = fitted;
        }
    }
    best.minimum = -minimum;
    return best;
}

// Scales, or minima, of all groups of a block as multiples of a unit, a byte each; what isn't
// positive in a whole block counts as nothing.
template <int LANES> __device__ inline int multiple_of_unit(Exact value, float top, Exact &unit) {
    const Exact largest = largest_of_lanes<LANES>(value);
    unit = largest / top;
    return nearest_int((largest > 0 ? top / largest : Exact(0)) * value) & 255;
}

// The codes for what scale and minimum are when they are read; where the scale is 0, as they were.
template <int TOP, typename T>
__device__ inline void put_affine(const Share<T> &s, const Affine &found, Exact scale, Exact minimum) {
    put_codes(s, [&](int i) {
        return scale != 0 ? clipped((s.x[i] + minimum) / scale, 0, TOP)
                          : clipped(found.inverse * (s.x[i] - found.low), 0, TOP);
    });
    __syncwarp();
}

struct Q2_K : ::Q2_K {
    enum { GROUP = 16 };
    __device__ static void encode(const Share<Q2_K> &s) {
        const Affine found = search_affine<3, false>(s.x, [](Exact x) { return magnitude(x); }, -0.5f, 15);
        Exact unit, unit_of_minima;
        const int scale = multiple_of_unit<16>(found.scale, 15, unit);
        const int minimum = multiple_of_unit<16>(found.minimum, 15, unit_of_minima);
        // The fields are not masked: what is too much for that of the scale is in that of the minimum.
        const int both = (scale | minimum << 4) & 255;
        put_affine<3>(s, found, as_half(unit) * (float)(both & 15), as_half(unit_of_minima) * (float)(both >> 4));
        put_fields<2, 32>(s, 16);
        if (!s.block) return;
        s.block[s.group] = (u8)both;
        if (s.group == 0) {
            put_half(s.block + 80, unit);
            put_half(s.block + 82, unit_of_minima);
        }
    }
};

// Q4_K, Q5_K: all but the fields of codes.
template <int TOP, typename T> __device__ inline void encode_q4_q5(const Share<T> &s, float start, int steps) {
    Exact squares = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) squares = squares + s.x[i] * s.x[i];
    const Exact mean = __fsqrt_rn((squares / 32).value);
    const auto weight = [&](Exact x) { return mean + magnitude(x); };
    const Affine found = search_affine<TOP, true>(s.x, weight, start, steps);
    Exact unit, unit_of_minima;
    const int scale = min(multiple_of_unit<8>(found.scale, 63, unit), 63);
    const int minimum = min(multiple_of_unit<8>(found.minimum, 63, unit_of_minima), 63);
    put_affine<TOP>(s, found, as_half(unit) * (float)scale, as_half(unit_of_minima) * (float)minimum);
    // Those of the first four groups are whole; their spare bits have the upper two of the others.
    const int other_scale = __shfl_xor_sync(ALL_LANES, scale, 4), other_minimum = __shfl_xor_sync(ALL_LANES, minimum, 4);
    if (!s.block) return;
    u8 *const bytes = s.block + 4;
    if (s.group < 4) {
        bytes[s.group] = (u8)(scale | other_scale >> 4 << 6);
        bytes[s.group + 4] = (u8)(minimum | other_minimum >> 4 << 6);
    } else {
        bytes[s.group + 4] = (u8)((scale & 15) | (minimum & 15) << 4);
    }
    if (s.group == 0) {
        put_half(s.block, unit);
        put_half(s.block + 2, unit_of_minima);
    }
}

struct Q4_K : ::Q4_K {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<Q4_K> &s) {
        encode_q4_q5<15>(s, -1, 20);
        put_fields<4, 32>(s, 16);
    }
};

struct Q5_K : ::Q5_K {
    enum { GROUP = 32 };
    __device__ static void encode(const Share<Q5_K> &s) {
        encode_q4_q5<31>(s, -0.5f, 15);
        put_fields<1, 32>(s, 16, 4);
        put_fields<4, 32>(s, 48);
    }
};

// -- Q3_K, Q6_K: a signed scale for each group -----------------------------------------------------

struct Q3_K : ::Q3_K {
    enum { GROUP = 16 };

    // Codes from -4 to 3, and their scale. From the codes of the extreme's scale on, each element in
    // turn moves to the code that is best for the scale that the others have, if that helps the whole
    // group; five times over.
    __device__ static Exact search(const Exact (&x)[GROUP], int (&codes)[GROUP]) {
        const Exact largest = extreme(x);
        if (magnitude(largest) < GROUP_EPSILON) {
#pragma unroll
            for (int i = 0; i < GROUP; i++) codes[i] = -4;
            return 0;
        }
        const Exact inverse = -4 / largest;
        Fit fit = {0, 0};
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            codes[i] = clipped(inverse * x[i], -4, 3);
            const Exact w = x[i] * x[i], l = (float)codes[i];
            fit.along = fit.along + w * x[i] * l;
            fit.squares = fit.squares + w * l * l;
        }
        bool moved = true;
        for (int turn = 0; turn < 5 && moved; turn++) {
            moved = false;
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const Exact w = x[i] * x[i], along = w * x[i], l = (float)codes[i];
                const Fit rest = {fit.along - along * l, fit.squares - w * l * l};
                if (!(rest.along > 0)) continue;
                const int code = clipped(x[i] * rest.squares / rest.along, -4, 3);
                if (code == codes[i]) continue;
                const Exact k = (float)code;
                const Fit with = {rest.along + along * k, rest.squares + w * k * k};
                if (with.squares > 0 && with.along * with.along * fit.squares > fit.along * fit.along * with.squares) {
                    codes[i] = code;
                    fit = with;
                    moved = true;
                }
            }
        }
        return fit.scale();
    }

    __device__ static void encode(const Share<Q3_K> &s) {
        int codes[GROUP];
        const Exact scale = search(s.x, codes), largest = extreme_of_lanes<16>(scale), inverse = -32 / largest;
        const bool zero = largest == 0;
        const int six_bits = zero ? 0 : max(min((int)(i8)nearest_int(inverse * scale), 31), -32) + 32;
        const Exact unit = zero ? Exact(0) : 1 / inverse, d = as_half(unit) * (float)(six_bits - 32);
        put_codes(s, [&](int i) { return 4 + (d != 0 ? clipped(s.x[i] / d, -4, 3) : codes[i]); });
        // The lower four bits of a scale are with those of the one eight on, the upper two with those
        // of all that are a multiple of four on.
        const int other = __shfl_xor_sync(ALL_LANES, six_bits, 8);
        int upper = six_bits >> 4 << (2 * (s.group / 4));
        upper |= __shfl_xor_sync(ALL_LANES, upper, 4);
        upper |= __shfl_xor_sync(ALL_LANES, upper, 8);
        __syncwarp();
        put_fields<1, 32>(s, 0, 2);
        put_fields<2, 32>(s, 32);
        if (!s.block) return;
        if (s.group < 8) s.block[96 + s.group] = (u8)((six_bits & 15) | (other & 15) << 4);
        if (s.group < 4) s.block[104 + s.group] = (u8)upper;
        if (s.group == 0) put_half(s.block + 108, unit);
    }
};

struct Q6_K : ::Q6_K {
    enum { GROUP = 16 };

    __device__ static Fit fit(const Exact (&x)[GROUP], Exact inverse) {
        Fit fit = {0, 0};
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const Exact l = (float)clipped(inverse * x[i], -32, 31), weighted = x[i] * x[i];
            fit.along = fit.along + weighted * x[i] * l;
            fit.squares = fit.squares + weighted * l * l;
        }
        return fit;
    }

    // A scale of the group; `inverse` is what its codes are made with.
    __device__ static Exact search(const Exact (&x)[GROUP], Exact largest, Exact &inverse) {
        inverse = -32 / largest;
        Fit tried = fit(x, inverse);
        Exact scale = tried.squares != 0 ? tried.along / tried.squares : Exact(0), best = scale * tried.along;
        for (int step = -9; step <= 9; step++) {
            if (step == 0) continue;
            const Exact other = -(32 + Exact(0.1f) * (float)step) / largest;
            tried = fit(x, other);
            if (tried.squares > 0 && tried.along * tried.along > best * tried.squares) {
                scale = tried.scale();
                best = scale * tried.along;
                inverse = other;
            }
        }
        return scale;
    }

    __device__ static void encode(const Share<Q6_K> &s) {
        const Exact extreme_here = extreme(s.x);
        const bool nothing_here = magnitude(extreme_here) < GROUP_EPSILON;
        Exact scale = 0, per_step = 0;
        if (!nothing_here) scale = search(s.x, extreme_here, per_step);
        const Exact largest = extreme_of_lanes<16>(scale), inverse = -128 / largest, unit = 1 / inverse;
        const bool nothing = magnitude(largest) < GROUP_EPSILON;
        const i8 multiple = nothing ? 0 : (i8)min(nearest_int(inverse * scale), 127);
        const Exact d = as_half(unit) * (float)multiple;
        put_codes(s, [&](int i) {
            if (nothing) return 0;
            if (d != 0) return 32 + clipped(s.x[i] / d, -32, 31);
            return nothing_here ? 0 : 32 + clipped(per_step * s.x[i], -32, 31);
        });
        __syncwarp();
        put_fields<4, 64>(s, 0);
        put_fields<2, 32>(s, 128, 4);
        if (!s.block) return;
        s.block[192 + s.group] = (u8)multiple;
        if (s.group == 0) put_half(s.block + 208, nothing ? Exact(0) : unit);
    }
};

}  // namespace encoders
