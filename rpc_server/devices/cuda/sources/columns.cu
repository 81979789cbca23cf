// Columns of products in the form that the products read them.
#include "kernel.cuh"

// Rows of codes: K signed bytes, then K / 32 scales, then for each 16 elements the sum of their codes
// times the scale. Rounded as ggml's CPU backend rounds for the type of the weights, so that a model
// says the same here as it does there.

// The sum over 16 lanes, each half of a warp for itself.
__device__ inline float over_half_warp(float value) {
    for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

// As Q8_0, or (extra[2]) Q8_1, whose sums are made with the scale before it is rounded.
// slot 1: rows of F32, F16 or BF16; extra: where the rows of codes go, and their stride.
// A warp does 32 elements: one lane each.
KERNEL(quantize_columns, 128) {
    const Slot &from = r.slot[SRC0];
    u8 *to = reinterpret_cast<u8 *>(r.extra[0]);
    const i64 stride = r.extra[1], k = from.ne[0];
    const int lane = threadIdx.x % 32;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const u8 *source = Row(from, row).in(from);
        u8 *target = to + row * stride;
        float *scales = reinterpret_cast<float *>(target + k), *sums = scales + k / 32;
        const i64 step = (i64)gridDim.y * (blockDim.x / 32);
        for (i64 run = (i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; run < k / 32; run += step) {
            const float x = load_f32(source + (32 * run + lane) * from.nb[0], from.type);
            const float largest = over_warp(fabsf(x), Largest());
            const int code = largest == 0 ? 0 : __float2int_rn(x * (127 / largest));
            const float exact = largest / 127, scale = half_to_float(float_to_half(exact));
            target[32 * run + lane] = (u8)code;
            float sum = over_half_warp((float)code) * scale;
            if (r.extra[2]) {
                // One sum of all, rounded to half precision too; weights have one minimum for both halves.
                const float all = half_to_float(float_to_half(over_warp((float)code, Sum()) * exact));
                sum = lane < 16 ? all : 0;
            }
            if (lane == 0) scales[run] = scale;
            if (lane % 16 == 0) sums[2 * run + lane / 16] = sum;
        }
    }
}

// As Q8_K: 256 elements have one scale, which maps the largest to -127. A warp does them all.
KERNEL(quantize_columns_k, 128) {
    const Slot &from = r.slot[SRC0];
    u8 *to = reinterpret_cast<u8 *>(r.extra[0]);
    const i64 stride = r.extra[1], k = from.ne[0];
    const int lane = threadIdx.x % 32;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const u8 *source = Row(from, row).in(from);
        u8 *target = to + row * stride;
        float *scales = reinterpret_cast<float *>(target + k), *sums = scales + k / 32;
        const i64 step = (i64)gridDim.y * (blockDim.x / 32);
        for (i64 unit = (i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; unit < k / 256; unit += step) {
            float x[8];
            // The largest magnitude above the place it has, turned so that the first of equals wins.
            u64 best = 0;
            for (int j = 0; j < 8; j++) {
                const int place = 32 * j + lane;
                x[j] = load_f32(source + (256 * unit + place) * from.nb[0], from.type);
                const u32 magnitude = x[j] == x[j] ? __float_as_uint(fabsf(x[j])) : 0;
                const u64 key = (u64)magnitude << 32 | (u32)(255 - place);
                best = key > best ? key : best;
            }
            best = over_warp(best, Largest());
            const int place = 255 - (int)(u32)best;
            float largest = 0;
            for (int j = 0; j < 8; j++) {
                const float other = __shfl_sync(ALL_LANES, x[j], place % 32);
                if (j == place / 32) largest = other;
            }
            const bool zero = (best >> 32) == 0;
            const float inverse = zero ? 0 : -127 / largest, scale = zero ? 0 : 1 / inverse;
            for (int j = 0; j < 8; j++) {
                const int code = min(__float2int_rn(inverse * x[j]), 127);
                target[256 * unit + 32 * j + lane] = (u8)code;
                const float sum = over_half_warp((float)code);
                if (lane == 0) scales[8 * unit + j] = scale;
                if (lane % 16 == 0) sums[2 * (8 * unit + j) + lane / 16] = scale * sum;
            }
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

// Pairs of expert and token sorted by expert, for multiply_grouped. slot 1: weights, slot 3: ids
// (used, tokens). extra[0]: where the number of groups goes, and three words for each: its expert,
// its first pair, how many; extra[1]: where the pairs go, as used + experts of a token * token.
// One block; dynamic shared memory has a word for each expert.
KERNEL(route_columns, 256) {
    const Slot &w = r.slot[SRC0], &ids = r.slot[SRC2];
    DYNAMIC_SHARED(i32, next);
    i32 *routing = reinterpret_cast<i32 *>(r.extra[0]), *pairs = reinterpret_cast<i32 *>(r.extra[1]);
    const i32 experts = (i32)w.ne[2], used = (i32)ids.ne[0], total = used * (i32)ids.ne[1];
    for (i32 e = threadIdx.x; e < experts; e += blockDim.x) next[e] = 0;
    __syncthreads();
    for (i32 pair = threadIdx.x; pair < total; pair += blockDim.x) {
        const i32 e = *reinterpret_cast<const i32 *>(ids.data + pair % used * ids.nb[0] + pair / used * ids.nb[1]);
        if (e < 0 || e >= experts) fail(r, INDEX_OUT_OF_RANGE);
        else atomicAdd(next + e, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        i32 first = 0, groups = 0;
        for (i32 e = 0; e < experts; e++) {
            const i32 count = next[e];
            for (i32 done = 0; done < count; done += 8) {
                i32 *group = routing + 1 + 3 * groups++;
                group[0] = e;
                group[1] = first + done;
                group[2] = min(8, count - done);
            }
            next[e] = first;
            first += count;
        }
        routing[0] = groups;
    }
    __syncthreads();
    for (i32 pair = threadIdx.x; pair < total; pair += blockDim.x) {
        const i32 e = *reinterpret_cast<const i32 *>(ids.data + pair % used * ids.nb[0] + pair / used * ids.nb[1]);
        if (e >= 0 && e < experts) pairs[atomicAdd(next + e, 1)] = pair;
    }
}
