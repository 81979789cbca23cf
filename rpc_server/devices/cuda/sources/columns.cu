// Columns of products in the form that the products read them, and which experts multiply which.
#include "rounding.cuh"

// slot 1: rows of F32, F16 or BF16; extra: where the rows of codes go, their stride, and what they are
// rounded as. Warps along y share a row.
KERNEL(quantize_columns, 128) {
    const Slot &from = r.slot[SRC0];
    const i64 k = from.ne[0], of_block = blockDim.x / 32;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Target target(r.extra[0], r.extra[1], row, k);
        const i64 warp = blockIdx.y * of_block + threadIdx.x / 32;
        round_row(target, Row(from, row).in(from), from, k, (int)r.extra[2], warp, gridDim.y * of_block);
    }
}

enum { Q8_0_BLOCKS = 8, Q8_K_BLOCKS = 15 };

// Columns that a client has rounded itself, as they are. slot 1: rows of Q8_0, Q8_1 or Q8_K; extra as
// above. A warp does a run of 32.
KERNEL(take_columns, 128) {
    const Slot &from = r.slot[SRC0];
    const i64 k = from.ne[0];
    const int lane = threadIdx.x % 32;
    const bool large = from.type == Q8_K_BLOCKS;
    const int size = (int)from.nb[0], per_block = large ? 8 : 1;
    // Codes come behind the scale; Q8_1 has a sum between them.
    const int head = from.type == Q8_0_BLOCKS ? 2 : 4;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const u8 *source = Row(from, row).in(from);
        const Target target(r.extra[0], r.extra[1], row, k);
        const i64 step = (i64)gridDim.y * (blockDim.x / 32);
        for (i64 run = (i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; run < k / 32; run += step) {
            const u8 *block = source + run / per_block * size;
            const u8 code = block[head + 32 * (run % per_block) + lane];
            const float scale = load_f32(block, large ? F32 : F16);
            target.codes[32 * run + lane] = code;
            target.write_factors(run, scale, scale * over_half_warp((float)(i8)code));
        }
    }
}

// slot 1: rows of any float type; extra: where they go as F32, their stride.
KERNEL(widen_columns, 256) {
    const Slot &from = r.slot[SRC0];
    u8 *to = reinterpret_cast<u8 *>(r.extra[0]);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const u8 *source = Row(from, row).in(from);
        float *target = reinterpret_cast<float *>(to + row * r.extra[1]);
        FOR_COLUMNS(i, from.ne[0]) target[i] = load_f32(source + i * from.nb[0], from.type);
    }
}

// The largest magnitude of a row of floats, to all threads of the block; `room` is shared memory.
__device__ inline float largest_of_row(const u8 *source, const Slot &from, float *room) {
    float top = 0;
    for (i64 i = threadIdx.x; i < from.ne[0]; i += blockDim.x)
        top = fmaxf(top, fabsf(load_f32(source + i * from.nb[0], from.type)));
    return over_block(top, Largest(), room);
}

// slot 1: rows of any float type; extra: where the largest magnitude of each goes. A block does a row.
KERNEL(largest_of_rows, 256) {
    SHARED_ARRAY(float, room, 32);
    const Slot &from = r.slot[SRC0];
    float *to = reinterpret_cast<float *>(r.extra[0]);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const float top = largest_of_row(Row(from, row).in(from), from, room);
        if (threadIdx.x == 0) to[row] = top;
    }
}

// What half precision holds at most.
#define LARGEST_HALF 65504.0f

// slot 1: rows of any float type; extra: where they go, their stride, and as what: F16 or BF16, see
// columns.cuh. Half precision holds neither what is large nor what is small: elements of a row are
// multiplied with the power of two that takes the largest to between 2^14 and 2^15. A block does a row.
KERNEL(shorten_columns, 256) {
    SHARED_ARRAY(float, room, 32);
    const Slot &from = r.slot[SRC0];
    const bool half = r.extra[2] == F16;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const u8 *source = Row(from, row).in(from);
        u8 *column = reinterpret_cast<u8 *>(r.extra[0]) + row * r.extra[1];
        // The largest's exponent as floats have it: 127 + 14 changes nothing. So it is with an infinity,
        // and no power of two is beyond what a float holds.
        int exponent = 141;
        if (half) exponent = (int)(__float_as_uint(largest_of_row(source, from, room)) >> 23);
        exponent = exponent == 255 ? 141 : max(exponent, 15);
        const float up = __uint_as_float((u32)(268 - exponent) << 23);
        u16 *target = reinterpret_cast<u16 *>(column);
        for (i64 i = threadIdx.x; i < from.ne[0]; i += blockDim.x) {
            const float x = load_f32(source + i * from.nb[0], from.type);
            target[i] = half ? float_to_half(__fmul_rn(x, up)) : float_to_bfloat(x);
        }
        if (threadIdx.x == 0) factor_of_floats(column, from.ne[0]) = __uint_as_float((u32)(exponent - 14) << 23);
    }
}

// slot 0: where slot 1, rows of any float type, go as F16; extra: what largest_of_rows left, and two
// words, for what their products are to be multiplied with and for 0. Where all fits it is 1 and each
// element is as it is; otherwise all are divided by the same power of two.
KERNEL(halve_columns, 256) {
    SHARED_ARRAY(float, room, 32);
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 rows = from.ne[1] * from.ne[2] * from.ne[3];
    const float *tops = reinterpret_cast<const float *>(r.extra[0]);
    float top = 0;
    for (i64 row = threadIdx.x; row < rows; row += blockDim.x) top = fmaxf(top, tops[row]);
    top = over_block(top, Largest(), room);
    // The exponent of what is too large, less that of 2^15; an infinity stays one.
    const int too_many = LARGEST_HALF < top && top < INF ? (int)(__float_as_uint(top) >> 23) - 127 - 14 : 0;
    const float down = __uint_as_float((u32)(127 - too_many) << 23);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        float *factors = reinterpret_cast<float *>(r.extra[1]);
        factors[0] = __uint_as_float((u32)(127 + too_many) << 23);
        factors[1] = 0;
    }
    FOR_ROWS(row, rows) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        u16 *target = reinterpret_cast<u16 *>(at.in(to));
        FOR_COLUMNS(i, from.ne[0])
            target[i] = float_to_half(__fmul_rn(load_f32(source + i * from.nb[0], from.type), down));
    }
}

// Pairs of expert and token sorted by expert, see grouped_job. slot 1: weights, slot 3: ids (used,
// tokens). extra[0]: where the number of groups goes, and three words for each: its expert, its first
// pair, how many; extra[1]: where the pairs go, as used + experts of a token * token; extra[2]: how
// many pairs a group has at most; extra[3]: room for the expert of each pair, as it was counted.
// One block; dynamic shared memory has a word for each expert.
KERNEL(route_columns, 256) {
    const Slot &w = r.slot[SRC0], &ids = r.slot[SRC2];
    DYNAMIC_SHARED(i32, next);
    i32 *routing = reinterpret_cast<i32 *>(r.extra[0]), *pairs = reinterpret_cast<i32 *>(r.extra[1]);
    const i32 experts = (i32)w.ne[2], used = (i32)ids.ne[0], total = used * (i32)ids.ne[1];
    const i32 most = (i32)r.extra[2];
    i32 *expert_of = reinterpret_cast<i32 *>(r.extra[3]);
    for (i32 e = threadIdx.x; e < experts; e += blockDim.x) next[e] = 0;
    __syncthreads();
    for (i32 pair = threadIdx.x; pair < total; pair += blockDim.x) {
        const i64 e = load_index(ids.data + pair % used * ids.nb[0] + pair / used * ids.nb[1], ids.type);
        const bool valid = is_index(r, e, experts);
        expert_of[pair] = valid ? (i32)e : -1;
        if (valid) atomicAdd(next + e, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        i32 first = 0, groups = 0;
        for (i32 e = 0; e < experts; e++) {
            const i32 count = next[e];
            for (i32 done = 0; done < count; done += most) {
                i32 *group = routing + 1 + 3 * groups++;
                group[0] = e;
                group[1] = first + done;
                group[2] = min(most, count - done);
            }
            next[e] = first;
            first += count;
        }
        routing[0] = groups;
    }
    __syncthreads();
    for (i32 pair = threadIdx.x; pair < total; pair += blockDim.x) {
        const i32 e = expert_of[pair];
        if (e >= 0) pairs[atomicAdd(next + e, 1)] = pair;
    }
}
