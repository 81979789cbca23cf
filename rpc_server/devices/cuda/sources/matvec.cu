// Products of a matrix with few columns, as decoding makes them: each weight is read once, and the
// speed is that of the memory.
//
// Columns come from columns.cu.
#include "columns.cuh"
#include "gated.cuh"
#include "rounding.cuh"
#include "spans.cuh"

// Adds up what the lanes of a row have; a row has 8, 16 or 32 of them: 2 to the `power`.
__device__ inline float over_lanes(float value, int power) {
    for (int n = 1 << power >> 1; n > 0; n >>= 1) value += __shfl_xor_sync(ALL_LANES, value, n);
    return value;
}

// A row of weights times some columns, as one of the lanes that share the row has it.
// extra: where the columns are, their stride, how many lanes share a row of weights: 2 to the power of
// extra[2]; of what power of two, up to 16, all addresses of rows are multiples: 1, unless the first of
// them is a multiple of 8.
template <int COLUMNS> struct Dots {
    int power, lane;
    i64 row;
    bool here;
    const u8 *weights;
    float total[COLUMNS];

    __device__ Dots(const Record &r, const Job &job) {
        power = (int)r.extra[2];
        lane = threadIdx.x & ((1 << power) - 1);
        // Rows have 31 bits, see MAX_GRID.
        row = (u32)(((blockIdx.x - job.first_block) * blockDim.x + threadIdx.x) >> power);
        here = job.valid && (u32)row < (u32)job.rows;
        weights = job.weights + row * job.row_bytes;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = 0;
    }

    // Adds up what the lanes have for a column, and stores it; the sum.
    __device__ float store(const Record &r, const Job &job, int c) const {
        const float sum = over_lanes(total[c], power);
        if (here && lane == 0 && c < job.columns)
            *reinterpret_cast<float *>(job.target(r, c) + row * r.slot[DST].nb[0]) = sum;
        return sum;
    }
};

// Columns are rows of codes. From span `begin` of the row to the last that is whole; the run behind it.
template <typename S, int COLUMNS>
__device__ inline u32 add_spans(Dots<COLUMNS> &dots, const Record &r, const Job &job, u32 begin) {
    const u32 k = (u32)r.slot[SRC0].ne[0], spans = k / (32 * S::RUNS), step = 1u << dots.power;
    const u8 *first = job.source(r, 0);
#pragma unroll 1
    for (u32 number = begin + dots.lane; number < spans; number += step) {
        S span;
        span.load(dots.weights, number);
        dots.total[0] += span.dot(codes_of(first), factors_of(first, k), number);
        // Columns' addresses are not kept: those of eight would double the registers.
#pragma unroll
        for (int c = 1; c < COLUMNS; c++) {
            if (c < job.columns) {
                const u8 *column = job.source(r, c);
                dots.total[c] += span.dot(codes_of(column), factors_of(column, k), number);
            }
        }
    }
    return spans * S::RUNS;
}

template <typename T, int COLUMNS>
__device__ inline void add_codes(Dots<COLUMNS> &dots, const Record &r, const Job &job) {
    typedef Span<T> Wide;
    typedef NarrowSpan<T> Narrow;
    const int alignment = (int)r.extra[3];
    u32 runs = 0;
    if (__builtin_expect(alignment >= Wide::ALIGNMENT, 1)) {
        runs = add_spans<Wide>(dots, r, job, 0);
    } else if constexpr (Narrow::ALIGNMENT < Wide::ALIGNMENT) {
        if (alignment >= Narrow::ALIGNMENT) runs = add_spans<Narrow>(dots, r, job, 0);
    }
    // What is left behind the last span.
    if constexpr (Wide::RUNS > 1) add_spans<RunSpan<T>>(dots, r, job, runs);
}

// -- weights of floats ----------------------------------------------------------------------------

template <int TYPE> struct Floats {
    enum { SIZE = TYPE == F32 ? 4 : 2 };
    __device__ static float one(const u8 *p) {
        return TYPE == F32 ? *reinterpret_cast<const float *>(p)
               : TYPE == F16 ? half_to_float(*reinterpret_cast<const u16 *>(p))
                             : bfloat_to_float(*reinterpret_cast<const u16 *>(p));
    }
    __device__ static float of_bits(u32 bits) {
        return TYPE == F16 ? half_to_float((u16)bits) : bfloat_to_float((u16)bits);
    }
    // 16 bytes: 4 floats or 8 halves.
    enum { WIDE = 16 / SIZE };
    __device__ static void wide(const u8 *p, float *values) {
        const uint4 words = *reinterpret_cast<const uint4 *>(p);
        const u32 four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (SIZE == 4) {
                values[i] = __uint_as_float(four[i]);
            } else {
                values[2 * i] = of_bits(four[i] & 0xffff);
                values[2 * i + 1] = of_bits(four[i] >> 16);
            }
        }
    }
};

// Columns are rows of F32. All rows of weights begin at multiples of 16 bytes if extra[3] is 16;
// columns always do.
template <int TYPE, int COLUMNS>
__device__ inline void add_floats(Dots<COLUMNS> &dots, const Record &r, const Job &job) {
    typedef Floats<TYPE> W;
    const i64 k = r.slot[SRC0].ne[0], wide = r.extra[3] >= 16 ? k / W::WIDE : 0;
    for (i64 i = dots.lane; i < wide; i += (1 << dots.power)) {
        float values[W::WIDE];
        W::wide(dots.weights + 16 * i, values);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c >= job.columns) break;
            const float4 *x = reinterpret_cast<const float4 *>(job.source(r, c)) + i * (W::WIDE / 4);
#pragma unroll
            for (int j = 0; j < W::WIDE / 4; j++) {
                const float4 four = x[j];
                dots.total[c] += values[4 * j] * four.x + values[4 * j + 1] * four.y +
                                 values[4 * j + 2] * four.z + values[4 * j + 3] * four.w;
            }
        }
    }
    for (i64 i = wide * W::WIDE + dots.lane; i < k; i += (1 << dots.power)) {
        const float value = W::one(dots.weights + i * W::SIZE);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c >= job.columns) break;
            dots.total[c] += value * reinterpret_cast<const float *>(job.source(r, c))[i];
        }
    }
}

// One set for each type: WEIGHTS is what it is compiled for, FLOATS is set for floats.
template <int COLUMNS> __device__ inline void add_products(Dots<COLUMNS> &dots, const Record &r, const Job &job) {
#ifdef FLOATS
    if (dots.here) add_floats<WEIGHTS>(dots, r, job);
#else
    if (dots.here) add_codes<WEIGHTS>(dots, r, job);
#endif
}

template <int COLUMNS> __device__ inline void multiply(const Record &r, const Job &job) {
    Dots<COLUMNS> dots(r, job);
    add_products(dots, r, job);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) dots.store(r, job, c);
}
KERNEL(multiply_1, 128) { multiply<1>(r, plain_job(r, 1)); }
KERNEL(multiply_2, 128) { multiply<2>(r, plain_job(r, 2)); }
KERNEL(multiply_4, 128) { multiply<4>(r, plain_job(r, 4)); }
KERNEL(multiply_8, 128) { multiply<8>(r, plain_job(r, 8)); }
KERNEL(multiply_routed, 128) { multiply<1>(r, routed_job(r, r.slot[DST], r.slot[SRC0], routed_expert(r))); }
KERNEL(multiply_grouped, 128) { multiply<8>(r, grouped_job(r)); }

// One column by several matrices, see joint_job.
KERNEL(multiply_joint, 128) {
    const i64 block = blockIdx.x;
    multiply<1>(r, joint_job(r, (block >= r.extra[4]) + (block >= r.extra[5])));
}

// The result of GLU.
enum { GATED = 7 };

// Elements of it that are rounded together: a multiple of any block.
#define ROUNDED_AT_ONCE 256

// The column of GLU's result that a block has some rows of.
__device__ inline u8 *gated_column(const Slot &to) { return to.data + blockIdx.y * to.nb[1] + blockIdx.z * to.nb[2]; }

// That column rounded for products, by the last block of those that make the elements. extra[6] to
// extra[8] are what extra[0] to extra[2] are for quantize_columns.
__device__ inline void round_gated(const Record &r) {
    SHARED_ARRAY(u32, room, 1);
    const u32 rows = (u32)r.slot[SRC0].ne[1], of_block = blockDim.x >> (int)r.extra[2];
    const u32 number = blockIdx.x * of_block / ROUNDED_AT_ONCE, first = number * ROUNDED_AT_ONCE;
    const u32 n = min((u32)ROUNDED_AT_ONCE, rows - first), of_column = (rows + ROUNDED_AT_ONCE - 1) / ROUNDED_AT_ONCE;
    const u32 column = blockIdx.y + blockIdx.z * gridDim.y;
    if (!is_last(r, column * of_column + number, (n + of_block - 1) / of_block, room)) return;
    const Target target(r.extra[6], r.extra[7], column, rows);
    const u8 *result = gated_column(r.slot[GATED]);
    round_part<u32>(target, result, r.slot[GATED], first, first + n, (int)r.extra[8], threadIdx.x / 32, blockDim.x / 32);
}

// A column by two matrices, and GLU of the two results: a row of each by the same lanes. param: that of
// GLU. Where extra[6] is set the result is rounded for products, too.
__device__ inline void multiply_both(const Record &r, const Job &first, const Job &second) {
    Dots<1> x(r, first), gate(r, second);
    add_products(x, r, first);
    add_products(gate, r, second);
    const float a = x.store(r, first, 0), b = gate.store(r, second, 0);
    if (x.here && x.lane == 0) reinterpret_cast<float *>(gated_column(r.slot[GATED]))[x.row] = gated(r, a, b, F32);
    if (r.extra[6]) round_gated(r);
}

// Slots as of joint_job. To make room for so many blocks is what keeps the compiler from spilling for more,
// here and below.
KERNEL(multiply_gated, 128, 8) { multiply_both(r, joint_job(r, 0), joint_job(r, 1)); }

// The same of experts: slots 0 to 3 as of routed_job, 4 and 5 the second result and its weights.
KERNEL(multiply_routed_gated, 128, 6) {
    const i64 expert = routed_expert(r);
    multiply_both(r, routed_job(r, r.slot[DST], r.slot[SRC0], expert), routed_job(r, r.slot[SRC3], r.slot[SRC4], expert));
}
