// Gradients of ops, losses, and the steps of optimizers.
#include "place.cuh"

// Source 0 are the result's gradients, source 1 what SILU was of. extra: elements.
KERNEL(silu_back, 256) {
    const Slot &to = r.slot[DST], &gradient = r.slot[SRC0], &from = r.slot[SRC1];
    FOR_PLACES(p, to, r.extra[0]) {
        const float x = load_f32(at(from, p), from.type), over = 1 + expf(-x);
        // Divided, not times 1 / over: where that is below the normal numbers a card takes it for 0.
        const float part = load_f32(at(gradient, p), gradient.type) / over;
        store_f32(at(to, p), to.type, part * (1 + x * (1 - 1 / over)));
    }
}

// The sum of all copies of an element. extra: elements.
KERNEL(repeat_back, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        float sum = 0;
        for (i64 i3 = p.i[3]; i3 < from.ne[3]; i3 += to.ne[3])
            for (i64 i2 = p.i[2]; i2 < from.ne[2]; i2 += to.ne[2])
                for (i64 i1 = p.i[1]; i1 < from.ne[1]; i1 += to.ne[1])
                    for (i64 i0 = p.i[0]; i0 < from.ne[0]; i0 += to.ne[0]) sum += f32(at(from, i0, i1, i2, i3));
        f32(at(to, p)) = sum;
    }
}

// The sum of the rows of source 0 that source 1 says an element is of. extra: elements.
KERNEL(get_rows_back, 256) {
    const Slot &to = r.slot[DST], &gradient = r.slot[SRC0], &ids = r.slot[SRC1];
    FOR_PLACES(p, to, r.extra[0]) {
        float sum = 0;
        for (i64 row = 0; row < ids.ne[0]; row++) {
            const i64 id = load_index(at(ids, row), ids.type);
            if (is_index(r, id, to.ne[1]) && id == p.i[1]) sum += load(gradient, p.i[0], row);
        }
        f32(at(to, p)) = sum;
    }
}

// (M, K, ...) and (N, K, ...) to (M, N, ...); source 0 repeats over dimensions 2 and 3. extra: elements.
KERNEL(out_prod, 256) {
    const Slot &to = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1];
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 a2 = p.i[2] / (to.ne[2] / a.ne[2]), a3 = p.i[3] / (to.ne[3] / a.ne[3]);
        float sum = 0;
        for (i64 k = 0; k < a.ne[1]; k++) sum += load(a, p.i[0], k, a2, a3) * f32(at(b, p.i[1], k, p.i[2], p.i[3]));
        f32(at(to, p)) = sum;
    }
}

// -- gradients and losses of rows: a block of threads each -----------------------------------------

#define FOR_BLOCK(i, n) for (i64 i = threadIdx.x; i < (n); i += blockDim.x)

// Gradients and what was normalised; param: eps. Roundings are ggml's: of a row of one element
// nothing else is left.
KERNEL(rms_norm_back, 256) {
    const Slot &to = r.slot[DST], &gradients = r.slot[SRC0], &xs = r.slot[SRC1];
    SHARED_ARRAY(double, room, 32);
    const float eps = param_f32(r, 0), n = (float)to.ne[0];
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row place(to, row);
        u8 *target = place.in(to), *gradient = place.in(gradients), *x = place.in(xs);
        double squares = 0, products = 0;
        FOR_BLOCK(i, to.ne[0]) {
            const float value = f32(x + i * xs.nb[0]);
            squares += (double)__fmul_rn(value, value);
            products += (double)__fmul_rn(value, f32(gradient + i * gradients.nb[0]));
        }
        const float power = (float)over_block(squares, Sum(), room), along = -(float)over_block(products, Sum(), room) / fmaf(eps, n, power);
        const float scale = 1 / sqrtf(power / n + eps);
        FOR_BLOCK(i, to.ne[0])
            f32(target + i * to.nb[0]) = fmaf(f32(x + i * xs.nb[0]), along, f32(gradient + i * gradients.nb[0])) * scale;
    }
}

// Gradients and SOFT_MAX's result; param: scale.
KERNEL(soft_max_back, 256) {
    const Slot &to = r.slot[DST], &gradients = r.slot[SRC0], &results = r.slot[SRC1];
    SHARED_ARRAY(double, room, 32);
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row place(to, row);
        u8 *target = place.in(to), *gradient = place.in(gradients), *y = place.in(results);
        double sum = 0;
        FOR_BLOCK(i, to.ne[0]) sum += (double)__fmul_rn(f32(gradient + 4 * i), f32(y + 4 * i));
        const float along = (float)over_block(sum, Sum(), room);
        FOR_BLOCK(i, to.ne[0]) f32(target + 4 * i) = param_f32(r, 0) * (f32(gradient + 4 * i) - along) * f32(y + 4 * i);
    }
}

// The largest of a row, and the sum of the exponentials of what its elements are below it.
__device__ inline double exponentials(const Slot &logits, const Row &place, float &top, float *values, double *room) {
    u8 *x = place.in(logits);
    top = -INF;
    FOR_BLOCK(i, logits.ne[0]) top = fmaxf(top, f32(x + i * logits.nb[0]));
    top = over_block(top, Largest(), values);
    double sum = 0;
    FOR_BLOCK(i, logits.ne[0]) sum += expf(f32(x + i * logits.nb[0]) - top);
    return over_block(sum, Sum(), room);
}

// Logits and labels; the loss of each row goes to extra[0].
KERNEL(cross_entropy_rows, 256) {
    const Slot &logits = r.slot[SRC0], &labels = r.slot[SRC1];
    double *losses = reinterpret_cast<double *>(r.extra[0]);
    SHARED_ARRAY(double, room, 32);
    SHARED_ARRAY(float, values, 32);
    FOR_ROWS(row, logits.ne[1] * logits.ne[2] * logits.ne[3]) {
        const Row place(logits, row);
        float top;
        const float total = (float)log(exponentials(logits, place, top, values, room));
        u8 *x = place.in(logits), *label = place.in(labels);
        double loss = 0;
        FOR_BLOCK(i, logits.ne[0]) loss += (f32(x + i * logits.nb[0]) - top - total) * f32(label + i * labels.nb[0]);
        loss = over_block(loss, Sum(), room);
        if (threadIdx.x == 0) losses[row] = loss;
    }
}

// Their mean, extra[1] of them: one block.
KERNEL(cross_entropy_mean, 256) {
    const double *losses = reinterpret_cast<const double *>(r.extra[0]);
    SHARED_ARRAY(double, room, 32);
    double sum = 0;
    FOR_BLOCK(i, r.extra[1]) sum += losses[i];
    sum = over_block(sum, Sum(), room);
    if (threadIdx.x == 0) f32(r.slot[DST].data) = (float)(-sum / (double)r.extra[1]);
}

// The loss's gradient, logits, labels.
KERNEL(cross_entropy_back, 256) {
    const Slot &to = r.slot[DST], &logits = r.slot[SRC1], &labels = r.slot[SRC2];
    SHARED_ARRAY(double, room, 32);
    SHARED_ARRAY(float, values, 32);
    const i64 rows = to.ne[1] * to.ne[2] * to.ne[3];
    const float share = f32(r.slot[SRC0].data) / (float)rows;
    FOR_ROWS(row, rows) {
        const Row place(to, row);
        float top;
        const float inverse = (float)(1 / exponentials(logits, place, top, values, room));
        u8 *target = place.in(to), *x = place.in(logits), *label = place.in(labels);
        FOR_BLOCK(i, to.ne[0])
            f32(target + i * to.nb[0]) = (expf(f32(x + i * logits.nb[0]) - top) * inverse - f32(label + i * labels.nb[0])) * share;
    }
}

// -- optimizers: weights and states are changed in place -------------------------------------------

// Weights, gradients, means, mean squares; settings: alpha, beta1, beta2, eps, weight decay,
// corrections of both means' bias. extra: elements.
KERNEL(adamw, 256) {
    const Slot &to = r.slot[DST], &gradients = r.slot[SRC1], &means = r.slot[SRC2], &mean_squares = r.slot[SRC3];
    const float *s = reinterpret_cast<const float *>(r.slot[SRC4].data);
    FOR_PLACES(p, to, r.extra[0]) {
        const float gradient = f32(at(gradients, p));
        const float mean = f32(at(means, p)) * s[1] + gradient * (1 - s[1]);
        const float square = f32(at(mean_squares, p)) * s[2] + gradient * gradient * (1 - s[2]);
        f32(at(means, p)) = mean;
        f32(at(mean_squares, p)) = square;
        float &weight = f32(at(to, p));
        weight = weight * (1 - s[0] * s[4]) - s[0] * (mean * s[5]) / (sqrtf(square * s[6]) + s[3]);
    }
}

// Weights, gradients; settings: alpha, weight decay. extra: elements.
KERNEL(sgd, 256) {
    const Slot &to = r.slot[DST], &gradients = r.slot[SRC1];
    const float *s = reinterpret_cast<const float *>(r.slot[SRC2].data);
    FOR_PLACES(p, to, r.extra[0]) {
        float &weight = f32(at(to, p));
        weight = weight * (1 - s[0] * s[1]) - s[0] * f32(at(gradients, p));
    }
}
