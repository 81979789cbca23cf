// ROPE: pairs of elements of each row turned by angles that grow with the row's position.
#include "place.cuh"

enum { NORMAL = 0, NEOX = 2, MROPE = 8, VISION = 24, IMROPE = 40 };

// Which of a token's positions turns a pair, and how many steps down from it its angle is.
__device__ inline void section_of(const Record &r, int mode, int pair, int &section, int &step) {
    if (mode != MROPE && mode != VISION && mode != IMROPE) {
        section = 0;
        step = pair;
        return;
    }
    int ends[4], end = 0;
    for (int i = 0; i < 4; i++) ends[i] = end += (int)r.param[11 + i];
    const int sector = pair % end;
    if (mode == IMROPE) {
        const int turn = sector % 3;
        section = sector < 3 * (int)r.param[11 + turn] ? turn : 3;
    } else {
        section = 3;
        for (int i = 3; i >= 0; i--)
            if (sector < ends[i]) section = i;
    }
    step = pair;
    if (mode != VISION) return;
    // Sections of VISION are independent: each counts its angles from its own start. One that begins
    // where an earlier, empty one does goes on counting: ggml finds the first of them.
    const int start = section ? ends[section - 1] : 0;
    for (int i = 0; i < section; i++)
        if ((i ? ends[i - 1] : 0) == start) return;
    step = sector - start;
}

// Where an element of the result goes, and besides to the row of a cache that it belongs to, if any.
struct Turned {
    u8 *row, *kept;
    __device__ void put(const Slot &to, const Slot &cache, i64 i, float value) const {
        store_f32(row + i * to.nb[0], to.type, value);
        if (kept) store_f32(kept + i * cache.nb[0], cache.type, value);
    }
};

// slot 2: positions; slot 3: divisors, or empty. slots 4 to 6: a view of the (dense) result as rows of
// SET_ROWS, their indices, and where they go; or empty. extra: first turned element, pairs, elements from
// one pair to the next and within a pair, 1 to turn backwards; then, as bits of floats, the ratio of
// angles, and where YaRN goes over from extrapolated to interpolated ones.
// A thread for each pair; those that are not turned are copied. Blocks along x are rows.
KERNEL(rope, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0], &positions = r.slot[SRC1], &divisors = r.slot[SRC2];
    const Slot &rows = r.slot[SRC3], &ids = r.slot[SRC4], &cache = r.slot[SRC5];
    const int mode = (int)r.param[2];
    const int first = (int)r.extra[0], pairs = (int)r.extra[1], stride = (int)r.extra[2], distance = (int)r.extra[3];
    const float base = __int_as_float((i32)r.extra[5]);
    const float low = __int_as_float((i32)r.extra[6]), high = __int_as_float((i32)r.extra[7]);
    const float freq_scale = param_f32(r, 6), ext_factor = param_f32(r, 7);
    float magnitude = param_f32(r, 8);
    if (ext_factor != 0) magnitude *= 1 + 0.1f * logf(1 / freq_scale);
    const i32 *at_position = reinterpret_cast<const i32 *>(positions.data);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        Turned turned = {at.in(to), nullptr};
        if (rows.data) {
            // A row of the cache holds those of several heads.
            const i64 heads = quotient(rows.ne[0], from.ne[0]), number = quotient(row, heads);
            turned.kept = indexed_row(r, cache, ids, Row(rows, number));
            if (turned.kept) turned.kept += (row - number * heads) * from.ne[0] * cache.nb[0];
        }
        for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
            int section, step;
            section_of(r, mode, pair, section, step);
            // Step by step, rounding included: these are the angles that models run with everywhere.
            float angle = (float)at_position[at.i[2] + section * from.ne[2]];
            for (int i = 0; i < step; i++) angle = __fmul_rn(angle, base);
            if (divisors.data) angle /= *reinterpret_cast<const float *>(divisors.data + pair * divisors.nb[0]);
            const float extrapolated = angle;
            angle *= freq_scale;
            if (ext_factor != 0) {
                const float ramp = (pair - low) / fmaxf(0.001f, high - low);
                const float mix = (1 - fminf(1, fmaxf(0, ramp))) * ext_factor;
                angle = (float)((double)angle * (double)(1 - mix) + (double)(extrapolated * mix));
            }
            float cosine = cosf(angle) * magnitude, sine = sinf(angle) * magnitude;
            if (r.extra[4]) sine = -sine;
            const i64 one = first + (i64)pair * stride, other = one + distance;
            const float x = load_f32(source + one * from.nb[0], from.type);
            const float y = load_f32(source + other * from.nb[0], from.type);
            turned.put(to, cache, one, x * cosine - y * sine);
            turned.put(to, cache, other, x * sine + y * cosine);
        }
        // All elements that belong to no pair: those before the first, and behind the last.
        const i64 last = first + 2 * (i64)pairs;
        for (i64 i = threadIdx.x; i < from.ne[0]; i += blockDim.x)
            if (i < first || i >= last) turned.put(to, cache, i, load_f32(source + i * from.nb[0], from.type));
    }
}
