// Convolutions, whole or as columns, their gradients, and pools: a thread for each element of the
// result. Windows have up to three dimensions, the innermost first; those that an op lacks have size 1.
//
// extra[0]: elements. What else geometry() reads, and bytes between elements:
// extra[1 .. 3]: elements of a window, [4 .. 6]: its places, [7 .. 9]: samples,
// [10]: channels that are summed over, [11 .. 15]: the input's strides: samples, channels, batches,
// [16 .. 20]: the kernel's strides: elements of a window, channels, results, [21]: results,
// [22]: the input's stride for results. param[0 .. 2]: strides of windows, [3 .. 5]: paddings,
// [6 .. 8]: dilations, [9 .. 13]: the result's strides: places or samples, results, batches.
// All sizes are below 2^31, so that products with them fit.
#include "place.cuh"

struct Geometry {
    const i64 *taps, *places, *samples, *in, *kernel, *stride, *padding, *dilation, *out;
    i64 channels, results, in_of_result;

    __device__ Geometry(const Record &r)
        : taps(r.extra + 1), places(r.extra + 4), samples(r.extra + 7), in(r.extra + 11), kernel(r.extra + 16),
          stride(r.param), padding(r.param + 3), dilation(r.param + 6), out(r.param + 9), channels(r.extra[10]),
          results(r.extra[21]), in_of_result(r.extra[22]) {}

    // The sample under element `tap` of the window at `place`, or -1.
    __device__ i64 sample(int d, i64 place, i64 tap) const {
        const i64 i = place * stride[d] + tap * dilation[d] - padding[d];
        return 0 <= i && i < samples[d] ? i : -1;
    }
    // The place at which element `tap` of the window lies on `sample`, or -1.
    __device__ i64 place(int d, i64 sample, i64 tap) const {
        const i64 offset = sample + padding[d] - tap * dilation[d];
        if (offset < 0 || offset % stride[d]) return -1;
        return offset / stride[d] < places[d] ? offset / stride[d] : -1;
    }
};

// Takes the lowest digit off `e`.
__device__ inline i64 digit(i64 &e, i64 n) {
    const i64 i = e % n;
    e /= n;
    return i;
}

__device__ inline float as_half(float x) { return half_to_float(float_to_half(x)); }

// Columns: for each place of the kernel a dense row of its elements of all channels.
KERNEL(im2col, 256) {
    const Geometry g(r);
    const Slot &to = r.slot[DST], &x = r.slot[SRC1];
    FOR_ELEMENTS(e, r.extra[0]) {
        i64 rest = e, tap[3];
        for (int d = 0; d < 3; d++) tap[d] = digit(rest, g.taps[d]);
        const u8 *from = x.data + digit(rest, g.channels) * g.in[3];
        bool inside = true;
        for (int d = 0; d < 3; d++) {
            const i64 i = g.sample(d, digit(rest, g.places[d]), tap[d]);
            inside = inside && i >= 0;
            from += i * g.in[d];
        }
        from += rest * g.in[4];
        store_f32(to.data + e * to.nb[0], to.type, inside ? load_f32(from, x.type) : 0);
    }
}

// The gradient: each sample's sum over the columns of source 0 that it is in.
KERNEL(im2col_back, 256) {
    const Geometry g(r);
    const float *columns = reinterpret_cast<const float *>(r.slot[SRC0].data);
    FOR_ELEMENTS(e, r.extra[0]) {
        i64 rest = e;
        const i64 x = digit(rest, g.samples[0]), y = digit(rest, g.samples[1]), channel = digit(rest, g.channels), n = rest;
        float sum = 0;
        for (i64 ky = 0; ky < g.taps[1]; ky++) {
            const i64 oy = g.place(1, y, ky);
            if (oy < 0) continue;
            for (i64 kx = 0; kx < g.taps[0]; kx++) {
                const i64 ox = g.place(0, x, kx);
                if (ox < 0) continue;
                const i64 row = (n * g.places[1] + oy) * g.places[0] + ox;
                sum += columns[((row * g.channels + channel) * g.taps[1] + ky) * g.taps[0] + kx];
            }
        }
        f32(r.slot[DST].data + x * g.out[0] + y * g.out[1] + channel * g.out[3] + n * g.out[4]) = sum;
    }
}

// (elements of a window * channels, places) adds up to (samples, channels).
KERNEL(col2im, 256) {
    const Geometry g(r);
    const Slot &to = r.slot[DST], &columns = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        // Elements of the window that lie on the sample are a stride apart.
        const i64 offset = p.i[0] + g.padding[0];
        float sum = 0;
        for (i64 k = max(offset, (i64)0) % g.stride[0]; k < g.taps[0]; k += g.stride[0]) {
            const i64 place = g.place(0, p.i[0], k);
            if (place >= 0) sum += load(columns, p.i[1] * g.taps[0] + k, place);
        }
        store_f32(at(to, p), to.type, sum);
    }
}

// CONV_2D, CONV_3D and CONV_2D_DW. extra[23]: HALVES rounds inputs to F16, as the kernel is; with PADDED
// padding is zeros to be multiplied with, which shows where the kernel isn't finite.
enum { HALVES = 1, PADDED = 2 };

KERNEL(convolve, 256) {
    const Geometry g(r);
    const Slot &weights = r.slot[SRC0];
    const bool halves = (r.extra[23] & HALVES) != 0, padded = (r.extra[23] & PADDED) != 0;
    FOR_ELEMENTS(e, r.extra[0]) {
        i64 rest = e, place[3];
        u8 *target = r.slot[DST].data;
        for (int d = 0; d < 3; d++) {
            place[d] = digit(rest, g.places[d]);
            target += place[d] * g.out[d];
        }
        const i64 result = digit(rest, g.results), n = rest;
        const u8 *x = r.slot[SRC1].data + n * g.in[4] + result * g.in_of_result;
        float sum = 0;
        for (i64 channel = 0; channel < g.channels; channel++) {
            const u8 *w = weights.data + channel * g.kernel[3] + result * g.kernel[4];
            for (i64 kz = 0; kz < g.taps[2]; kz++) {
                const i64 z = g.sample(2, place[2], kz);
                if (z < 0 && !padded) continue;
                for (i64 ky = 0; ky < g.taps[1]; ky++) {
                    const i64 y = g.sample(1, place[1], ky);
                    if (y < 0 && !padded) continue;
                    for (i64 kx = 0; kx < g.taps[0]; kx++) {
                        const i64 i = g.sample(0, place[0], kx);
                        const bool outside = i < 0 || y < 0 || z < 0;
                        if (outside && !padded) continue;
                        float value = 0;
                        if (!outside)
                            value = *reinterpret_cast<const float *>(x + i * g.in[0] + y * g.in[1] + z * g.in[2] + channel * g.in[3]);
                        if (halves) value = as_half(value);
                        sum += value * load_f32(w + kx * g.kernel[0] + ky * g.kernel[1] + kz * g.kernel[2], weights.type);
                    }
                }
            }
        }
        f32(target + result * g.out[3] + n * g.out[4]) = sum;
    }
}

// CONV_TRANSPOSE_1D and _2D: places are the input's elements, from which the kernel adds to samples.
KERNEL(convolve_transposed, 256) {
    const Geometry g(r);
    const Slot &weights = r.slot[SRC0];
    const bool halves = r.extra[23] != 0;
    FOR_ELEMENTS(e, r.extra[0]) {
        i64 rest = e;
        const i64 x = digit(rest, g.samples[0]), y = digit(rest, g.samples[1]), result = digit(rest, g.results), n = rest;
        float sum = 0;
        // Elements of the kernel that lie on the sample are a stride apart.
        for (i64 ky = y % g.stride[1]; ky < g.taps[1]; ky += g.stride[1]) {
            const i64 oy = g.place(1, y, ky);
            if (oy < 0) continue;
            for (i64 kx = x % g.stride[0]; kx < g.taps[0]; kx += g.stride[0]) {
                const i64 ox = g.place(0, x, kx);
                if (ox < 0) continue;
                const u8 *w = weights.data + kx * g.kernel[0] + ky * g.kernel[1] + result * g.kernel[4];
                const u8 *from = r.slot[SRC1].data + ox * g.in[0] + oy * g.in[1] + n * g.in[4];
                for (i64 channel = 0; channel < g.channels; channel++) {
                    float value = *reinterpret_cast<const float *>(from + channel * g.in[3]);
                    if (halves) value = as_half(value);
                    sum += value * load_f32(w + channel * g.kernel[3], weights.type);
                }
            }
        }
        f32(r.slot[DST].data + x * g.out[0] + y * g.out[1] + result * g.out[3] + n * g.out[4]) = sum;
    }
}

// -- pools -----------------------------------------------------------------------------------------

enum { MAXIMUM, MEAN };
#define LOWEST -3.402823466e+38f

// Windows without dilation: extra[1 .. 2] are their sizes, extra[3 .. 4] strides, extra[5 .. 6]
// paddings; param[0]: which.
struct Pool {
    i64 size[2], stride[2], padding[2];

    __device__ Pool(const Record &r) {
        for (int d = 0; d < 2; d++) {
            size[d] = r.extra[1 + d];
            stride[d] = r.extra[3 + d];
            padding[d] = r.extra[5 + d];
        }
    }
    // The samples under the window at a place, of `n` there are.
    __device__ i64 first(int d, i64 place) const { return max(place * stride[d] - padding[d], (i64)0); }
    __device__ i64 end(int d, i64 place, i64 n) const { return min(place * stride[d] - padding[d] + size[d], n); }
    // The places whose windows have a sample, of `n` there are.
    __device__ i64 first_place(int d, i64 sample) const {
        const i64 offset = sample + padding[d] - size[d];
        return offset < 0 ? 0 : offset / stride[d] + 1;
    }
    __device__ i64 end_place(int d, i64 sample, i64 n) const {
        const i64 offset = sample + padding[d];
        return offset < 0 ? 0 : min(offset / stride[d] + 1, n);
    }
    // The maximum of a window, and where it is first (-1: none is above the lowest number). As ggml
    // looks for it: nothing is less or equal to a NaN, which so counts, and after it the next anew.
    __device__ i64 maximum(const Slot &x, const Place &p, float &best) const {
        i64 found = -1;
        best = LOWEST;
        for (i64 y = first(1, p.i[1]); y < end(1, p.i[1], x.ne[1]); y++)
            for (i64 i = first(0, p.i[0]); i < end(0, p.i[0], x.ne[0]); i++) {
                const float value = load(x, i, y, p.i[2], p.i[3]);
                if (!(value <= best)) {
                    best = value;
                    found = y * x.ne[0] + i;
                }
            }
        return found;
    }
};

// POOL_1D (extra[7]: means are of what is there) and POOL_2D.
KERNEL(pool, 256) {
    const Pool pool(r);
    const Slot &to = r.slot[DST], &x = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        float value = 0;
        if (r.param[0] == MAXIMUM) {
            pool.maximum(x, p, value);
        } else {
            const i64 first = pool.first(0, p.i[0]), end = pool.end(0, p.i[0], x.ne[0]);
            for (i64 y = pool.first(1, p.i[1]); y < pool.end(1, p.i[1], x.ne[1]); y++)
                for (i64 i = first; i < end; i++) value += load(x, i, y, p.i[2], p.i[3]);
            value /= r.extra[7] ? (float)max(end - first, (i64)1) : (float)(pool.size[0] * pool.size[1]);
        }
        store_f32(at(to, p), to.type, value);
    }
}

// For POOL_2D_BACK: where the maximum of each window of source 1 is, as places in its plane, to extra[7].
// The windows are slot 0's elements.
KERNEL(pool_maxima, 256) {
    const Pool pool(r);
    i64 *found = reinterpret_cast<i64 *>(r.extra[7]);
    FOR_ELEMENTS(e, r.extra[0]) {
        float best;
        found[e] = pool.maximum(r.slot[SRC1], Place(r.slot[DST], e), best);
    }
}

// Each sample's sum of the gradients (source 0) of the windows it is the maximum of, which extra[7]
// has, or of its share of all that it is in.
KERNEL(pool_back, 256) {
    const Pool pool(r);
    const Slot &to = r.slot[DST], &gradients = r.slot[SRC0];
    const i64 *found = reinterpret_cast<const i64 *>(r.extra[7]);
    const float area = (float)(pool.size[0] * pool.size[1]);
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 here = p.i[1] * to.ne[0] + p.i[0], plane = p.i[3] * gradients.ne[2] + p.i[2];
        float sum = 0;
        for (i64 y = pool.first_place(1, p.i[1]); y < pool.end_place(1, p.i[1], gradients.ne[1]); y++)
            for (i64 x = pool.first_place(0, p.i[0]); x < pool.end_place(0, p.i[0], gradients.ne[0]); x++) {
                const float gradient = f32(at(gradients, x, y, p.i[2], p.i[3]));
                if (r.param[0] == MEAN) sum += gradient / area;
                else if (found[(plane * gradients.ne[1] + y) * gradients.ne[0] + x] == here) sum += gradient;
            }
        store_f32(at(to, p), to.type, sum);
    }
}
