// Elements of tensors by number and by index: what kernels with a thread for each element walk with.
#pragma once

#include "kernel.cuh"

// The element with number `e` in the order of indices.
struct Place : Row {
    __device__ Place(const Slot &s, i64 e) : Row(s, quotient(e, s.ne[0])) {
        i[0] = e - quotient(e, s.ne[0]) * s.ne[0];
    }
};

__device__ inline u8 *at(const Slot &s, i64 i0, i64 i1 = 0, i64 i2 = 0, i64 i3 = 0) {
    return s.data + i0 * s.nb[0] + i1 * s.nb[1] + i2 * s.nb[2] + i3 * s.nb[3];
}
__device__ inline u8 *at(const Slot &s, const Place &p) { return at(s, p.i[0], p.i[1], p.i[2], p.i[3]); }

__device__ inline float &f32(u8 *p) { return *reinterpret_cast<float *>(p); }
__device__ inline float load(const Slot &s, i64 i0, i64 i1 = 0, i64 i2 = 0, i64 i3 = 0) {
    return load_f32(at(s, i0, i1, i2, i3), s.type);
}

// The row of `to` that SET_ROWS writes a row of its source to, or null: the graph fails then. The same
// for all lanes of a warp, all of which come here.
__device__ inline u8 *indexed_row(const Record &r, const Slot &to, const Slot &ids, const Row &place) {
    const i64 id = index_of_warp(at(ids, place.i[1], place.i[2] % ids.ne[1], place.i[3] % ids.ne[2]), ids.type);
    if (!is_index(r, id, to.ne[1])) return nullptr;
    return to.data + id * to.nb[1] + place.i[2] * to.nb[2] + place.i[3] * to.nb[3];
}

// SET_ROWS: the block's rows of the source, each with where it goes.
template <typename Write> __device__ inline void for_indexed_rows(const Record &r, Write write) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0], &ids = r.slot[SRC1];
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        u8 *target = indexed_row(r, to, ids, at);
        if (target) write(target, at.in(from));
    }
}

// Elements of `size` bytes as they are.
__device__ inline void copy_bytes(u8 *to, const u8 *from, int size) {
    switch (size) {
    case 1: *to = *from; break;
    case 2: *reinterpret_cast<u16 *>(to) = *reinterpret_cast<const u16 *>(from); break;
    case 4: *reinterpret_cast<u32 *>(to) = *reinterpret_cast<const u32 *>(from); break;
    case 8: *reinterpret_cast<u64 *>(to) = *reinterpret_cast<const u64 *>(from); break;
    default: for (int i = 0; i < size; i++) to[i] = from[i];
    }
}

#define FOR_ELEMENTS(e, n) \
    for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < (n); e += (i64)gridDim.x * blockDim.x)
// The same with the places that elements of a slot have.
#define FOR_PLACES(p, slot, n) FOR_ELEMENTS(p##_e, n) if (const Place p(slot, p##_e); true)
