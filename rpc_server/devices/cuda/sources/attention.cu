// FLASH_ATTN_EXT: softmax(q k^T) v, position by position, without the scores ever being in memory.
//
// A block of 4 warps does 16 rows, 4 a warp; rows are the queries that share keys and values: all
// tokens of all heads of a group. Positions go by in tiles of 32, one a lane; keys and values of a
// tile are in shared memory 64 elements at a time. Where blocks are few, several share the positions,
// and `attention_join` adds up what they leave. Few rows are done by attention_few.cu.
//
// extra[4] and extra[5]: whether units of keys, and of values, can be loaded at once; extra[6]: whether
// there is shared memory for whole queries.
#include "attention.cuh"

#define ROWS 16
#define ROWS_OF_A_WARP (ROWS / WARPS)
#define TILE 32
#define CHUNK 64
// A column more than needed, so that lanes that read a column use different banks.
#define PITCH (CHUNK + 1)

template <int TYPE> __device__ inline void load_units(float *to, const u8 *row0, i64 apart, int first, int n, u32 wanted) {
    for (int i = threadIdx.x; i < TILE * (CHUNK / 8); i += WARPS * 32) {
        const int position = i / (CHUNK / 8), number = i % (CHUNK / 8);
        Unit<TYPE> unit;
        unit.clear();
        if ((wanted >> position & 1) && first + 8 * number < n) unit.load(row0 + position * apart, first / 8 + number);
        float x[8];
        unit.values(x);
#pragma unroll
        for (int e = 0; e < 8; e++) to[position * PITCH + Unit<TYPE>::element(number, e)] = x[e];
    }
}

// Elements `first` to `first + CHUNK` of 32 rows into shared memory: `row0` and what follows it, `apart`
// bytes each. Zeros for what is behind the end of a row (n elements), and for rows whose bit in `wanted`
// is not set. It is called in many places. (A slot by reference would be a copy of the whole record in
// each thread's own memory, on cards before 7.0.)
__device__ __noinline__ void load_chunk(float *to, i64 type, const u8 *row0, i64 apart, int first, int n, u32 wanted, bool units) {
    if (!units) {
        for (int i = threadIdx.x; i < TILE * CHUNK; i += WARPS * 32) {
            const int position = i / CHUNK, e = i % CHUNK;
            float value = 0;
            if ((wanted >> position & 1) && first + e < n)
                value = load_f32(row0 + position * apart + (first + e) * (type == F32 ? 4 : 2), type);
            to[position * PITCH + e] = value;
        }
        return;
    }
    switch (type) {
    case F32: load_units<F32>(to, row0, apart, first, n, wanted); break;
    case F16: load_units<F16>(to, row0, apart, first, n, wanted); break;
    case BF16: load_units<BF16>(to, row0, apart, first, n, wanted); break;
    case AS_Q4_0: load_units<AS_Q4_0>(to, row0, apart, first, n, wanted); break;
    case AS_Q4_1: load_units<AS_Q4_1>(to, row0, apart, first, n, wanted); break;
    case AS_Q5_0: load_units<AS_Q5_0>(to, row0, apart, first, n, wanted); break;
    case AS_Q5_1: load_units<AS_Q5_1>(to, row0, apart, first, n, wanted); break;
    case AS_IQ4_NL: load_units<AS_IQ4_NL>(to, row0, apart, first, n, wanted); break;
    default: load_units<AS_Q8_0>(to, row0, apart, first, n, wanted); break;
    }
}

// `n` elements from `first` on of each query, which are whole warps of them; zeros behind the end.
__device__ inline void load_queries(float *to, const Record &r, const Group &group, int first, int n) {
    for (int i = threadIdx.x; i < ROWS * n; i += WARPS * 32)
        to[i] = rounded(group.element(r.slot[SRC0], group.query(i / n), first + i % n), r.extra[3]);
}

// Elements of values that a lane adds up: those of its number, and every 32nd from there.
template <int N_VALUES> __device__ inline void attention_rows(const Record &r) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2];
    DYNAMIC_SHARED(float, shared);
    SHARED_ARRAY(Bias, biases, ROWS);
    SHARED_ARRAY(u32, room, 2 * WARPS);
    Bits bits = {room, 0};
    const int dk = (int)k.ne[0], dv = (int)v.ne[0], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Group group(r, ROWS);
    // Queries, rows of whole chunks, or one chunk of each; then keys or values.
    const bool whole = r.extra[6];
    const int padded = (dk + CHUNK - 1) / CHUNK * CHUNK, pitch = whole ? padded : CHUNK;
    float *queries = shared, *chunk = shared + ROWS * pitch;
    if (threadIdx.x < ROWS) biases[threadIdx.x].set(r, group, threadIdx.x);
    if (whole) load_queries(queries, r, group, 0, padded);
    __syncthreads();
    const Softmax softmax(r);

    float top[ROWS_OF_A_WARP], total[ROWS_OF_A_WARP], sum[ROWS_OF_A_WARP][N_VALUES];
    const Bias *mine = biases + warp * ROWS_OF_A_WARP;
#pragma unroll
    for (int j = 0; j < ROWS_OF_A_WARP; j++) {
        top[j] = -INF;
        total[j] = 0;
#pragma unroll
        for (int e = 0; e < N_VALUES; e++) sum[j][e] = 0;
    }

    const u8 *keys = group.kept(q, k), *values = group.kept(q, v);
    const i64 begin = blockIdx.y * r.extra[0], end = min(begin + r.extra[0], k.ne[1]);
    for (i64 first = begin; first < end; first += TILE) {
        const i64 position = first + lane;
        bool attended = false;
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) attended |= mine[j].at(position, end) != -INF;
        const u32 any = __ballot_sync(ALL_LANES, attended);
        // A tile that none of the rows may see is not loaded.
        const u32 seen = bits.of_block(any);
        if (!seen) continue;

        float score[ROWS_OF_A_WARP];
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) score[j] = 0;
        for (int at = 0; at < padded; at += CHUNK) {
            __syncthreads();
            load_chunk(chunk, k.type, keys + first * k.nb[1], k.nb[1], at, dk, seen, r.extra[4]);
            if (!whole) load_queries(queries, r, group, at, CHUNK);
            __syncthreads();
            // A warp none of whose rows attends to any of these only helps to load.
            if (!any) continue;
            const float *rows = queries + warp * ROWS_OF_A_WARP * pitch + (whole ? at : 0);
#pragma unroll 8
            for (int e = 0; e < CHUNK; e++) {
                const float key = chunk[lane * PITCH + e];
#pragma unroll
                for (int j = 0; j < ROWS_OF_A_WARP; j++) score[j] += rows[j * pitch + e] * key;
            }
        }
        bool used = false;
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) {
            const float shrink = softmax.weigh(score[j], mine[j].at(position, end), top[j], total[j]);
#pragma unroll
            for (int e = 0; e < N_VALUES; e++) sum[j][e] *= shrink;
            used |= score[j] != 0;
        }
        const u32 weighed = __ballot_sync(ALL_LANES, used);
        // What no row attends to may be anything, NaN included: it is not loaded.
        const u32 wanted = bits.of_block(weighed);
#pragma unroll
        for (int at = 0; at < N_VALUES * 32; at += CHUNK) {
            if (at >= dv) break;
            __syncthreads();
            load_chunk(chunk, v.type, values + first * v.nb[1], v.nb[1], at, dv, wanted, r.extra[5]);
            __syncthreads();
            if (!weighed) continue;
#pragma unroll 4
            for (int p = 0; p < TILE; p++) {
                const float low = chunk[p * PITCH + lane], high = chunk[p * PITCH + 32 + lane];
#pragma unroll
                for (int j = 0; j < ROWS_OF_A_WARP; j++) {
                    const float weight = __shfl_sync(ALL_LANES, score[j], p);
                    sum[j][at / 32] += weight * low;
                    sum[j][at / 32 + 1] += weight * high;
                }
            }
        }
    }

#pragma unroll
    for (int j = 0; j < ROWS_OF_A_WARP; j++) {
        const float all = over_warp(total[j], Sum());
        if (!mine[j].valid) continue;
        const Ending ending(r, group, group.query(warp * ROWS_OF_A_WARP + j), top[j], all, lane == 0);
#pragma unroll
        for (int e = 0; e < N_VALUES; e++)
            if (e * 32 + lane < dv) ending.to[e * 32 + lane] = sum[j][e] * ending.factor;
    }
}

// Threads of a block, and how many blocks a multiprocessor should have registers for.
#if VALUES <= 8
#define BOUNDS 128, 4
#else
#define BOUNDS 128, 3
#endif
// VALUES is what it is compiled for: rows of values of up to 32 times that.
KERNEL(attention, BOUNDS) { attention_rows<VALUES>(r); }
