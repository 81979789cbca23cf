// FLASH_ATTN_EXT: softmax(q k^T) v, position by position, without the scores ever being in memory.
//
// A block of 4 warps does 16 rows, 4 a warp; rows are the queries that share keys and values: all
// tokens of all heads of a group. Positions go by in tiles of 32, one a lane; keys and values of a
// tile are in shared memory 64 elements at a time. Where rows are few (decoding), blocks along z take
// a part of the positions each, and `attention_join` adds up what they leave.
#include "weights.cuh"

#define ROWS 16
#define WARPS 4
#define ROWS_OF_A_WARP (ROWS / WARPS)
#define TILE 32
#define CHUNK 64
// A column more than needed, so that lanes that read a column use different banks.
#define PITCH (CHUNK + 1)

// ggml's type numbers of what keys and values may be kept in.
enum { AS_Q4_0 = 2, AS_Q4_1 = 3, AS_Q5_0 = 6, AS_Q5_1 = 7, AS_Q8_0 = 8, AS_IQ4_NL = 20 };

template <typename T> __device__ inline void decode_floats(float *to, const u8 *row, int run_number) {
    Run run;
    decode_run<T>(run, row, run_number);
    for (int i = 0; i < 32; i++)
        to[i] = run.scale[i / 16] * (i8)(run.codes[i / 4] >> (8 * (i % 4))) + run.minimum[i / 16];
}

// Elements `first` to `first + CHUNK` of 32 rows from `row0` on into shared memory; zeros for what
// is behind the end of a row (n elements), and for rows whose bit in `wanted` is not set.
__device__ __noinline__ void load_chunk(float *to, const Slot &s, const u8 *row0, int first, int n, u32 wanted) {
    const bool plain = s.type == F32 || s.type == F16 || s.type == BF16;
    if (plain) {
        for (int i = threadIdx.x; i < TILE * CHUNK; i += WARPS * 32) {
            const int position = i / CHUNK, e = i % CHUNK;
            float value = 0;
            if ((wanted >> position & 1) && first + e < n)
                value = load_f32(row0 + position * s.nb[1] + (first + e) * s.nb[0], s.type);
            to[position * PITCH + e] = value;
        }
        return;
    }
    for (int i = threadIdx.x; i < TILE * (CHUNK / 32); i += WARPS * 32) {
        const int position = i / (CHUNK / 32), run = i % (CHUNK / 32);
        float *target = to + position * PITCH + 32 * run;
        const u8 *row = row0 + position * s.nb[1];
        const int number = first / 32 + run;
        if (!(wanted >> position & 1) || 32 * number >= n) {
            for (int e = 0; e < 32; e++) target[e] = 0;
            continue;
        }
        switch (s.type) {
        case AS_Q4_0: decode_floats<Q4_0>(target, row, number); break;
        case AS_Q4_1: decode_floats<Q4_1>(target, row, number); break;
        case AS_Q5_0: decode_floats<Q5_0>(target, row, number); break;
        case AS_Q5_1: decode_floats<Q5_1>(target, row, number); break;
        case AS_IQ4_NL: decode_floats<IQ4_NL>(target, row, number); break;
        default: decode_floats<Q8_0>(target, row, number); break;
        }
    }
}

// Where a row of a group lies among the queries.
struct Query {
    i64 token, head, batch;
    bool valid;
};

__device__ inline Query query_of(const Record &r, int row) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1];
    const i64 heads = q.ne[2] / k.ne[2], number = (i64)blockIdx.x * ROWS + row;
    Query query;
    query.valid = number < heads * q.ne[1];
    query.token = number / heads;
    query.head = blockIdx.y % k.ne[2] * heads + number % heads;
    query.batch = blockIdx.y / k.ne[2];
    return query;
}

// Elements of values that a lane adds up: those of its number, and every 32nd from there.
template <int N_VALUES> __device__ inline void attention_rows(const Record &r) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2], &mask = r.slot[SRC3], &sinks = r.slot[SRC4];
    DYNAMIC_SHARED(float, shared);
    SHARED_ARRAY(u32, attended, WARPS);
    const int dk = (int)k.ne[0], dv = (int)v.ne[0], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Queries, rows of whole chunks; then keys or values.
    const int padded = (dk + CHUNK - 1) / CHUNK * CHUNK;
    float *queries = shared, *chunk = shared + ROWS * padded;
    const float softcap = param_f32(r, 2), max_bias = param_f32(r, 1);
    const float scale = softcap != 0 ? param_f32(r, 0) / softcap : param_f32(r, 0);
    for (int i = threadIdx.x; i < ROWS * padded; i += WARPS * 32) {
        const Query query = query_of(r, i / padded);
        const int e = i % padded;
        float value = 0;
        if (query.valid && e < dk)
            value = *reinterpret_cast<const float *>(q.data + e * q.nb[0] + query.token * q.nb[1] + query.head * q.nb[2] + query.batch * q.nb[3]);
        // As ggml's CPU backend rounds them for keys of these types.
        if (k.type == F16) value = half_to_float(float_to_half(value));
        if (k.type == BF16) value = bfloat_to_float(float_to_bfloat(value));
        queries[i] = value;
    }

    Query mine[ROWS_OF_A_WARP];
    float top[ROWS_OF_A_WARP], total[ROWS_OF_A_WARP], sum[ROWS_OF_A_WARP][N_VALUES];
    float factor[ROWS_OF_A_WARP];
#pragma unroll
    for (int j = 0; j < ROWS_OF_A_WARP; j++) {
        mine[j] = query_of(r, warp * ROWS_OF_A_WARP + j);
        factor[j] = slope(mine[j].head, q.ne[2], max_bias);
        top[j] = -INF;
        total[j] = 0;
#pragma unroll
        for (int e = 0; e < N_VALUES; e++) sum[j][e] = 0;
    }

    const i64 kv_head = blockIdx.y % k.ne[2], batch = blockIdx.y / k.ne[2];
    const u8 *keys = k.data + kv_head * k.nb[2] + batch / (q.ne[3] / k.ne[3]) * k.nb[3];
    const u8 *values = v.data + kv_head * v.nb[2] + batch / (q.ne[3] / v.ne[3]) * v.nb[3];
    const i64 per_part = r.extra[0], begin = blockIdx.z * per_part, end = min(begin + per_part, k.ne[1]);
    for (i64 first = begin; first < end; first += TILE) {
        const i64 position = first + lane;
        const u32 here = end - first >= TILE ? 0xffffffffu : (1u << (end - first)) - 1;
        float bias[ROWS_OF_A_WARP];
        bool seen = false;
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) {
            bias[j] = -INF;
            if (mine[j].valid && position < end) {
                bias[j] = 0;
                if (mask.data)
                    bias[j] = factor[j] * half_to_float(*reinterpret_cast<const u16 *>(
                        mask.data + position * mask.nb[0] + mine[j].token * mask.nb[1] +
                        mine[j].head % mask.ne[2] * mask.nb[2] + mine[j].batch % mask.ne[3] * mask.nb[3]));
            }
            seen |= bias[j] != -INF;
        }
        // A tile that none of the rows may see is not loaded.
        if (!__syncthreads_or(seen)) continue;

        float score[ROWS_OF_A_WARP];
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) score[j] = 0;
        for (int at = 0; at < padded; at += CHUNK) {
            __syncthreads();
            load_chunk(chunk, k, keys + first * k.nb[1], at, dk, here);
            __syncthreads();
#pragma unroll 8
            for (int e = 0; e < CHUNK; e++) {
                const float key = chunk[lane * PITCH + e];
#pragma unroll
                for (int j = 0; j < ROWS_OF_A_WARP; j++)
                    score[j] += queries[(warp * ROWS_OF_A_WARP + j) * padded + at + e] * key;
            }
        }
        u32 any = 0;
#pragma unroll
        for (int j = 0; j < ROWS_OF_A_WARP; j++) {
            float s = score[j] * scale;
            if (softcap != 0) s = softcap * tanhf(s);
            s = bias[j] == -INF ? -INF : s + bias[j];
            const float now = fmaxf(top[j], over_warp(s, Largest()));
            const float shrink = now == -INF ? 1 : expf(top[j] - now);
            // What a lane has of this tile from here on are weights.
            score[j] = s == -INF ? 0 : expf(s - now);
            total[j] = total[j] * shrink + score[j];
            top[j] = now;
#pragma unroll
            for (int e = 0; e < N_VALUES; e++) sum[j][e] *= shrink;
            any |= __ballot_sync(ALL_LANES, score[j] != 0);
        }
        // What no row attends to may be anything, NaN included: it is not loaded.
        if (lane == 0) attended[warp] = any;
        __syncthreads();
        u32 wanted = 0;
        for (int w = 0; w < WARPS; w++) wanted |= attended[w];
#pragma unroll
        for (int at = 0; at < N_VALUES * 32; at += CHUNK) {
            if (at >= dv) break;
            __syncthreads();
            load_chunk(chunk, v, values + first * v.nb[1], at, dv, wanted);
            __syncthreads();
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
        if (gridDim.z > 1) {
            // For attention_join: the sums, then the largest score and the total.
            const i64 row = (blockIdx.z * q.ne[3] + mine[j].batch) * q.ne[2] * q.ne[1] + mine[j].token * q.ne[2] + mine[j].head;
            float *left = reinterpret_cast<float *>(r.extra[1]) + row * (dv + 2);
#pragma unroll
            for (int e = 0; e < N_VALUES; e++)
                if (e * 32 + lane < dv) left[e * 32 + lane] = sum[j][e];
            if (lane == 0) {
                left[dv] = top[j];
                left[dv + 1] = all;
            }
            continue;
        }
        float whole = all, shrink = 1;
        if (sinks.data) {
            // A sink is a position that takes its share and gives nothing.
            const float sink = *reinterpret_cast<const float *>(sinks.data + mine[j].head * sinks.nb[0]);
            const float now = fmaxf(top[j], sink);
            shrink = top[j] == -INF ? 0 : expf(top[j] - now);
            whole = all * shrink + expf(sink - now);
        }
        const float inverse = whole == 0 ? 0 : shrink / whole;
        u8 *target = to.data + mine[j].head * to.nb[1] + mine[j].token * to.nb[2] + mine[j].batch * to.nb[3];
#pragma unroll
        for (int e = 0; e < N_VALUES; e++)
            if (e * 32 + lane < dv) *reinterpret_cast<float *>(target + (e * 32 + lane) * to.nb[0]) = sum[j][e] * inverse;
    }
}

// VALUES is what it is compiled for: rows of values of up to 32 times that.
KERNEL(attention, 128) { attention_rows<VALUES>(r); }

// extra: parts, and what they left. A block of threads for each row of the result.
KERNEL(attention_join, 128) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0], &sinks = r.slot[SRC4];
    const i64 parts = r.extra[0], rows = q.ne[1] * q.ne[2] * q.ne[3], dv = to.ne[0];
    const float *left = reinterpret_cast<const float *>(r.extra[1]);
    FOR_ROWS(row, rows) {
        const i64 head = row % q.ne[2], token = row / q.ne[2] % q.ne[1], batch = row / q.ne[2] / q.ne[1];
        float top = -INF, sink = -INF;
        if (sinks.data) top = sink = *reinterpret_cast<const float *>(sinks.data + head * sinks.nb[0]);
        for (i64 p = 0; p < parts; p++) top = fmaxf(top, left[(p * rows + row) * (dv + 2) + dv]);
        float whole = sinks.data ? expf(sink - top) : 0;
        if (top != -INF)
            for (i64 p = 0; p < parts; p++) {
                const float *part = left + (p * rows + row) * (dv + 2);
                whole += part[dv + 1] * expf(part[dv] - top);
            }
        const float inverse = whole == 0 ? 0 : 1 / whole;
        u8 *target = to.data + head * to.nb[1] + token * to.nb[2] + batch * to.nb[3];
        for (i64 e = threadIdx.x; e < dv; e += blockDim.x) {
            float sum = 0;
            if (top != -INF)
                for (i64 p = 0; p < parts; p++) {
                    const float *part = left + (p * rows + row) * (dv + 2);
                    sum += part[e] * expf(part[dv] - top);
                }
            *reinterpret_cast<float *>(target + e * to.nb[0]) = sum * inverse;
        }
    }
}
