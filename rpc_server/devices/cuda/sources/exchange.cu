// What goes to and from tensors of an exchange: bytes as they are.
#include "place.cuh"

template <typename T> __device__ inline void copy_piece(i64 to, i64 from, i64 n) {
    FOR_ELEMENTS(i, n / (i64)sizeof(T))
        reinterpret_cast<T *>(to)[i] = reinterpret_cast<const T *>(from)[i];
}

// A piece for each row of the grid, of extra: where to, where from, how many bytes. Pieces lie where
// others end: at any address.
KERNEL(copy_pieces, 256) {
    const i64 to = r.extra[3 * blockIdx.y], from = r.extra[3 * blockIdx.y + 1], n = r.extra[3 * blockIdx.y + 2];
    const i64 aligned = to | from | n;
    if (aligned % 16 == 0) copy_piece<uint4>(to, from, n);
    else if (aligned % 4 == 0) copy_piece<u32>(to, from, n);
    else copy_piece<u8>(to, from, n);
}
