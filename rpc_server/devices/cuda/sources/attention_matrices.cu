// FLASH_ATTN_EXT of many rows by tensor cores, of keys and values that half precision holds.
//
// As attention.cu, but that a block does 64 rows, 16 a warp, and that scores and sums are products of
// matrices (mma.cuh): queries by keys, and weights by values, rounded to half precision. Which of them
// are whose is for positions and for elements of values as for columns there: a lane has two of each
// eight, of two rows.
//
// extra[4]: whether there is shared memory for whole queries. Keys and values can be loaded in units.
#include "attention.cuh"
#include "mma.cuh"

#if ARCHITECTURE >= 750

#define ROWS_OF_A_WARP 16
#define ROWS (WARPS * ROWS_OF_A_WARP)
#define TILE 32
#define CHUNK 64
// Rows in shared memory, in 16 bytes: one more than needed, so that eight neighbours are in different
// banks. Of keys they are positions, of values elements.
#define KEY_PITCH (CHUNK / 8 + 1)
#define VALUE_PITCH (TILE / 8 + 1)

__device__ inline u32 two_halves(float low, float high) {
    return float_to_half(low) | (u32)float_to_half(high) << 16;
}

// Eight elements of a row of keys or values, two a word; zeros if they are not `wanted`.
template <int TYPE> struct HalfUnit {
    u32 words[4];
    __device__ HalfUnit(const u8 *row, int number, bool wanted) {
        Unit<TYPE> unit;
        unit.clear();
        if (wanted) unit.load(row, number);
        if constexpr (TYPE == F16) {
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = unit.words[i];
        } else {
            float x[8];
            unit.values(x);
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = two_halves(x[2 * i], x[2 * i + 1]);
        }
    }
};

// Where a tile's chunk of keys or values is: `row0` and what follows it, `apart` bytes each; from element
// `first` on, of `n`; rows whose bit in `wanted` is not set are zeros, as is what is behind the end.
struct Chunk {
    const u8 *row0;
    i64 apart;
    int first, n;
    u32 wanted;

    template <int TYPE> __device__ HalfUnit<TYPE> unit(int position, int number) const {
        const bool there = (wanted >> position & 1) && first + 8 * number < n;
        return HalfUnit<TYPE>(row0 + position * apart, first / 8 + number, there);
    }
};

template <int TYPE> __device__ inline void load_keys(u32 *to, const Chunk &chunk) {
    for (int i = threadIdx.x; i < TILE * (CHUNK / 8); i += WARPS * 32) {
        const int position = i / (CHUNK / 8), number = i % (CHUNK / 8);
        const HalfUnit<TYPE> unit = chunk.unit<TYPE>(position, number);
#pragma unroll
        for (int e = 0; e < 4; e++)
            to[4 * KEY_PITCH * position + Unit<TYPE>::element(number, 2 * e) / 2] = unit.words[e];
    }
}

// Values are turned: a thread has two positions, which are neighbours then.
template <int TYPE> __device__ inline void load_values(u32 *to, const Chunk &chunk) {
    const int pair = threadIdx.x % (TILE / 2), number = threadIdx.x / (TILE / 2);
    const HalfUnit<TYPE> one = chunk.unit<TYPE>(2 * pair, number), other = chunk.unit<TYPE>(2 * pair + 1, number);
#pragma unroll
    for (int e = 0; e < 8; e++)
        to[4 * VALUE_PITCH * Unit<TYPE>::element(number, e) + pair] =
            __byte_perm(one.words[e / 2], other.words[e / 2], e % 2 ? 0x7632 : 0x5410);
}

template <int TYPE> __device__ inline void load_either(u32 *to, const Chunk &chunk, bool values) {
    if (values) load_values<TYPE>(to, chunk);
    else load_keys<TYPE>(to, chunk);
}
__device__ __noinline__ void load_chunk(int4 *shared, i64 type, Chunk chunk, bool values) {
    u32 *to = reinterpret_cast<u32 *>(shared);
    switch (type) {
    case F16: load_either<F16>(to, chunk, values); break;
    case AS_Q4_0: load_either<AS_Q4_0>(to, chunk, values); break;
    case AS_Q4_1: load_either<AS_Q4_1>(to, chunk, values); break;
    case AS_Q5_0: load_either<AS_Q5_0>(to, chunk, values); break;
    case AS_Q5_1: load_either<AS_Q5_1>(to, chunk, values); break;
    case AS_IQ4_NL: load_either<AS_IQ4_NL>(to, chunk, values); break;
    default: load_either<AS_Q8_0>(to, chunk, values); break;
    }
}

// `n` elements from `first` on of each query, which are whole warps of them; zeros behind the end.
__device__ inline void load_queries(int4 *shared, int pitch, const Record &r, const Group &group, int first, int n) {
    u16 *to = reinterpret_cast<u16 *>(shared);
    for (int i = threadIdx.x; i < ROWS * n; i += WARPS * 32) {
        const int row = i / n, e = i % n;
        const float value = rounded(group.element(r.slot[SRC0], group.query(row), first + e), r.extra[3]);
        to[8 * pitch * row + e] = float_to_half(value);
    }
}

struct Or {
    template <typename T> __device__ T operator()(T a, T b) const { return a | b; }
};
// Over the four lanes that share their rows.
template <typename F> __device__ inline float over_row(float value, F combine) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return combine(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

enum { EIGHTS = TILE / 8 };

template <int N_VALUES> __device__ inline void attention_rows(const Record &r) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2];
    DYNAMIC_SHARED(int4, shared);
    SHARED_ARRAY(Bias, biases, ROWS);
    SHARED_ARRAY(u32, room, 2 * WARPS);
    Bits bits = {room, 0};
    const int dk = (int)k.ne[0], dv = (int)v.ne[0], warp = threadIdx.x / 32;
    const Group group(r, ROWS);
    const bool whole = r.extra[4];
    const int padded = (dk + CHUNK - 1) / CHUNK * CHUNK, pitch = (whole ? padded : CHUNK) / 8 + 1;
    int4 *queries = shared, *chunk = shared + ROWS * pitch;
    if (threadIdx.x < ROWS) biases[threadIdx.x].set(r, group, threadIdx.x);
    if (whole) load_queries(queries, pitch, r, group, 0, padded);
    __syncthreads();
    const Softmax softmax(r);

    // Of the lane's two rows, the second eight below the first.
    float top[2] = {-INF, -INF}, total[2] = {0, 0};
    const Bias *mine = biases + warp * ROWS_OF_A_WARP + row_of_sum(0);
    FloatSums sum[4 * N_VALUES];
#pragma unroll
    for (int e = 0; e < 4 * N_VALUES; e++) sum[e] = {{0, 0, 0, 0}};

    const u8 *keys = group.kept(q, k), *values = group.kept(q, v);
    const i64 begin = blockIdx.y * r.extra[0], end = min(begin + r.extra[0], k.ne[1]);
    for (i64 first = begin; first < end; first += TILE) {
        FloatSums score[EIGHTS], bias[EIGHTS];
        u32 attended = 0;
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int position = 8 * n + column_of_sum(i);
                score[n].of[i] = 0;
                bias[n].of[i] = mine[i / 2 * 8].at(first + position, end);
                if (bias[n].of[i] != -INF) attended |= 1u << position;
            }
        const u32 any = over_warp(attended, Or());
        // A tile that none of the rows may see is not loaded.
        const u32 seen = bits.of_block(any);
        if (!seen) continue;

        for (int at = 0; at < padded; at += CHUNK) {
            __syncthreads();
            load_chunk(chunk, k.type, {keys + first * k.nb[1], k.nb[1], at, dk, seen}, false);
            if (!whole) load_queries(queries, pitch, r, group, at, CHUNK);
            __syncthreads();
            // A warp none of whose rows attends to any of these only helps to load.
            if (!any) continue;
            const int4 *rows = queries + warp * ROWS_OF_A_WARP * pitch + (whole ? at / 8 : 0);
#pragma unroll
            for (int e = 0; e < CHUNK / 8; e += 2) {
                const RowWords a = rows_of_lane(rows + e, pitch);
#pragma unroll
                for (int n = 0; n < EIGHTS; n++)
                    add_whole(score[n], a, columns_of_lane(chunk + 8 * n * KEY_PITCH + e, KEY_PITCH));
            }
        }

        // Softmax of each of the two rows; scores become weights.
        u32 used = 0;
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h];
#pragma unroll
            for (int n = 0; n < EIGHTS; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    float &s = score[n].of[i];
                    s *= softmax.scale;
                    if (softmax.softcap != 0) s = softmax.softcap * tanhf(s);
                    s = bias[n].of[i] == -INF ? -INF : s + bias[n].of[i];
                    now = fmaxf(now, s);
                }
            now = over_row(now, Largest());
            shrink[h] = now == -INF ? 1 : expf(top[h] - now);
            total[h] *= shrink[h];
#pragma unroll
            for (int n = 0; n < EIGHTS; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    float &s = score[n].of[i];
                    s = s == -INF ? 0 : expf(s - now);
                    total[h] += s;
                    if (s != 0) used |= 1u << (8 * n + column_of_sum(i));
                }
            top[h] = now;
        }
#pragma unroll
        for (int e = 0; e < 4 * N_VALUES; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[e].of[i] *= shrink[i / 2];
        // What sums are of two products is the rows of the next one: 16 positions.
        RowWords weights[EIGHTS / 2];
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                weights[n / 2].word[n % 2 * 2 + h] = two_halves(score[n].of[2 * h], score[n].of[2 * h + 1]);
        const u32 weighed = over_warp(used, Or());
        // What no row attends to may be anything, NaN included: it is not loaded.
        const u32 wanted = bits.of_block(weighed);
#pragma unroll
        for (int at = 0; at < N_VALUES * 32; at += CHUNK) {
            if (at >= dv) break;
            __syncthreads();
            load_chunk(chunk, v.type, {values + first * v.nb[1], v.nb[1], at, dv, wanted}, true);
            __syncthreads();
            if (!weighed) continue;
#pragma unroll
            for (int e = 0; e < CHUNK / 8; e++)
#pragma unroll
                for (int j = 0; j < EIGHTS / 2; j++)
                    add_whole(sum[at / 8 + e], weights[j], columns_of_lane(chunk + 8 * e * VALUE_PITCH + 2 * j, VALUE_PITCH));
        }
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float all = over_row(total[h], Sum());
        if (!mine[8 * h].valid) continue;
        const int row = warp * ROWS_OF_A_WARP + row_of_sum(2 * h);
        const Ending ending(r, group, group.query(row), top[h], all, column_of_sum(0) == 0);
#pragma unroll
        for (int e = 0; e < 4 * N_VALUES; e++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int element = 8 * e + column_of_sum(i);
                if (element < dv) ending.to[element] = sum[e].of[2 * h + i] * ending.factor;
            }
    }
}

// Threads of a block, and how many blocks a multiprocessor should have registers for.
#if VALUES <= 4
#define BOUNDS 128, 3
#else
#define BOUNDS 128, 2
#endif
// VALUES is what it is compiled for: rows of values of up to 32 times that.
KERNEL(attention_matrices, BOUNDS) { attention_rows<VALUES>(r); }
#endif
