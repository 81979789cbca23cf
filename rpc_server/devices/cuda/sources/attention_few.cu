// FLASH_ATTN_EXT for few rows: decoding, where keys and values are read for the heads of one token.
//
// Each warp goes over positions of its own, 32 at a time, without waiting for the others. Keys and
// values come from memory straight into registers, a unit a lane: as many lanes as a row has units
// share a row, and a warp reads several rows at once. Positions that no row attends to are not read:
// they may be anything, NaN included. At the end the warps put together what they have.
//
// Compiled for a type of keys, one of values, ROWS, and UNITS: how many units of keys, and of values, a
// lane has at most.
// The last block of those that have parts of the same rows puts them together.
//
// extra[4] and extra[5]: lanes that share a row of keys, and one of values; powers of two from 4 on. Where
// extra[6] is set the result is rounded for products, too: extra[6] to extra[8] are what extra[0] to
// extra[2] are for quantize_columns. A block then has all heads of its group, for some tokens.
#include "attention.cuh"
#include "rounding.cuh"

typedef Unit<KEY_TYPE> KeyUnit;
typedef Unit<VALUE_TYPE> ValueUnit;

// A unit of a query.
struct Query8 {
    float4 a, b;
    __device__ float product(const float (&x)[8], float sum) const {
        sum += a.x * x[0] + a.y * x[1] + a.z * x[2] + a.w * x[3];
        return sum + b.x * x[4] + b.y * x[5] + b.z * x[6] + b.w * x[7];
    }
};

// Queries as they are multiplied: in planes of four elements of each unit, so that neighbouring lanes
// read neighbouring addresses.
struct Queries {
    float4 *fours;
    int units;

    __device__ void load(const Record &r, const Group &group) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, runs = units / 4;
        float *to = reinterpret_cast<float *>(fours);
        for (int i = warp; i < ROWS * runs; i += WARPS) {
            const int row = i / runs, e = 32 * (i % runs) + lane, place = KeyUnit::place_of(e);
            const float value = rounded(group.element(r.slot[SRC0], group.query(row), e), r.extra[3]);
            to[4 * ((2 * row + place / 4) * units + KeyUnit::unit_of(e)) + place % 4] = value;
        }
        __syncthreads();
    }
    __device__ Query8 unit(int row, int number) const {
        return {fours[2 * row * units + number], fours[(2 * row + 1) * units + number]};
    }
};

// The products of 32 positions from `keys` on with each row; a lane gets those of the position with its
// number. Four positions of the same lanes at a time: each exchange between two halves of these lanes
// halves the number of positions that a lane has sums of, too.
__device__ inline void multiply_keys(float (&score)[ROWS], const Queries &queries, const u8 *keys, const Slot &k, int lanes, u32 wanted) {
    const int lane = threadIdx.x % 32, across = lane % lanes, quarter = lanes / 4, units = (int)k.ne[0] / 8;
#pragma unroll
    for (int j = 0; j < ROWS; j++) score[j] = 0;
#pragma unroll 1
    for (int step = 0; step < quarter; step++) {
        // Queries are read again in each step: there aren't registers for many of them.
        if (ROWS > 1) __syncwarp();
        KeyUnit key[4][UNITS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int p = lane - across + i * quarter + step;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                key[i][u].clear();
                if ((wanted >> p & 1) && across + u * lanes < units) key[i][u].load(keys + p * k.nb[1], across + u * lanes);
            }
        }
        float sum[4][ROWS];
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            float x[4][8];
#pragma unroll
            for (int i = 0; i < 4; i++) key[i][u].values(x[i]);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const Query8 query = queries.unit(j, across + u * lanes);
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i][j] = query.product(x[i], u == 0 ? 0 : sum[i][j]);
            }
        }
        const bool upper = across & 2 * quarter, odd = across & quarter;
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const float even_sum = (upper ? sum[2][j] : sum[0][j]) + __shfl_xor_sync(ALL_LANES, upper ? sum[0][j] : sum[2][j], 2 * quarter);
            const float odd_sum = (upper ? sum[3][j] : sum[1][j]) + __shfl_xor_sync(ALL_LANES, upper ? sum[1][j] : sum[3][j], 2 * quarter);
            float one = (odd ? odd_sum : even_sum) + __shfl_xor_sync(ALL_LANES, odd ? even_sum : odd_sum, quarter);
            for (int distance = quarter / 2; distance > 0; distance /= 2) one += __shfl_xor_sync(ALL_LANES, one, distance);
            if (across % quarter == step) score[j] = one;
        }
    }
}

// Adds the values of 32 positions from `values` on, times the weights that lanes have of them.
__device__ inline void add_values(float (&sum)[ROWS][UNITS][8], const float (&weight)[ROWS], const u8 *values, const Slot &v, int lanes, u32 wanted) {
    const int lane = threadIdx.x % 32, across = lane % lanes, units = (int)v.ne[0] / 8;
#pragma unroll 1
    for (int step = 0; step < lanes; step += 4) {
        ValueUnit value[4][UNITS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int p = lane - across + step + i;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                value[i][u].clear();
                if ((wanted >> p & 1) && across + u * lanes < units) value[i][u].load(values + p * v.nb[1], across + u * lanes);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float times[ROWS];
#pragma unroll
            for (int j = 0; j < ROWS; j++) times[j] = __shfl_sync(ALL_LANES, weight[j], lane - across + step + i);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                float x[8];
                value[i][u].values(x);
#pragma unroll
                for (int j = 0; j < ROWS; j++)
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[j][u][e] += times[j] * x[e];
            }
        }
    }
}

__device__ inline void attend(const Record &r) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2];
    // Queries; at the end the sums of all rows.
    DYNAMIC_SHARED(float4, shared);
    SHARED_ARRAY(float, tops, WARPS * ROWS);
    SHARED_ARRAY(float, totals, WARPS * ROWS);
    SHARED_ARRAY(Bias, biases, ROWS);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dv = (int)v.ne[0];
    const int key_lanes = (int)r.extra[4], value_lanes = (int)r.extra[5];
    const Group group(r, ROWS);
    const Queries queries = {shared, key_lanes * UNITS};
    if (threadIdx.x < ROWS) biases[threadIdx.x].set(r, group, threadIdx.x);
    queries.load(r, group);

    const Softmax softmax(r);
    float top[ROWS], total[ROWS], sum[ROWS][UNITS][8];
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        top[j] = -INF;
        total[j] = 0;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int e = 0; e < 8; e++) sum[j][u][e] = 0;
    }

    const u8 *keys = group.kept(q, k), *values = group.kept(q, v);
    const i64 begin = blockIdx.y * r.extra[0], end = min(begin + r.extra[0], k.ne[1]);
#pragma unroll 1
    for (i64 first = begin + 32 * warp; first < end; first += 32 * WARPS) {
        bool seen = false;
#pragma unroll
        for (int j = 0; j < ROWS; j++) seen |= biases[j].at(first + lane, end) != -INF;
        const u32 attended = __ballot_sync(ALL_LANES, seen);
        if (!attended) continue;
        float score[ROWS];
        multiply_keys(score, queries, keys + first * k.nb[1], k, key_lanes, attended);
        bool used = false;
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const float shrink = softmax.weigh(score[j], biases[j].at(first + lane, end), top[j], total[j]);
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int e = 0; e < 8; e++) sum[j][u][e] *= shrink;
            used |= score[j] != 0;
        }
        const u32 wanted = __ballot_sync(ALL_LANES, used);
        if (wanted) add_values(sum, score, values + first * v.nb[1], v, value_lanes, wanted);
    }

    // What lanes with the same units have, then what warps have.
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        total[j] = over_warp(total[j], Sum());
        for (int distance = value_lanes; distance < 32; distance *= 2)
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int e = 0; e < 8; e++) sum[j][u][e] += __shfl_xor_sync(ALL_LANES, sum[j][u][e], distance);
        if (lane == 0) {
            tops[ROWS * warp + j] = top[j];
            totals[ROWS * warp + j] = total[j];
        }
    }
    __syncthreads();
    float *together = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w == warp && lane < value_lanes) {
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                float largest = tops[j];
                for (int other = 1; other < WARPS; other++) largest = fmaxf(largest, tops[ROWS * other + j]);
                const float shrink = top[j] == -INF ? 0 : expf(top[j] - largest);
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
                    const int unit = lane + u * value_lanes;
                    if (8 * unit >= dv) break;
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        float *to = together + j * dv + ValueUnit::element(unit, e);
                        *to = sum[j][u][e] * shrink + (w == 0 ? 0 : *to);
                    }
                }
            }
        }
        __syncthreads();
    }
    // A warp ends a row.
    for (int j = warp; j < ROWS && biases[j].valid; j += WARPS) {
        float largest = tops[j], all = 0;
        for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, tops[ROWS * w + j]);
        for (int w = 0; w < WARPS; w++)
            if (tops[ROWS * w + j] != -INF) all += totals[ROWS * w + j] * expf(tops[ROWS * w + j] - largest);
        const Ending ending(r, group, group.query(j), largest, all, lane == 0);
        for (int e = lane; e < dv; e += 32) ending.to[e] = together[j * dv + e] * ending.factor;
    }
    if (gridDim.y > 1) {
        SHARED_ARRAY(u32, count, 1);
        SHARED_ARRAY(float, weights, MOST_PARTS);
        SHARED_ARRAY(float, room, 32);
        if (!is_last(r, blockIdx.x, gridDim.y, count)) return;
        for (int j = 0; j < ROWS && biases[j].valid; j++) {
            const Query query = group.query(j);
            join_parts(r, query.token, query.head, group.batch, (int)gridDim.y, reinterpret_cast<const float *>(r.extra[1]), weights, room);
        }
    }
    if (!r.extra[6]) return;
    // What other threads have written is read.
    __syncthreads();
    const Slot &to = r.slot[DST];
    for (int j = 0; j < ROWS && biases[j].valid; j += (int)group.heads) {
        const Query query = group.query(j);
        const Target columns(r.extra[6], r.extra[7], query.token + group.batch * q.ne[1], q.ne[2] * dv);
        const u8 *row = to.data + query.token * to.nb[2] + group.batch * to.nb[3];
        round_part<i64>(columns, row, to, query.head * dv, (query.head + group.heads) * dv, (int)r.extra[8], warp, WARPS);
    }
}

// Blocks that a multiprocessor should have registers for.
#define BLOCKS (ROWS * UNITS <= 1 ? 5 : ROWS * UNITS <= 2 ? 4 : ROWS * UNITS <= 4 ? 3 : 2)
#define BOUNDS 128, BLOCKS
KERNEL(attention_few, BOUNDS) { attend(r); }
