// Normalisations: a block of threads for each row (or group of channels). F32 rows; sums in F64, as ggml.
#include "kernel.cuh"

enum { RMS_NORM, NORM, L2_NORM };

// param: eps; extra[0]: which. With extra[1], source 1 is multiplied in, and with extra[2] source 2
// added, each repeated over the result: RMS_NORM and the MUL and ADD behind it, at once.
KERNEL(normalize, 512) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0], &factor = r.slot[SRC1], &term = r.slot[SRC2];
    SHARED_ARRAY(double, room, 32);
    const i64 n = from.ne[0];
    const int which = (int)r.extra[0];
    const float eps = param_f32(r, 0);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        u8 *target = at.in(to);
        float mean = 0;
        if (which == NORM) {
            double sum = 0;
            for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += *reinterpret_cast<const float *>(source + i * from.nb[0]);
            mean = (float)(over_block(sum, Sum(), room) / n);
        }
        double squares = 0;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            const float x = *reinterpret_cast<const float *>(source + i * from.nb[0]) - mean;
            squares += (double)(x * x);
        }
        squares = over_block(squares, Sum(), room);
        const float scale = which == L2_NORM ? 1 / fmaxf(sqrtf((float)squares), eps)
                                             : 1 / sqrtf((float)(squares / n) + eps);
        const u8 *factors = r.extra[1] ? at.repeated_in(factor) : nullptr;
        const u8 *terms = r.extra[2] ? at.repeated_in(term) : nullptr;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            float value = (*reinterpret_cast<const float *>(source + i * from.nb[0]) - mean) * scale;
            if (factors) value *= *reinterpret_cast<const float *>(factors + i % factor.ne[0] * factor.nb[0]);
            if (terms) value += *reinterpret_cast<const float *>(terms + i % term.ne[0] * term.nb[0]);
            *reinterpret_cast<float *>(target + i * to.nb[0]) = value;
        }
    }
}

// extra[0]: channels (dimension 2) of a group. A block of threads for each group of each batch.
KERNEL(group_norm, 512) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(double, room, 32);
    const i64 step = r.extra[0], first = blockIdx.x * step, i3 = blockIdx.y;
    const i64 channels = min(step, from.ne[2] - first), width = from.ne[0], n = width * from.ne[1] * channels;
    const float eps = param_f32(r, 1);
    double sum = 0, squares = 0;
    for (int pass = 0; pass < 3; pass++) {
        const float mean = pass ? (float)(sum / n) : 0;
        const float scale = pass == 2 ? 1 / sqrtf((float)(squares / n) + eps) : 0;
        double total = 0;
        for (i64 e = threadIdx.x; e < n; e += blockDim.x) {
            const i64 i0 = e % width, i1 = e / width % from.ne[1], i2 = first + e / width / from.ne[1];
            const float x = *reinterpret_cast<const float *>(from.data + i0 * from.nb[0] + i1 * from.nb[1] + i2 * from.nb[2] + i3 * from.nb[3]) - mean;
            if (pass == 0) total += x;
            else if (pass == 1) total += (double)(x * x);
            else *reinterpret_cast<float *>(to.data + i0 * to.nb[0] + i1 * to.nb[1] + i2 * to.nb[2] + i3 * to.nb[3]) = x * scale;
        }
        if (pass == 0) sum = over_block(total, Sum(), room);
        if (pass == 1) squares = over_block(total, Sum(), room);
    }
}
