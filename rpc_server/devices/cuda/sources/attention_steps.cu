// What goes before FLASH_ATTN_EXT and behind it, where it is needed.
#include "attention.cuh"

// Parts put together. extra: how many there are, at most MOST_PARTS, and what they left. A block of
// threads for each row of the result.
KERNEL(attention_join, 128) {
    const Slot &q = r.slot[SRC0];
    SHARED_ARRAY(float, weights, MOST_PARTS);
    SHARED_ARRAY(float, room, 32);
    FOR_ROWS(row, q.ne[1] * q.ne[2] * q.ne[3]) {
        // In the order of the result: heads, tokens, batches.
        const Row at(q.ne[2], q.ne[1], row);
        join_parts(r, at.i[2], at.i[1], at.i[3], (int)r.extra[0], reinterpret_cast<const float *>(r.extra[1]), weights, room);
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
