// Blocks of the type WEIGHTS to floats: whole rows, for products by cuBLAS and for copies.
#include "weights.cuh"

// The code that stands for 0, of types that have no minimum of their own: theirs only takes it off.
// Taken off the code instead, a scale beyond half precision makes infinities of codes, and not NaN.
template <typename T> struct Zero { enum { CODE = 0 }; };
template <> struct Zero<Q4_0> { enum { CODE = 8 }; };
template <> struct Zero<Q5_0> { enum { CODE = 16 }; };
template <> struct Zero<Q2_0> { enum { CODE = 1 }; };
template <> struct Zero<TQ1_0> { enum { CODE = 1 }; };
template <> struct Zero<TQ2_0> { enum { CODE = 1 }; };

// A block of threads decodes a run each, and together they write what has become of them in order.
// `runs` is shared memory for as many as it has threads; blocks along y share a row.
template <typename T>
__device__ inline void write_decoded(Run *runs, const u8 *source, int per_row, u8 *target, const Slot &to) {
    const int n_runs = blockDim.x;
    for (int first = blockIdx.y * n_runs; first < per_row; first += gridDim.y * n_runs) {
        const int count = min(n_runs, per_row - first);
        if ((int)threadIdx.x < count) decode_run<T>(runs[threadIdx.x], source, first + threadIdx.x);
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * count; i += blockDim.x) {
            const Run &run = runs[i / 32];
            const int e = i % 32, g = e / 16;
            const float code = (i8)(run.codes[e / 4] >> (8 * (e % 4)));
            const float above = Zero<T>::CODE ? 0 : run.minimum[g];
            store_f32(target + (32ll * first + i) * to.nb[0], to.type, run.scale[g] * (code - Zero<T>::CODE) + above);
        }
        __syncthreads();
    }
}

// slot 0: rows of F32, F16 or BF16; slot 1: rows of blocks, as many and as long.
KERNEL(dequantize, 128) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(Run, runs, 128);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        write_decoded<WEIGHTS>(runs, at.in(from), (int)(from.ne[0] / 32), at.in(to), to);
    }
}

// GET_ROWS of blocks: slot 2 has the rows' numbers.
KERNEL(get_rows_decoded, 128) {
    const Slot &to = r.slot[DST], &table = r.slot[SRC0], &ids = r.slot[SRC1];
    SHARED_ARRAY(Run, runs, 128);
    SHARED_ARRAY(i64, room, 1);
    const int per_row = (int)(table.ne[0] / 32);
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row at(to, row);
        const i64 id = index_of_block(ids.data + at.i[1] * ids.nb[0] + at.i[2] * ids.nb[1] + at.i[3] * ids.nb[2], ids.type, room);
        if (!is_index(r, id, table.ne[1])) continue;
        const u8 *source = table.data + id * table.nb[1] + at.i[2] * table.nb[2] + at.i[3] * table.nb[3];
        write_decoded<WEIGHTS>(runs, source, per_row, at.in(to), to);
    }
}
