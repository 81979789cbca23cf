// Floats to blocks of the type WEIGHTS, one of encode_super.cuh.
#include "encode_super.cuh"
#include "place.cuh"

#define THREADS 128

typedef encoders::WEIGHTS Encoded;

// Blocks 0 to `n`, of which the `parts` blocks of threads take some each: `read` fills in a group of
// floats, `target` is where a block goes.
template <typename Read, typename Target>
__device__ inline void encode_blocks(i64 n, i64 part, i64 parts, Read read, Target target) {
    const int lanes = Share<Encoded>::LANES, at_once = blockDim.x / lanes, which = threadIdx.x / lanes;
    SHARED_ARRAY(u8, codes, THREADS * Encoded::GROUP);
    for (i64 first = part * at_once; first < n; first += parts * at_once) {
        // Lanes without a block do the last one with the others, and write nothing.
        const bool mine = first + which < n;
        const i64 b = mine ? first + which : n - 1;
        Share<Encoded> share;
        share.group = threadIdx.x % lanes;
        share.codes = codes + which * Encoded::BLOCK;
        share.block = mine ? target(b) : nullptr;
        read(share.x, b, share.group * Encoded::GROUP);
        Encoded::encode(share);
        __syncwarp();
    }
}

// extra[0] blocks. A group is within one row of the source.
KERNEL(copy_encoded, THREADS) {
    Slot to = r.slot[DST];
    const Slot &from = r.slot[SRC0];
    to.ne[0] /= Encoded::BLOCK;
    encode_blocks(
        r.extra[0], blockIdx.x, gridDim.x,
        [&](Exact (&x)[Encoded::GROUP], i64 b, int i) {
            load_floats(x, at(from, Place(from, b * Encoded::BLOCK + i)), from.nb[0], from.type);
        },
        [&](i64 b) { return at(to, Place(to, b)); });
}

// SET_ROWS
KERNEL(set_rows_encoded, THREADS) {
    const Slot &from = r.slot[SRC0];
    for_indexed_rows(r, [&](u8 *target, const u8 *source) {
        encode_blocks(
            from.ne[0] / Encoded::BLOCK, blockIdx.y, gridDim.y,
            [&](Exact (&x)[Encoded::GROUP], i64 b, int i) {
                load_floats(x, source + (b * Encoded::BLOCK + i) * from.nb[0], from.nb[0], from.type);
            },
            [&](i64 b) { return target + b * Encoded::SIZE; });
    });
}
