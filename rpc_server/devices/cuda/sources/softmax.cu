// SOFT_MAX along rows of F32, with scale, mask, slopes of ALiBi and sinks.
#include "kernel.cuh"

// slot 2: mask or empty, F32 or F16; slot 3: sinks, or empty. A block of threads for each row.
KERNEL(soft_max, 512) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0], &mask = r.slot[SRC1], &sinks = r.slot[SRC2];
    SHARED_ARRAY(float, room, 32);
    SHARED_ARRAY(double, sums, 32);
    const i64 n = from.ne[0];
    const float scale = param_f32(r, 0), max_bias = param_f32(r, 1);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        u8 *target = at.in(to);
        const u8 *masked = nullptr;
        if (mask.data)
            masked = mask.data + at.i[1] * mask.nb[1] + at.i[2] % mask.ne[2] * mask.nb[2] + at.i[3] % mask.ne[3] * mask.nb[3];
        const float factor = slope(at.i[2], from.ne[2], max_bias);
        float top = -INF;
        if (sinks.data) top = *reinterpret_cast<const float *>(sinks.data + at.i[2] * sinks.nb[0]);
        const float sink = top;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            float score = *reinterpret_cast<const float *>(source + i * from.nb[0]) * scale;
            if (masked) score += factor * load_f32(masked + i * mask.nb[0], mask.type);
            top = fmaxf(top, score);
        }
        top = over_block(top, Largest(), room);
        double total = 0;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            float score = *reinterpret_cast<const float *>(source + i * from.nb[0]) * scale;
            if (masked) score += factor * load_f32(masked + i * mask.nb[0], mask.type);
            const float weight = expf(score - top);
            // In place or not: each element is read and written by one thread.
            *reinterpret_cast<float *>(target + i * to.nb[0]) = weight;
            total += weight;
        }
        total = over_block(total, Sum(), sums);
        if (sinks.data) total += expf(sink - top);
        const float inverse = (float)(1 / total);
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) *reinterpret_cast<float *>(target + i * to.nb[0]) *= inverse;
    }
}
