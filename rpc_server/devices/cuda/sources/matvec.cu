// Products of a matrix with few columns, as decoding makes them: each weight is read once, and the
// speed is that of the memory.
//
// Columns come from columns.cu.
#include "weights.cuh"

#if !defined(CUDA_EMULATION) && __CUDA_ARCH__ < 610
// GP100 has no instruction for it.
__device__ inline int dot4(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int)(i8)(a >> i) * (int)(i8)(b >> i);
    return c;
}
#else
__device__ inline int dot4(int a, int b, int c) { return __dp4a(a, b, c); }
#endif

// Adds up what the lanes of a row have; a row has 8, 16 or 32 of them.
__device__ inline float over_lanes(float value, int lanes) {
    for (int n = lanes / 2; n > 0; n /= 2) value += __shfl_xor_sync(ALL_LANES, value, n);
    return value;
}

// Which weights and columns a block of threads multiplies.
struct Job {
    const u8 *weights;  // row 0 of its matrix
    int columns;
    bool valid;
    // The number of its first column among the rows of slot 2, and element 0 of the result's.
    i64 column;
    u8 *result;
    // For columns that are not neighbours: the pairs of expert and token that they belong to.
    const i32 *pairs;

    __device__ i64 number(const Record &r, int c) const {
        if (!pairs) return column + c;
        const i64 used = r.slot[DST].ne[1], pair = pairs[c], inputs = r.slot[SRC1].ne[1];
        return pair % used % inputs + pair / used * inputs;
    }
    __device__ u8 *target(const Record &r, int c) const {
        const Slot &to = r.slot[DST];
        if (!pairs) return result + c * to.nb[1];
        return to.data + pairs[c] % to.ne[1] * to.nb[1] + pairs[c] / to.ne[1] * to.nb[2];
    }
};

// slot 0: (M, N, ...), slot 1: weights (K, M, ...), slot 2: columns (K, N, ...).
// Blocks along y are groups of COLUMNS columns, along z the matrices of the result.
template <int COLUMNS> __device__ inline Job plain_job(const Record &r) {
    const Slot &to = r.slot[DST], &w = r.slot[SRC0], &x = r.slot[SRC1];
    const i64 i2 = blockIdx.z % to.ne[2], i3 = blockIdx.z / to.ne[2];
    const i64 first = (i64)blockIdx.y * COLUMNS;
    Job job;
    job.weights = w.data + i2 / (to.ne[2] / w.ne[2]) * w.nb[2] + i3 / (to.ne[3] / w.ne[3]) * w.nb[3];
    job.column = first + x.ne[1] * (i2 + x.ne[2] * i3);
    job.result = to.data + first * to.nb[1] + i2 * to.nb[2] + i3 * to.nb[3];
    job.columns = (int)min((i64)COLUMNS, to.ne[1] - first);
    job.valid = true;
    job.pairs = nullptr;
    return job;
}

// slot 1: (K, M, experts), slot 2: (K, used or a divisor of it, tokens), slot 3: ids (used, tokens).
// Blocks along y are experts of a token, along z tokens: one column each.
__device__ inline Job routed_job(const Record &r) {
    const Slot &to = r.slot[DST], &w = r.slot[SRC0], &x = r.slot[SRC1], &ids = r.slot[SRC2];
    const i64 used = blockIdx.y, token = blockIdx.z;
    const i32 expert = *reinterpret_cast<const i32 *>(ids.data + used * ids.nb[0] + token * ids.nb[1]);
    Job job;
    job.valid = expert >= 0 && expert < w.ne[2];
    if (!job.valid && threadIdx.x == 0) fail(r, INDEX_OUT_OF_RANGE);
    job.weights = w.data + (job.valid ? expert : 0) * w.nb[2];
    job.column = used % x.ne[1] + token * x.ne[1];
    job.result = to.data + used * to.nb[1] + token * to.nb[2];
    job.columns = 1;
    job.pairs = nullptr;
    return job;
}

// The same, for many tokens: blocks along y are groups of up to 8 columns of one expert, as
// route_columns has sorted them: extra[4] is where. Those that no group is left for do nothing.
__device__ inline Job grouped_job(const Record &r) {
    const Slot &w = r.slot[SRC0];
    const i32 *routing = reinterpret_cast<const i32 *>(r.extra[4]);
    const i32 *group = routing + 1 + 3 * blockIdx.y;
    Job job;
    job.valid = (i32)blockIdx.y < routing[0];
    job.columns = job.valid ? group[2] : 0;
    job.weights = w.data + (job.valid ? group[0] : 0) * w.nb[2];
    job.column = 0;
    job.result = nullptr;
    job.pairs = reinterpret_cast<const i32 *>(r.extra[5]) + (job.valid ? group[1] : 0);
    return job;
}

// A row of weights times some columns, as one of the lanes that share the row has it.
// extra: where the columns are, their stride, lanes of a row of weights.
template <int COLUMNS> struct Dots {
    int lanes, lane;
    i64 row;
    bool here;
    const u8 *weights;
    float total[COLUMNS];

    __device__ Dots(const Record &r, const Job &job) {
        const Slot &w = r.slot[SRC0];
        lanes = (int)r.extra[2];
        lane = threadIdx.x % lanes;
        row = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
        here = job.valid && row < w.ne[1];
        weights = job.weights + row * w.nb[1];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = 0;
    }

    // Not kept: the addresses of eight columns would double the registers.
    __device__ static const u8 *column(const Record &r, const Job &job, int c) {
        return reinterpret_cast<const u8 *>(r.extra[0]) + job.number(r, c) * r.extra[1];
    }

    // Adds up what the lanes have.
    __device__ void store(const Record &r, const Job &job) const {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const float sum = over_lanes(total[c], lanes);
            if (here && lane == 0 && c < job.columns)
                *reinterpret_cast<float *>(job.target(r, c) + row * r.slot[DST].nb[0]) = sum;
        }
    }
};

// Columns are rows of codes.
template <typename T, int COLUMNS> __device__ inline void multiply_codes(const Record &r, const Job &job) {
    const i64 k = r.slot[SRC0].ne[0];
    Dots<COLUMNS> dots(r, job);
    if (dots.here) {
        for (int number = dots.lane; number < (int)(k / 32); number += dots.lanes) {
            Run run;
            decode_run<T>(run, dots.weights, number);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                if (c >= job.columns) break;
                const u8 *column = dots.column(r, job, c);
                const int4 *codes = reinterpret_cast<const int4 *>(column) + 2 * number;
                const float *scales = reinterpret_cast<const float *>(column + k);
                const float2 sums = reinterpret_cast<const float2 *>(scales + k / 32)[number];
                const int4 a = codes[0], b = codes[1];
                int first = dot4(run.codes[0], a.x, 0), second = dot4(run.codes[4], b.x, 0);
                first = dot4(run.codes[1], a.y, first);
                first = dot4(run.codes[2], a.z, first);
                first = dot4(run.codes[3], a.w, first);
                second = dot4(run.codes[5], b.y, second);
                second = dot4(run.codes[6], b.z, second);
                second = dot4(run.codes[7], b.w, second);
                dots.total[c] += scales[number] * (run.scale[0] * first + run.scale[1] * second) +
                            (run.minimum[0] * sums.x + run.minimum[1] * sums.y);
            }
        }
    }
    dots.store(r, job);
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

// Columns are rows of F32. All rows of weights begin at multiples of 16 bytes if extra[3] is set;
// columns always do.
template <int TYPE, int COLUMNS> __device__ inline void multiply_floats(const Record &r, const Job &job) {
    typedef Floats<TYPE> W;
    const i64 k = r.slot[SRC0].ne[0];
    Dots<COLUMNS> dots(r, job);
    if (dots.here) {
        const i64 wide = r.extra[3] ? k / W::WIDE : 0;
        for (i64 i = dots.lane; i < wide; i += dots.lanes) {
            float values[W::WIDE];
            W::wide(dots.weights + 16 * i, values);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                if (c >= job.columns) break;
                const float4 *x = reinterpret_cast<const float4 *>(dots.column(r, job, c)) + i * (W::WIDE / 4);
#pragma unroll
                for (int j = 0; j < W::WIDE / 4; j++) {
                    const float4 four = x[j];
                    dots.total[c] += values[4 * j] * four.x + values[4 * j + 1] * four.y +
                                values[4 * j + 2] * four.z + values[4 * j + 3] * four.w;
                }
            }
        }
        for (i64 i = wide * W::WIDE + dots.lane; i < k; i += dots.lanes) {
            const float value = W::one(dots.weights + i * W::SIZE);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                if (c >= job.columns) break;
                dots.total[c] += value * reinterpret_cast<const float *>(dots.column(r, job, c))[i];
            }
        }
    }
    dots.store(r, job);
}

// One set for each type: WEIGHTS is what it is compiled for, FLOATS is set for floats.
#ifdef FLOATS
template <int COLUMNS> __device__ inline void multiply(const Record &r, const Job &job) {
    multiply_floats<WEIGHTS, COLUMNS>(r, job);
}
#else
template <int COLUMNS> __device__ inline void multiply(const Record &r, const Job &job) {
    multiply_codes<WEIGHTS, COLUMNS>(r, job);
}
#endif
KERNEL(multiply_1, 128) { multiply<1>(r, plain_job<1>(r)); }
KERNEL(multiply_2, 128) { multiply<2>(r, plain_job<2>(r)); }
KERNEL(multiply_4, 128) { multiply<4>(r, plain_job<4>(r)); }
KERNEL(multiply_8, 128) { multiply<8>(r, plain_job<8>(r)); }
KERNEL(multiply_routed, 128) { multiply<1>(r, routed_job(r)); }
KERNEL(multiply_grouped, 128) { multiply<8>(r, grouped_job(r)); }
