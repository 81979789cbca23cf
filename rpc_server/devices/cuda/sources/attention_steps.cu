// What goes before FLASH_ATTN_EXT and behind it, where it is needed.
#include "attention.cuh"

#define MOST_PARTS 128

// Parts put together. extra: how many there are, at most MOST_PARTS, and what they left. A block of
// threads for each row of the result.
KERNEL(attention_join, 128) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0];
    SHARED_ARRAY(float, weights, MOST_PARTS);
    SHARED_ARRAY(float, room, 32);
    const int parts = (int)r.extra[0];
    const i64 rows = q.ne[1] * q.ne[2] * q.ne[3], dv = to.ne[0], apart = rows * (dv + 2);
    FOR_ROWS(row, rows) {
        const i64 place = quotient(row, q.ne[2]), head = row - place * q.ne[2];
        const i64 batch = quotient(place, q.ne[1]), token = place - batch * q.ne[1];
        const float *left = reinterpret_cast<const float *>(r.extra[1]) + row * (dv + 2);
        float top = -INF, total = 0;
        for (int p = threadIdx.x; p < parts; p += blockDim.x) top = fmaxf(top, left[p * apart + dv]);
        top = over_block(top, Largest(), room);
        for (int p = threadIdx.x; p < parts; p += blockDim.x) {
            const float mine = left[p * apart + dv], weight = mine == -INF ? 0 : expf(mine - top);
            weights[p] = weight;
            total += left[p * apart + dv + 1] * weight;
        }
        total = over_block(total, Sum(), room);
        __syncthreads();
        const float factor = share(r.slot[SRC4], head, top, total);
        float *target = reinterpret_cast<float *>(to.data + head * to.nb[1] + token * to.nb[2] + batch * to.nb[3]);
        for (i64 e = threadIdx.x; e < dv; e += blockDim.x) {
            float sum = 0;
#pragma unroll 4
            for (int p = 0; p < parts; p++) sum += left[p * apart + e] * weights[p];
            target[e] = sum * factor;
        }
        __syncthreads();
    }
}

// Queries rounded as ggml's CPU backend rounds them for keys in blocks of 256: by Q8_K, whose scale
// maps the element of the largest magnitude, the first of equals, to -127. slot 0: F32 for slot 1.
KERNEL(round_queries, 256) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0];
    SHARED_ARRAY(u64, room, 32);
    SHARED_ARRAY(float, largest, 1);
    FOR_ROWS(row, q.ne[1] * q.ne[2] * q.ne[3]) {
        const Row at(q, row);
        for (i64 e = threadIdx.x; e < q.ne[0]; e += 256) {
            const float x = *reinterpret_cast<const float *>(at.in(q) + e * q.nb[0]);
            const u32 magnitude = x == x ? __float_as_uint(fabsf(x)) : 0;
            const u64 mine = (u64)magnitude << 32 | (255 - threadIdx.x), best = over_block(mine, Largest(), room);
            if (mine == best) largest[0] = x;
            __syncthreads();
            const float inverse = best >> 32 ? -127 / largest[0] : 0, scale = inverse == 0 ? 0 : 1 / inverse;
            *reinterpret_cast<float *>(at.in(to) + e * to.nb[0]) = scale * min(__float2int_rn(inverse * x), 127);
            __syncthreads();
        }
    }
}
