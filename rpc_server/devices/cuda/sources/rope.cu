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

// Slots behind those of the node itself: of SET_ROWS of the result, another ROPE with the same positions
// and parameters, and another SET_ROWS.
enum { IDS = SRC3, CACHE, OTHER, OTHER_SOURCE, VALUES, VALUE_IDS, VALUE_CACHE };

// extra: first turned element, pairs, elements from one pair to the next and within a pair, 1 to turn
// backwards; then, as bits of floats, the ratio of angles, and where YaRN goes over from extrapolated to
// interpolated ones.
struct Turn {
    int mode, first, pairs, stride, distance;
    float base, low, high, freq_scale, ext_factor, magnitude;

    __device__ Turn(const Record &r)
        : mode((int)r.param[2]), first((int)r.extra[0]), pairs((int)r.extra[1]), stride((int)r.extra[2]),
          distance((int)r.extra[3]), base(__int_as_float((i32)r.extra[5])), low(__int_as_float((i32)r.extra[6])),
          high(__int_as_float((i32)r.extra[7])), freq_scale(param_f32(r, 6)), ext_factor(param_f32(r, 7)),
          magnitude(param_f32(r, 8)) {
        if (ext_factor != 0) magnitude *= 1 + 0.1f * logf(1 / freq_scale);
    }

    // Row number `row` of `from`; a thread for each pair. Those that are not turned are copied.
    __device__ void row(const Record &r, const Slot &from, const Row &at, const Slot &to, u8 *kept) const {
        const Slot &positions = r.slot[SRC1], &divisors = r.slot[SRC2], &cache = r.slot[CACHE];
        const i32 *at_position = reinterpret_cast<const i32 *>(positions.data);
        const u8 *source = at.in(from);
        const Turned turned = {at.in(to), kept};
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
};

__device__ inline i64 rows_of(const Slot &s) { return s.ne[1] * s.ne[2] * s.ne[3]; }

// slot 2: positions; slot 3: divisors, or empty. Where slot CACHE is set the (dense) result is put into
// rows of it, too, by the indices IDS: extra[8] rows of the result are one of SET_ROWS' source, which has
// extra[9] and extra[10] of dimensions 1 and 2. Where OTHER is set, OTHER_SOURCE is turned into it; where
// VALUE_CACHE is set, VALUES are put into rows of it by VALUE_IDS. A block does a row at a time.
KERNEL(rope, 256) {
    const Slot &from = r.slot[SRC0], &other = r.slot[OTHER_SOURCE], &values = r.slot[VALUES];
    const i64 own = rows_of(from), others = own + rows_of(other);
    const Turn turn(r);
    FOR_ROWS(row, others + rows_of(values)) {
        if (row < own) {
            const Slot &cache = r.slot[CACHE];
            u8 *kept = nullptr;
            if (cache.data) {
                // A row of the cache holds those of several heads.
                const i64 number = quotient(row, r.extra[8]);
                kept = indexed_row(r, cache, r.slot[IDS], Row(r.extra[9], r.extra[10], number));
                if (kept) kept += (row - number * r.extra[8]) * from.ne[0] * cache.nb[0];
            }
            turn.row(r, from, Row(from, row), r.slot[DST], kept);
        } else if (row < others) {
            turn.row(r, other, Row(other, row - own), r.slot[OTHER], nullptr);
        } else {
            const Slot &cache = r.slot[VALUE_CACHE];
            const Row at(values, row - others);
            u8 *target = indexed_row(r, cache, r.slot[VALUE_IDS], at);
            const u8 *source = at.in(values);
            if (!target) continue;
            for (i64 i = threadIdx.x; i < values.ne[0]; i += blockDim.x)
                store_f32(target + i * cache.nb[0], cache.type, load_f32(source + i * values.nb[0], values.type));
        }
    }
}
