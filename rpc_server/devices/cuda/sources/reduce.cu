// Ops along rows: sums, largest elements, sorting. A block of threads for each row of F32.
#include "kernel.cuh"

__device__ inline float element(const Slot &s, const u8 *row, i64 i) { return *reinterpret_cast<const float *>(row + i * s.nb[0]); }

// SUM_ROWS, and MEAN with extra[0]: sums in F64, as ggml.
KERNEL(sum_rows, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(double, room, 32);
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        double sum = 0;
        for (i64 i = threadIdx.x; i < from.ne[0]; i += blockDim.x) sum += element(from, source, i);
        const float whole = (float)over_block(sum, Sum(), room);
        if (threadIdx.x == 0) *reinterpret_cast<float *>(at.in(to)) = r.extra[0] ? whole / (float)from.ne[0] : whole;
    }
}

// ARGMAX. A NaN starts ggml's search anew, so what counts are the numbers behind the last one but
// those that end the row; of equals it is the last; without numbers, 0.
KERNEL(argmax, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(i64, room, 32);
    SHARED_ARRAY(float, values, 32);
    const i64 n = from.ne[0];
    FOR_ROWS(row, from.ne[1]) {
        const u8 *source = from.data + row * from.nb[1];
        i64 last = -1, nan = -1, best = -1;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x)
            if (element(from, source, i) == element(from, source, i)) last = i;
        last = over_block(last, Largest(), room);
        for (i64 i = threadIdx.x; i < last; i += blockDim.x)
            if (element(from, source, i) != element(from, source, i)) nan = i;
        nan = over_block(nan, Largest(), room);
        float top = -INF;
        for (i64 i = nan + 1 + threadIdx.x; i <= last; i += blockDim.x) top = fmaxf(top, element(from, source, i));
        top = over_block(top, Largest(), values);
        for (i64 i = nan + 1 + threadIdx.x; i <= last; i += blockDim.x)
            if (element(from, source, i) == top) best = i;
        best = over_block(best, Largest(), room);
        if (threadIdx.x == 0) reinterpret_cast<i32 *>(to.data)[row] = (i32)(best < 0 ? 0 : best);
    }
}

// Whether element i comes before element j: larger ones first if `descending`, NaN last, equals in
// their order.
__device__ inline bool before(const Slot &s, const u8 *row, i32 i, i32 j, bool descending) {
    const float a = element(s, row, i), b = element(s, row, j);
    if (a != a || b != b) return (b != b && a == a) || ((a != a) == (b != b) && i < j);
    if (a != b) return descending ? a > b : a < b;
    return i < j;
}

// ARGSORT and TOP_K: the numbers of a row's elements in order, by a bitonic network over a power of
// two of places; those behind the end come last. extra: places, where they are (shared memory if
// 0), 1 for descending. TOP_K takes the first of them, and swaps the first two with extra[3], as
// ggml's CPU backend does.
KERNEL(argsort, 1024) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    DYNAMIC_SHARED(i32, shared);
    const i32 places = (i32)r.extra[0], n = (i32)from.ne[0];
    const bool descending = r.extra[2] != 0;
    i32 *order = r.extra[1] ? reinterpret_cast<i32 *>(r.extra[1]) + (i64)blockIdx.x * places : shared;
    FOR_ROWS(row, from.ne[1] * from.ne[2] * from.ne[3]) {
        const Row at(from, row);
        const u8 *source = at.in(from);
        __syncthreads();
        for (i32 i = threadIdx.x; i < places; i += blockDim.x) order[i] = i;
        for (i32 size = 2; size <= places; size *= 2)
            for (i32 step = size / 2; step > 0; step /= 2) {
                __syncthreads();
                for (i32 i = threadIdx.x; i < places; i += blockDim.x) {
                    const i32 j = i ^ step;
                    if (j <= i) continue;
                    const i32 a = order[i], b = order[j];
                    const bool a_first = b >= n ? a < n || a < b : a < n && before(from, source, a, b, descending);
                    if (a_first != ((i & size) == 0)) {
                        order[i] = b;
                        order[j] = a;
                    }
                }
            }
        __syncthreads();
        u8 *target = at.in(to);
        for (i32 i = threadIdx.x; i < (i32)to.ne[0]; i += blockDim.x) {
            const i32 from_place = r.extra[3] && to.ne[0] > 1 && i < 2 ? 1 - i : i;
            *reinterpret_cast<i32 *>(target + i * to.nb[0]) = order[from_place];
        }
    }
}

// SUM of all elements, in F64: one block.
KERNEL(sum, 1024) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(double, room, 32);
    double sum = 0;
    for (i64 row = 0; row < from.ne[1] * from.ne[2] * from.ne[3]; row++) {
        const u8 *source = Row(from, row).in(from);
        for (i64 i = threadIdx.x; i < from.ne[0]; i += blockDim.x) sum += load_f32(source + i * from.nb[0], from.type);
    }
    sum = over_block(sum, Sum(), room);
    if (threadIdx.x == 0) store_f32(to.data, to.type, (float)sum);
}

// COUNT_EQUAL: one block.
KERNEL(count_equal, 1024) {
    const Slot &to = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1];
    SHARED_ARRAY(i64, room, 32);
    i64 count = 0;
    for (i64 row = 0; row < a.ne[1] * a.ne[2] * a.ne[3]; row++) {
        const Row at(a, row);
        const u8 *first = at.in(a), *second = at.in(b);
        for (i64 i = threadIdx.x; i < a.ne[0]; i += blockDim.x)
            count += *reinterpret_cast<const i32 *>(first + i * a.nb[0]) == *reinterpret_cast<const i32 *>(second + i * b.nb[0]);
    }
    count = over_block(count, Sum(), room);
    if (threadIdx.x == 0) *reinterpret_cast<i64 *>(to.data) = count;
}

// CUMSUM: a block walks a row, as many elements at a time as it has threads.
KERNEL(cumsum, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    SHARED_ARRAY(float, warps, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    FOR_ROWS(row, to.ne[1] * to.ne[2] * to.ne[3]) {
        const Row at(to, row);
        const u8 *source = at.in(from);
        u8 *target = at.in(to);
        float before = 0;
        for (i64 first = 0; first < to.ne[0]; first += blockDim.x) {
            const i64 i = first + threadIdx.x;
            float sum = i < to.ne[0] ? element(from, source, i) : 0;
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const float other = __shfl_up_sync(ALL_LANES, sum, lanes);
                if (lane >= lanes) sum += other;
            }
            if (lane == 31) warps[warp] = sum;
            __syncthreads();
            float all = before;
            for (int w = 0; w < (int)blockDim.x / 32; w++) {
                if (w == warp) sum += all;
                all += warps[w];
            }
            before = all;
            if (i < to.ne[0]) *reinterpret_cast<float *>(target + i * to.nb[0]) = sum;
            __syncthreads();
        }
    }
}
