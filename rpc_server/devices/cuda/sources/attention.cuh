// What the kernels of FLASH_ATTN_EXT have in common: which queries a block does, how queries are
// rounded, how elements of keys and values are loaded, and how a row of the result ends.
//
// extra: positions of a part; what parts leave, for join_parts; heads of a group; the type that
// queries are rounded to. The rest is each kernel's own.
#pragma once

#include "weights.cuh"

#define WARPS 4

// ggml's type numbers of blocks that keys and values are kept in.
enum { AS_Q4_0 = 2, AS_Q4_1 = 3, AS_Q5_0 = 6, AS_Q5_1 = 7, AS_Q8_0 = 8, AS_IQ4_NL = 20 };

// -- softmax, position by position ------------------------------------------------------------------

struct Softmax {
    float softcap, scale;
    __device__ Softmax(const Record &r)
        : softcap(param_f32(r, 2)), scale(softcap != 0 ? param_f32(r, 0) / softcap : param_f32(r, 0)) {}

    // 32 more positions of a row, one a lane: makes the lane's score the weight of its position, adds
    // it to the lane's total, and says what all sums so far are to be multiplied with. `top` is the
    // largest score of the row, the same in all lanes.
    __device__ float weigh(float &score, float bias, float &top, float &total) const {
        float s = score * scale;
        if (softcap != 0) s = softcap * tanhf(s);
        s = bias == -INF ? -INF : s + bias;
        const float now = fmaxf(top, over_warp(s, Largest()));
        const float shrink = now == -INF ? 1 : expf(top - now);
        score = s == -INF ? 0 : expf(s - now);
        total = total * shrink + score;
        top = now;
        return shrink;
    }
};

// Bits that any of the warps has set.
struct Bits {
    u32 *room;
    int turn;

    // Each time the other half of the room, so that one barrier is enough.
    __device__ u32 of_block(u32 bits) {
        u32 *mine = room + WARPS * turn;
        turn = 1 - turn;
        if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = bits;
        __syncthreads();
        u32 all = 0;
        for (int w = 0; w < WARPS; w++) all |= mine[w];
        return all;
    }
};

// -- queries -------------------------------------------------------------------------------------

struct Query {
    i64 token, head;
    bool valid;
};

// What a block of threads does: some rows of a group. The queries of all tokens of heads that share
// their keys, and their values too, are the rows of a group. Blocks along x are groups, each with its
// rows one after the other; blocks along y are parts of the positions.
struct Group {
    i64 heads, first_head, batch, rows, first_row;

    __device__ Group(const Record &r, int rows_of_a_block) {
        const Slot &q = r.slot[SRC0];
        heads = r.extra[2];
        rows = heads * q.ne[1];
        const i64 blocks = quotient(rows + rows_of_a_block - 1, rows_of_a_block), groups = quotient(q.ne[2], heads);
        const i64 number = quotient(blockIdx.x, blocks);
        first_row = (blockIdx.x - number * blocks) * rows_of_a_block;
        batch = quotient(number, groups);
        first_head = (number - batch * groups) * heads;
    }
    __device__ Query query(int row) const {
        const i64 number = first_row + row, token = quotient(number, heads);
        return {token, first_head + number - token * heads, number < rows};
    }
    // The keys or values of the group.
    __device__ const u8 *kept(const Slot &q, const Slot &s) const {
        return s.data + quotient(first_head, quotient(q.ne[2], s.ne[2])) * s.nb[2] + quotient(batch, quotient(q.ne[3], s.ne[3])) * s.nb[3];
    }
    // An element of a query; zero behind its end.
    __device__ float element(const Slot &q, const Query &query, i64 e) const {
        if (!query.valid || e >= q.ne[0]) return 0;
        return *reinterpret_cast<const float *>(q.data + e * q.nb[0] + query.token * q.nb[1] + query.head * q.nb[2] + batch * q.nb[3]);
    }
};

// What a row adds to its scores.
struct Bias {
    const u8 *mask;
    float factor;
    bool valid, masked;

    __device__ void set(const Record &r, const Group &group, int row) {
        const Slot &s = r.slot[SRC3];
        const Query query = group.query(row);
        valid = query.valid;
        masked = s.data;
        mask = s.data + query.token * s.nb[1];
        if (masked) mask += query.head % s.ne[2] * s.nb[2] + group.batch % s.ne[3] * s.nb[3];
        factor = slope(query.head, r.slot[SRC0].ne[2], param_f32(r, 1));
    }
    // Minus infinity for positions that the row does not attend to.
    __device__ float at(i64 position, i64 end) const {
        if (!valid || position >= end) return -INF;
        return masked ? factor * half_to_float(*reinterpret_cast<const u16 *>(mask + 2 * position)) : 0;
    }
};

// An element of a query as ggml's CPU backend rounds it for keys; for Q8_0 a warp has 32 in a row.
__device__ inline float rounded(float value, i64 type) {
    if (type == F16) return half_to_float(float_to_half(value));
    if (type == BF16) return bfloat_to_float(float_to_bfloat(value));
    if (type != AS_Q8_0) return value;
    const float largest = over_warp(fabsf(value), Largest());
    const int code = largest == 0 ? 0 : __float2int_rn(value * (127 / largest));
    return code * half_to_float(float_to_half(largest / 127));
}

// -- keys and values -----------------------------------------------------------------------------

// A unit of a row: eight elements. Of floats they are in a row, at an address that 16 divides. Of
// blocks unit i of a run are elements 4i to 4i + 3 and 16 + 4i to 16 + 4i + 3, which share bytes.
template <int TYPE> struct Unit {
    enum {
        FLOATS = TYPE == F32 || TYPE == F16 || TYPE == BF16,
        WORDS = TYPE == F32 ? 8 : FLOATS ? 4 : 3,
        MINIMA = TYPE == AS_Q4_1 || TYPE == AS_Q5_1,
        FIVE_BITS = TYPE == AS_Q5_0 || TYPE == AS_Q5_1,
        // Bytes of a block, and of what is in front of its codes.
        SIZE = TYPE == AS_Q4_1 ? 20 : TYPE == AS_Q5_0 ? 22 : TYPE == AS_Q5_1 ? 24 : TYPE == AS_Q8_0 ? 34 : 18,
        HEAD = (MINIMA ? 4 : 2) + (FIVE_BITS ? 4 : 0),
    };
    // Of blocks: scale and minimum, codes, and more codes or the fifth bits.
    u32 words[WORDS];

    // Which element of a row is number `place` of a unit, and back.
    __device__ static int element(int unit, int place) {
        if (FLOATS) return 8 * unit + place;
        return 32 * (unit / 4) + 4 * (unit % 4) + 16 * (place / 4) + place % 4;
    }
    __device__ static int unit_of(int e) { return FLOATS ? e / 8 : e / 32 * 4 + e % 16 / 4; }
    __device__ static int place_of(int e) { return FLOATS ? e % 8 : e % 32 / 16 * 4 + e % 4; }

    // Eight zeros.
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = 0;
    }
    __device__ static u32 word(const u8 *p) { return MINIMA ? word_at_4(p) : word_at_2(p); }
    __device__ void load(const u8 *row, int unit) {
        if constexpr (FLOATS) {
            const uint4 *from = reinterpret_cast<const uint4 *>(row) + unit * (WORDS / 4);
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) {
                const uint4 four = from[i];
                words[4 * i] = four.x;
                words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z;
                words[4 * i + 3] = four.w;
            }
        } else {
            const u8 *block = row + (i64)(unit / 4) * SIZE;
            const int i = unit % 4;
            words[0] = MINIMA ? word_at_4(block) : load_u16(block);
            words[1] = word(block + HEAD + 4 * i);
            words[2] = TYPE == AS_Q8_0 ? word(block + HEAD + 16 + 4 * i) : FIVE_BITS ? word(block + HEAD - 4) >> (4 * i) : 0;
        }
    }
    __device__ void values(float (&x)[8]) const {
        if constexpr (TYPE == F32) {
#pragma unroll
            for (int e = 0; e < 8; e++) x[e] = __uint_as_float(words[e]);
        } else if constexpr (FLOATS) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[2 * i] = TYPE == F16 ? half_to_float((u16)words[i]) : __uint_as_float(words[i] << 16);
                x[2 * i + 1] = TYPE == F16 ? half_to_float((u16)(words[i] >> 16)) : __uint_as_float(words[i] & 0xffff0000u);
            }
        } else {
            const float scale = half_to_float((u16)words[0]);
            const float minimum = MINIMA ? half_to_float((u16)(words[0] >> 16)) : TYPE == AS_Q4_0 ? -8 * scale : TYPE == AS_Q5_0 ? -16 * scale : 0;
            u32 codes[2] = {words[1], words[2]};
            if (TYPE == AS_IQ4_NL) {
                const uint2 two = look_up(IQ4_WORDS, words[1]);
                codes[0] = two.x;
                codes[1] = two.y;
            } else if (TYPE != AS_Q8_0) {
                codes[0] = words[1] & 0x0f0f0f0fu;
                codes[1] = words[1] >> 4 & 0x0f0f0f0fu;
            }
            if (FIVE_BITS) {
                codes[0] |= spread_bits(words[2] & 15, 4);
                codes[1] |= spread_bits(words[2] >> 16 & 15, 4);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const u32 code = codes[e / 4] >> (8 * (e % 4)) & 255;
                x[e] = scale * (i8)code + minimum;
            }
        }
    }
};

// -- the end of a row ----------------------------------------------------------------------------

// What sums are multiplied with, by the largest score and the total of their weights. A sink is a
// position that takes its share and gives nothing.
__device__ inline float share(const Slot &sinks, i64 head, float top, float total) {
    float shrink = 1;
    if (sinks.data) {
        const float sink = *reinterpret_cast<const float *>(sinks.data + head * sinks.nb[0]);
        const float now = fmaxf(top, sink);
        shrink = top == -INF ? 0 : expf(top - now);
        total = total * shrink + (sink == -INF ? 0 : expf(sink - now));
    }
    return total == 0 ? 0 : shrink / total;
}

// Parts of the positions at most.
#define MOST_PARTS 128

// What parts have left of a row put together, by all threads of a block. `left` is where they begin;
// `weights` are MOST_PARTS and `room` 32 elements of shared memory.
__device__ inline void join_parts(const Record &r, i64 token, i64 head, i64 batch, int parts, const float *left, float *weights, float *room) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0];
    const i64 dv = to.ne[0], apart = q.ne[1] * q.ne[2] * q.ne[3] * (dv + 2);
    left += ((batch * q.ne[1] + token) * q.ne[2] + head) * (dv + 2);
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

// Where the sums of a query go, and what they are multiplied with.
struct Ending {
    float *to;
    float factor;

    // With several parts: for join_parts, the sums as they are, then the largest score and the
    // total, which the thread that is `first` writes.
    __device__ Ending(const Record &r, const Group &group, const Query &query, float top, float total, bool first) {
        const Slot &result = r.slot[DST], &q = r.slot[SRC0];
        const i64 dv = r.slot[SRC2].ne[0];
        if (gridDim.y == 1) {
            to = reinterpret_cast<float *>(result.data + query.head * result.nb[1] + query.token * result.nb[2] + group.batch * result.nb[3]);
            factor = share(r.slot[SRC4], query.head, top, total);
            return;
        }
        const i64 row = ((blockIdx.y * q.ne[3] + group.batch) * q.ne[1] + query.token) * q.ne[2] + query.head;
        to = reinterpret_cast<float *>(r.extra[1]) + row * (dv + 2);
        factor = 1;
        if (first) {
            to[dv] = top;
            to[dv + 1] = total;
        }
    }
};
