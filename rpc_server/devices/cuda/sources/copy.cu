// Copies between tensors of any shapes and strides, conversions among them; rows by index.
#include "encode.cuh"
#include "place.cuh"

// Elements of extra[1] bytes as they are, extra[0] of them. A block of a quantized type counts as one
// element of its bytes, and dimension 0 in blocks (extra[2] elements).
KERNEL(copy_same, 256) {
    const int size = (int)r.extra[1];
    Slot to = r.slot[DST], from = r.slot[SRC0];
    to.ne[0] /= r.extra[2];
    from.ne[0] /= r.extra[2];
    FOR_ELEMENTS(e, r.extra[0]) copy_bytes(at(to, Place(to, e)), at(from, Place(from, e)), size);
}

// Dense to dense: extra[0] words of 16 bytes.
KERNEL(copy_dense, 256) {
    const uint4 *from = reinterpret_cast<const uint4 *>(r.slot[SRC0].data);
    uint4 *to = reinterpret_cast<uint4 *>(r.slot[DST].data);
    FOR_ELEMENTS(e, r.extra[0]) to[e] = from[e];
}

// Plain types, with a conversion: extra[0] elements.
KERNEL(copy_converted, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_ELEMENTS(e, r.extra[0])
        store_f32(at(to, Place(to, e)), to.type, load_f32(at(from, Place(from, e)), from.type));
}

// A row, with a conversion.
__device__ inline void convert_row(const Slot &to, u8 *target, const Slot &from, const u8 *source) {
    FOR_COLUMNS(i, from.ne[0])
        store_f32(target + i * to.nb[0], to.type, load_f32(source + i * from.nb[0], from.type));
}

// As copy_converted, of tensors of one shape, row by row.
KERNEL(copy_rows, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        convert_row(to, at.in(to), from, at.in(from));
    }
}

// To blocks of 32: extra[0] blocks, a thread each. A block is within one row of the source.
KERNEL(copy_encoded, 64) {
    Slot to = r.slot[DST];
    const Slot &from = r.slot[SRC0];
    to.ne[0] /= 32;
    FOR_ELEMENTS(b, r.extra[0]) {
        Exact x[32];
        load_floats(x, at(from, Place(from, 32 * b)), from.nb[0], from.type);
        encode_block(at(to, Place(to, b)), to.type, x);
    }
}

// -- rows by index ---------------------------------------------------------------------------------

// GET_ROWS of plain types; blocks along x are rows of the result.
KERNEL(get_rows, 256) {
    const Slot &to = r.slot[DST], &table = r.slot[SRC0], &ids = r.slot[SRC1];
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row place(to, row);
        const i64 id = index_of_warp(at(ids, place.i[1], place.i[2], place.i[3]), ids.type);
        if (!is_index(r, id, table.ne[1])) continue;
        const u8 *source = at(table, 0, id, place.i[2], place.i[3]);
        u8 *target = place.in(to);
        FOR_COLUMNS(i, to.ne[0]) {
            if (table.type == to.type) copy_bytes(target + i * to.nb[0], source + i * table.nb[0], 4);
            else store_f32(target + i * to.nb[0], to.type, load_f32(source + i * table.nb[0], table.type));
        }
    }
}

KERNEL(set_rows, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    for_indexed_rows(r, [&](u8 *target, const u8 *source) { convert_row(to, target, from, source); });
}

// To blocks of 32, a thread each.
KERNEL(set_rows_encoded, 64) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    for_indexed_rows(r, [&](u8 *target, const u8 *source) {
        FOR_COLUMNS(b, from.ne[0] / 32) {
            Exact x[32];
            load_floats(x, source + 32 * b * from.nb[0], from.nb[0], from.type);
            encode_block(target + b * block_bytes(to.type), to.type, x);
        }
    });
}
