// Ops that fill a tensor by rule: constants, ranges, diagonals and triangles, embeddings of time steps.
// All with extra[0] elements, a thread each.
#include "place.cuh"

KERNEL(fill, 256) {
    const Slot &to = r.slot[DST];
    FOR_ELEMENTS(e, r.extra[0]) store_f32(at(to, Place(to, e)), to.type, param_f32(r, 0));
}

KERNEL(arange, 256) {
    float *to = reinterpret_cast<float *>(r.slot[DST].data);
    FOR_ELEMENTS(e, r.extra[0]) to[e] = __fadd_rn(param_f32(r, 0), __fmul_rn(param_f32(r, 2), (float)e));
}

KERNEL(diag, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        f32(at(to, p)) = p.i[0] == p.i[1] ? f32(at(from, p.i[0], 0, p.i[2], p.i[3])) : 0;
    }
}

enum { UPPER_AND_DIAGONAL, UPPER, LOWER_AND_DIAGONAL, LOWER };

// param[0]: which part stays; the others are 0.
KERNEL(triangle, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 distance = p.i[0] - p.i[1];
        bool stays = false;
        switch (r.param[0]) {
        case UPPER_AND_DIAGONAL: stays = distance >= 0; break;
        case UPPER: stays = distance > 0; break;
        case LOWER_AND_DIAGONAL: stays = distance <= 0; break;
        case LOWER: stays = distance < 0; break;
        }
        f32(at(to, p)) = stays ? f32(at(from, p)) : 0;
    }
}

// -infinity (extra[1]), or 0, more than param[0] right of the diagonal.
KERNEL(mask_diagonal, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const float masked = r.extra[1] ? -INF : 0;
    FOR_PLACES(p, to, r.extra[0]) {
        f32(at(to, p)) = p.i[0] - p.i[1] > r.param[0] ? masked : f32(at(from, p));
    }
}

// param: elements of an embedding, longest period. Cosines, then sines, then what is left zeros.
KERNEL(timestep_embedding, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const i64 half = r.param[0] / 2;
    const float period = logf((float)r.param[1]);
    FOR_PLACES(p, to, r.extra[0]) {
        float value = 0;
        if (p.i[0] < 2 * half) {
            const i64 j = p.i[0] < half ? p.i[0] : p.i[0] - half;
            const float angle = f32(at(from, p.i[1])) * expf(-period * (float)j / (float)half);
            value = p.i[0] < half ? cosf(angle) : sinf(angle);
        }
        f32(at(to, p)) = value;
    }
}
