// FLASH_ATTN_BACK: q (D, N, heads, batches), k (D, M, kv heads, batches), v (M, D, ...), the result's
// gradient, shaped as q. param[0]: causal; the N tokens are the last of the M positions.
//
// extra[0]: weights, and extra[1]: the scores' gradients, rows of M in the order of q's rows.
#include "place.cuh"

#define FOR_BLOCK(i, n) for (i64 i = threadIdx.x; i < (n); i += blockDim.x)

// A block of threads does a row of q.
KERNEL(attention_scores_back, 128) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2], &gradient = r.slot[SRC3];
    SHARED_ARRAY(double, sums, 32);
    SHARED_ARRAY(float, room, 32);
    const i64 positions = k.ne[1];
    const float scale = 1 / sqrtf((float)k.ne[0]);
    FOR_ROWS(row, q.ne[1] * q.ne[2] * q.ne[3]) {
        const Row p(q, row);
        const i64 kv = p.i[2] % k.ne[2], last = r.param[0] ? positions - q.ne[1] + p.i[1] : positions - 1;
        float *weights = reinterpret_cast<float *>(r.extra[0]) + row * positions;
        float *differences = reinterpret_cast<float *>(r.extra[1]) + row * positions;
        float top = -INF;
        FOR_BLOCK(m, positions) {
            float score = 0, difference = 0;
            for (i64 d = 0; d < k.ne[0]; d++) {
                score += f32(at(q, d, p.i[1], p.i[2], p.i[3])) * f32(at(k, d, m, kv, p.i[3]));
                difference += f32(at(gradient, d, p.i[1], p.i[2], p.i[3])) * f32(at(v, m, d, kv, p.i[3]));
            }
            weights[m] = m <= last ? score * scale : -INF;
            differences[m] = difference;
            top = fmaxf(top, weights[m]);
        }
        top = over_block(top, Largest(), room);
        double total = 0;
        FOR_BLOCK(m, positions) {
            weights[m] = expf(weights[m] - top);
            total += weights[m];
        }
        const float inverse = (float)(1 / over_block(total, Sum(), sums));
        double along = 0;
        FOR_BLOCK(m, positions) {
            weights[m] *= inverse;
            along += weights[m] * differences[m];
        }
        const float mean = (float)over_block(along, Sum(), sums);
        FOR_BLOCK(m, positions) differences[m] = (differences[m] - mean) * weights[m] * scale;
    }
}

// The gradients of q, k and v one after the other; those of k and v start at extra[3] and extra[4].
// extra[2]: elements of the result. What lies between is 0.
KERNEL(attention_gradients, 128) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2], &gradient = r.slot[SRC3];
    const float *weights = reinterpret_cast<const float *>(r.extra[0]);
    const float *differences = reinterpret_cast<const float *>(r.extra[1]);
    float *to = reinterpret_cast<float *>(r.slot[DST].data);
    const i64 positions = k.ne[1];
    FOR_ELEMENTS(e, r.extra[2]) {
        float sum = 0;
        if (e < r.extra[3]) {
            if (e < q.ne[0] * q.ne[1] * q.ne[2] * q.ne[3]) {
                const Place p(q, e);
                const i64 row = e / q.ne[0];
                for (i64 m = 0; m < positions; m++)
                    sum += differences[row * positions + m] * f32(at(k, p.i[0], m, p.i[2] % k.ne[2], p.i[3]));
            }
        } else {
            const bool of_values = e >= r.extra[4];
            const Slot &s = of_values ? v : k, &other = of_values ? gradient : q;
            const float *factors = of_values ? weights : differences;
            const i64 number = e - r.extra[of_values ? 4 : 3];
            if (number < s.ne[0] * s.ne[1] * s.ne[2] * s.ne[3]) {
                const Place p(s, number);
                const i64 d = p.i[of_values ? 1 : 0], m = p.i[of_values ? 0 : 1];
                for (i64 head = p.i[2]; head < q.ne[2]; head += k.ne[2])
                    for (i64 n = 0; n < q.ne[1]; n++) {
                        const i64 row = (p.i[3] * q.ne[2] + head) * q.ne[1] + n;
                        sum += factors[row * positions + m] * f32(at(other, d, n, head, p.i[3]));
                    }
            }
        }
        to[e] = sum;
    }
}
