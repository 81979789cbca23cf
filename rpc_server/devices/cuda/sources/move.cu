// Ops that move elements: what each element of the result is a copy of follows from its indices. All
// with extra[0] elements, a thread each.
#include "place.cuh"

__device__ inline i64 wrapped(i64 i, i64 n) {
    i %= n;
    return i < 0 ? i + n : i;
}

// extra: elements, bytes of one. A block of a quantized type is one element of its bytes, and
// dimension 0 counts in blocks (extra[2] elements).
KERNEL(concat, 256) {
    Slot to = r.slot[DST];
    const Slot &a = r.slot[SRC0], &b = r.slot[SRC1];
    const int size = (int)r.extra[1], dim = (int)r.param[0];
    to.ne[0] /= r.extra[2];
    const i64 first = dim == 0 ? a.ne[0] / r.extra[2] : a.ne[dim];
    FOR_ELEMENTS(e, r.extra[0]) {
        Place p(to, e);
        u8 *target = at(to, p);
        if (p.i[dim] < first) copy_bytes(target, at(a, p), size);
        else {
            p.i[dim] -= first;
            copy_bytes(target, at(b, p), size);
        }
    }
}

KERNEL(repeat, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const int size = (int)r.extra[1];
    FOR_PLACES(p, to, r.extra[0]) {
        const u8 *source = at(from, p.i[0] % from.ne[0], p.i[1] % from.ne[1], p.i[2] % from.ne[2], p.i[3] % from.ne[3]);
        copy_bytes(at(to, p), source, size);
    }
}

// param: elements before and behind in each dimension, 0 to 3; with param[8] they are those of the
// other end, as on a torus, otherwise 0.
KERNEL(pad, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_ELEMENTS(e, r.extra[0]) {
        Place p(to, e);
        u8 *target = at(to, p);
        bool inside = true;
        for (int d = 0; d < 4; d++) {
            p.i[d] -= r.param[2 * d];
            if (r.param[8]) p.i[d] = wrapped(p.i[d], from.ne[d]);
            else inside = inside && 0 <= p.i[d] && p.i[d] < from.ne[d];
        }
        f32(target) = inside ? f32(at(from, p)) : 0;
    }
}

// param: elements before and behind each row, mirrored at its ends.
KERNEL(pad_reflect, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 last = from.ne[0] - 1;
    FOR_ELEMENTS(e, r.extra[0]) {
        Place p(to, e);
        u8 *target = at(to, p);
        i64 i = p.i[0] - r.param[0];
        i = i < 0 ? -i : i;
        p.i[0] = i > last ? 2 * last - i : i;
        f32(target) = f32(at(from, p));
    }
}

KERNEL(roll, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_ELEMENTS(e, r.extra[0]) {
        Place p(to, e);
        u8 *target = at(to, p);
        for (int d = 0; d < 4; d++) p.i[d] = wrapped(p.i[d] - r.param[d], from.ne[d]);
        f32(target) = f32(at(from, p));
    }
}

// SET and ACC (extra[1]): elements of source 1 into the result, or added to it, where param[0 .. 3]
// (strides of dimensions 1 to 3, offset) put them.
KERNEL(set_part, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC1];
    FOR_PLACES(p, from, r.extra[0]) {
        u8 *target = to.data + r.param[3] + p.i[0] * to.nb[0] + p.i[1] * r.param[0] + p.i[2] * r.param[1] + p.i[3] * r.param[2];
        if (r.extra[1]) f32(target) += f32(at(from, p));
        else copy_bytes(target, at(from, p), 4);
    }
}

// Rows of source 1 that source 2 names, added to the rows of source 0.
KERNEL(add_id, 256) {
    const Slot &to = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1], &ids = r.slot[SRC2];
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row place(to, row);
        const i64 id = index_of_warp(at(ids, place.i[1], place.i[2]), ids.type);
        if (!is_index(r, id, b.ne[1])) continue;
        u8 *target = place.in(to);
        u8 *first = place.in(a), *second = b.data + id * b.nb[1];
        FOR_COLUMNS(i, to.ne[0]) f32(target + i * to.nb[0]) = f32(first + i * a.nb[0]) + f32(second + i * b.nb[0]);
    }
}

// -- windows of pictures, relative positions -------------------------------------------------------

// (C, W, H) to (C, w, w, windows), row by row over the picture; param: windows across, down, w.
KERNEL(win_part, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 across = r.param[0], width = r.param[2];
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 x = p.i[3] % across * width + p.i[1], y = p.i[3] / across * width + p.i[2];
        f32(at(to, p)) = x < from.ne[1] && y < from.ne[2] ? f32(at(from, p.i[0], x, y)) : 0;
    }
}

// The reverse; param[0]: w.
KERNEL(win_unpart, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 width = r.param[0], across = (to.ne[1] + width - 1) / width;
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 window = p.i[1] / width + p.i[2] / width * across;
        f32(at(to, p)) = f32(at(from, p.i[0], p.i[1] % width, p.i[2] % width, window));
    }
}

// (C, 2 n - 1) to (C, n, n): the table's row for each distance; bits are copied as they are.
KERNEL(get_rel_pos, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        copy_bytes(at(to, p), at(from, p.i[0], p.i[2] + to.ne[1] - 1 - p.i[1]), 2);
    }
}

// Rows of source 0 are pictures of n by n, to which are added source 1 along their width and source
// 2 along their height. All dense; extra[1]: the elements that have positions, extra[2]: n.
KERNEL(add_rel_pos, 256) {
    float *to = reinterpret_cast<float *>(r.slot[DST].data);
    const float *scores = reinterpret_cast<const float *>(r.slot[SRC0].data);
    const float *width = reinterpret_cast<const float *>(r.slot[SRC1].data);
    const float *height = reinterpret_cast<const float *>(r.slot[SRC2].data);
    const i64 n = r.extra[2];
    FOR_ELEMENTS(e, r.extra[0]) {
        float value = r.param[0] ? to[e] : scores[e];
        if (e < r.extra[1]) value = value + height[e / n] + width[e / n / n * n + e % n];
        to[e] = value;
    }
}

// -- resizing --------------------------------------------------------------------------------------

enum { NEAREST, BILINEAR, BICUBIC };
enum { ALIGN_CORNERS = 1 << 8, ANTIALIAS = 1 << 9 };

__device__ inline i64 within(i64 i, i64 n) { return i < 0 ? 0 : i < n ? i : n - 1; }
__device__ inline i64 nearest(i64 place, i64 n, float ratio) { return within((i64)((float)place / ratio), n); }

// Keys' convolution of four elements, with a = -0.75.
__device__ inline float cubic_near(float d) { return ((-0.75f + 2) * d - (-0.75f + 3)) * d * d + 1; }
__device__ inline float cubic_far(float d) { return ((-0.75f * d - 5 * -0.75f) * d + 8 * -0.75f) * d - 4 * -0.75f; }

// The elements first .. first + count - 1 of one dimension that an element of the result is a sum of.
struct Taps {
    i64 first, count, n;
    float centre, support, weights[4], total;

    __device__ Taps(i64 place, i64 n_in, float ratio, i64 mode) : n(n_in), support(0), total(1) {
        const float half = mode & ALIGN_CORNERS ? 0 : 0.5f;
        centre = ((float)place + half) / ratio;
        if (mode & ANTIALIAS) {
            support = fmaxf(1, 1 / ratio);
            first = max((i64)(centre - support + half), (i64)0);
            count = max(min((i64)(centre + support + half), n) - first, (i64)0);
            centre -= half;
            total = 0;
            for (i64 k = 0; k < count; k++) total += triangle(k);
            if (!(total > 0)) total = 1;
            return;
        }
        centre -= half;
        first = (i64)floorf(centre);
        if ((mode & 255) == BILINEAR) {
            count = 2;
            const float x = fminf(fmaxf(centre - (float)within(first, n), 0), 1);
            weights[0] = 1 - x;
            weights[1] = x;
        } else {
            count = 4;
            const float x = centre - (float)first;
            first -= 1;
            weights[0] = cubic_far(x + 1);
            weights[1] = cubic_near(x);
            weights[2] = cubic_near(1 - x);
            weights[3] = cubic_far(2 - x);
        }
    }
    __device__ float triangle(i64 k) const { return fmaxf(1 - fabsf(((float)(first + k) - centre) / support), 0); }
    __device__ float weight(i64 k) const { return support > 0 ? triangle(k) / total : weights[k]; }
    __device__ i64 index(i64 k) const { return within(first + k, n); }
};

// param[0]: mode and flags; extra[1 .. 4]: how many elements of the result one of source 0 is.
KERNEL(upscale, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 mode = r.param[0];
    float ratio[4];
    for (int d = 0; d < 4; d++) ratio[d] = __int_as_float((i32)r.extra[1 + d]);
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 i2 = nearest(p.i[2], from.ne[2], ratio[2]), i3 = nearest(p.i[3], from.ne[3], ratio[3]);
        float value = 0;
        if ((mode & 255) == NEAREST) {
            value = f32(at(from, nearest(p.i[0], from.ne[0], ratio[0]), nearest(p.i[1], from.ne[1], ratio[1]), i2, i3));
        } else {
            const Taps across(p.i[0], from.ne[0], ratio[0], mode), down(p.i[1], from.ne[1], ratio[1], mode);
            for (i64 y = 0; y < down.count; y++) {
                float row = 0;
                for (i64 x = 0; x < across.count; x++)
                    row += across.weight(x) * f32(at(from, across.index(x), down.index(y), i2, i3));
                value += down.weight(y) * row;
            }
        }
        f32(at(to, p)) = value;
    }
}
