// Normalisations: a block of threads for each row (or group of channels). F32 rows. Sums are F64, as
// ggml's, of partial sums of a few elements in F32: most cards have little arithmetic in F64.
#include "rounding.cuh"

// A thread's sum, of up to SUMMED elements at a time in F32.
struct ThreadSum {
    enum { SUMMED = 16 };
    double total = 0;
    float part = 0;
    int count = 0;
    __device__ void add(float x) {
        part += x;
        if (++count == SUMMED) close();
    }
    __device__ void close() {
        total += part;
        part = 0;
        count = 0;
    }
    __device__ double value() {
        close();
        return total;
    }
};

enum { RMS_NORM, NORM, L2_NORM };

// Slots behind those of the node itself: what is multiplied in and what added behind it, what source 0
// is the sum of, and the results of the MUL and the ADD.
enum { FACTOR = SRC1, TERM, FIRST, SECOND, SCALED, SHIFTED };

__device__ inline float &element(u8 *row, i64 i, const Slot &s) { return *reinterpret_cast<float *>(row + i * s.nb[0]); }

// An element of a row that is repeated over a longer one.
__device__ inline float repeated(u8 *row, i64 i, const Slot &s) { return element(row, i < s.ne[0] ? i : i % s.ne[0], s); }

// param: eps; extra[0]: which. Where slots FIRST and SECOND are set, source 0 is their sum, and is
// written first. FACTOR is multiplied in, and TERM added to that, each repeated over the result. Every
// result is written, that of the norm included, in the order of the nodes: a client may read it, or it
// may share its memory with the next one. Where extra[1] is set the last result is rounded for products,
// too: extra[1] to extra[3] are what extra[0] to extra[2] are for quantize_columns.
KERNEL(normalize, 512) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0], &factor = r.slot[FACTOR], &term = r.slot[TERM];
    const Slot &scaled = r.slot[SCALED], &shifted = r.slot[SHIFTED], &one = r.slot[FIRST], &other = r.slot[SECOND];
    SHARED_ARRAY(double, room, 32);
    const i64 n = from.ne[0];
    const int which = (int)r.extra[0];
    const float eps = param_f32(r, 0);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        u8 *source = at.in(from), *target = at.in(to);
        // An element is always its thread's: nobody else reads what is written here.
        if (one.data) {
            u8 *a = at.in(one), *b = at.in(other);
            for (i64 i = threadIdx.x; i < n; i += blockDim.x) element(source, i, from) = element(a, i, one) + element(b, i, other);
        }
        float mean = 0;
        if (which == NORM) {
            ThreadSum sum;
            for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum.add(element(source, i, from));
            mean = (float)(over_block(sum.value(), Sum(), room) / n);
        }
        ThreadSum mine;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            const float x = element(source, i, from) - mean;
            mine.add(x * x);
        }
        const double squares = over_block(mine.value(), Sum(), room);
        const float scale = which == L2_NORM ? 1 / fmaxf(sqrtf((float)squares), eps)
                                             : 1 / sqrtf((float)(squares / n) + eps);
        u8 *factors = factor.data ? at.repeated_in(factor) : nullptr, *product = at.in(scaled);
        u8 *terms = term.data ? at.repeated_in(term) : nullptr, *sum = at.in(shifted);
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            float value = (element(source, i, from) - mean) * scale;
            element(target, i, to) = value;
            if (!factors) continue;
            value *= repeated(factors, i, factor);
            element(product, i, scaled) = value;
            if (!terms) continue;
            // Not contracted: the product is a result of its own.
            value = __fadd_rn(value, repeated(terms, i, term));
            element(sum, i, shifted) = value;
        }
        if (r.extra[1]) {
            const Slot &last = terms ? shifted : scaled;
            const Target columns(r.extra[1], r.extra[2], row, n);
            // What other threads have written is read.
            __syncthreads();
            round_row(columns, terms ? sum : product, last, n, (int)r.extra[3], threadIdx.x / 32, blockDim.x / 32);
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
        ThreadSum mine;
        for (i64 e = threadIdx.x; e < n; e += blockDim.x) {
            const i64 i0 = e % width, i1 = e / width % from.ne[1], i2 = first + e / width / from.ne[1];
            const float x = *reinterpret_cast<const float *>(from.data + i0 * from.nb[0] + i1 * from.nb[1] + i2 * from.nb[2] + i3 * from.nb[3]) - mean;
            if (pass == 0) mine.add(x);
            else if (pass == 1) mine.add(x * x);
            else *reinterpret_cast<float *>(to.data + i0 * to.nb[0] + i1 * to.nb[1] + i2 * to.nb[2] + i3 * to.nb[3]) = x * scale;
        }
        if (pass == 0) sum = over_block(mine.value(), Sum(), room);
        if (pass == 1) squares = over_block(mine.value(), Sum(), room);
    }
}
