// What every kernel of the CUDA device is made with: the record it is given, shared memory, half
// precision, and sums over warps and blocks.
//
// A kernel takes one record by value, the same words as a kernel of the CPU device (record.py):
// the card keeps it in constant memory, and a captured graph holds it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

struct Slot {
    u8 *data;
    i64 type;
    i64 ne[4];
    i64 nb[4];
};

// slot 0 is the result, the others are its sources; `status` is where a failure is written, by
// `fail`, with the counters of is_last behind it; `node` is what the failure is told with; `extra` are
// the kernel's own words.
struct Record {
    Slot slot[11];
    i64 param[16];
    u32 *status;
    i64 node;
    i64 extra[24];
};

enum { DST = 0, SRC0, SRC1, SRC2, SRC3, SRC4, SRC5 };
enum { INDEX_OUT_OF_RANGE = 1 };

// ggml's type numbers, as far as elements of them are loaded one by one.
enum { F32 = 0, F16 = 1, I8 = 24, I16 = 25, I32 = 26, I64 = 27, F64 = 28, BF16 = 30 };

#ifdef CUDA_EMULATION
#define KERNEL(name, ...) extern "C" void name(const Record &r)
#else
#if __CUDA_ARCH__ >= 700
#define RECORD_ARGUMENT const __grid_constant__ Record r
#else
#define RECORD_ARGUMENT const Record r
#endif
// A kernel for blocks of at most so many threads; a second number is how many blocks are to fit a
// multiprocessor.
#define KERNEL(name, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(RECORD_ARGUMENT)
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define DYNAMIC_SHARED(T, name)                  \
    extern __shared__ float4 dynamic_shared_memory[]; \
    T *const name = reinterpret_cast<T *>(dynamic_shared_memory)
#endif

#define ALL_LANES 0xffffffffu
#define INF __int_as_float(0x7f800000)

// The first failure of a plan is kept: its status in the low byte, the node above it.
__device__ inline void fail(const Record &r, u32 status) {
    atomicCAS(r.status, 0u, (u32)r.node << 8 | status);
}

// Whether this block is the last of `count` to come here, all of its threads: then they see what the
// others have written before. `counter` is which of the counters behind the status word (planner.py says
// how many there are) counts them: it is 0 before, and again behind the last of them. `room` is a word of
// shared memory.
__device__ inline bool is_last(const Record &r, u32 counter, u32 count, u32 *room) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // What the block has written, before it is counted; what others have, behind that.
        __threadfence();
        *room = atomicInc(r.status + 1 + counter, count - 1);
        __threadfence();
    }
    __syncthreads();
    return *room == count - 1;
}

__device__ inline float param_f32(const Record &r, int word) { return __int_as_float((i32)r.param[word]); }

// What heads multiply a mask with (ALiBi): powers of two bases, the second for heads in between.
__device__ inline float slope(i64 head, i64 heads, float max_bias) {
    if (max_bias <= 0) return 1;
    i64 power = 1;
    while (2 * power <= heads) power *= 2;
    const float first = powf(2, -max_bias / power), second = powf(2, -max_bias / 2 / power);
    return head < power ? powf(first, (float)(head + 1)) : powf(second, (float)(2 * (head - power) + 1));
}

// -- half precision, without headers that an installation may lack ------------------------------

#ifdef CUDA_EMULATION
__device__ inline float half_to_float(u16 bits) { return emulated_half_to_float(bits); }
__device__ inline u16 float_to_half(float value) { return emulated_float_to_half(value); }
#else
__device__ inline float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// To nearest, ties to even; a NaN stays one.
__device__ inline u16 float_to_bfloat(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 64);
    return (u16)((bits + (0x7fffu + (bits >> 16 & 1))) >> 16);
}

// -- single elements of a type that is known when a kernel runs: all threads take one branch ------

__device__ inline float load_f32(const u8 *p, i64 type) {
    switch (type) {
    case F32: return *reinterpret_cast<const float *>(p);
    case F16: return half_to_float(*reinterpret_cast<const u16 *>(p));
    case BF16: return bfloat_to_float(*reinterpret_cast<const u16 *>(p));
    case I32: return (float)*reinterpret_cast<const i32 *>(p);
    case I16: return (float)*reinterpret_cast<const i16 *>(p);
    case I8: return (float)*reinterpret_cast<const i8 *>(p);
    case I64: return (float)*reinterpret_cast<const i64 *>(p);
    default: return (float)*reinterpret_cast<const double *>(p);
    }
}

// Whole numbers are cut off, and what they can't hold is what is nearest.
__device__ inline void store_f32(u8 *p, i64 type, float value) {
    switch (type) {
    case F32: *reinterpret_cast<float *>(p) = value; break;
    case F16: *reinterpret_cast<u16 *>(p) = float_to_half(value); break;
    case BF16: *reinterpret_cast<u16 *>(p) = float_to_bfloat(value); break;
    case I32: *reinterpret_cast<i32 *>(p) = (i32)value; break;
    case I16: *reinterpret_cast<i16 *>(p) = (i16)value; break;
    case I8: *reinterpret_cast<i8 *>(p) = (i8)value; break;
    case I64: *reinterpret_cast<i64 *>(p) = (i64)value; break;
    default: *reinterpret_cast<double *>(p) = value; break;
    }
}

// -- numbers that decide where is read or written -------------------------------------------------

// Such numbers lie in a client's memory, and whatever a node writes may lie over them: another thread
// may be writing one while it is read. So each is read once (volatile: the compiler may not load it
// again where it is used), and the value that is used is the one that is checked. Threads that meet
// at a barrier or an exchange further on have to agree on it: they use the two functions below.
__device__ inline i64 load_index(const u8 *p, i64 type) {
    return type == I64 ? *reinterpret_cast<const volatile i64 *>(p) : *reinterpret_cast<const volatile i32 *>(p);
}

// The same for all lanes of a warp, all of which come here.
__device__ inline i64 index_of_warp(const u8 *p, i64 type) {
    i64 index = 0;
    if (threadIdx.x % 32 == 0) index = load_index(p, type);
    return __shfl_sync(ALL_LANES, index, 0);
}

// The same for all threads of a block, all of which come here; `room` is shared memory.
__device__ inline i64 index_of_block(const u8 *p, i64 type, i64 *room) {
    __syncthreads();
    if (threadIdx.x == 0) *room = load_index(p, type);
    __syncthreads();
    return *room;
}

// Whether `index` is one of `n`; if not, the graph fails.
__device__ inline bool is_index(const Record &r, i64 index, i64 n) {
    if (0 <= index && index < n) return true;
    fail(r, INDEX_OUT_OF_RANGE);
    return false;
}

// -- where elements lie --------------------------------------------------------------------------

// `a / b` of what is not negative. Division of 64 bits is slow, and hardly ever needed.
__device__ inline i64 quotient(i64 a, i64 b) {
    return a <= 0xffffffffll && b <= 0xffffffffll ? (i64)((u32)a / (u32)b) : a / b;
}

// A place in a tensor by the number of its row; `i` are dimensions 1 to 3.
struct Row {
    i64 i[4];
    __device__ Row(const Slot &s, i64 number) : Row(s.ne[1], s.ne[2], number) {}
    // In one that has so many of dimensions 1 and 2.
    __device__ Row(i64 n1, i64 n2, i64 number) {
        const i64 plane = quotient(number, n1);
        i[0] = 0;
        i[1] = number - plane * n1;
        i[3] = quotient(plane, n2);
        i[2] = plane - i[3] * n2;
    }
    __device__ u8 *in(const Slot &s) const {
        return s.data + i[1] * s.nb[1] + i[2] * s.nb[2] + i[3] * s.nb[3];
    }
    // The same place in a tensor that is repeated over this one.
    __device__ u8 *repeated_in(const Slot &s) const {
        return s.data + i[1] % s.ne[1] * s.nb[1] + i[2] % s.ne[2] * s.nb[2] + i[3] % s.ne[3] * s.nb[3];
    }
};

// All rows of a grid, and all places of a row: blocks along x are rows, along y parts of one.
#define FOR_ROWS(row, n) for (i64 row = blockIdx.x; row < (n); row += gridDim.x)
#define FOR_COLUMNS(i, n)     for (i64 i = (i64)blockIdx.y * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.y * blockDim.x)

// -- sums over a warp and a block ----------------------------------------------------------------

struct Sum {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
    template <typename T> __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};

// All lanes get what `combine` makes of the values of all.
template <typename T, typename F> __device__ inline T over_warp(T value, F combine) {
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, lanes));
    return value;
}

// All threads of a block of whole warps get what `combine` makes of the values of all; `room` are
// 32 elements of shared memory that nobody uses meanwhile.
template <typename T, typename F> __device__ inline T over_block(T value, F combine, T *room) {
    value = over_warp(value, combine);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (warps == 1) return value;
    __syncthreads();
    if (lane == 0) room[warp] = value;
    __syncthreads();
    value = room[lane < warps ? lane : 0];
    // Each warp combines what the warps left; a lane without one repeats the first, which changes
    // a sum: those give what changes nothing by taking no part.
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        T other = __shfl_down_sync(ALL_LANES, value, lanes);
        if (lane + lanes < warps) value = combine(value, other);
    }
    return __shfl_sync(ALL_LANES, value, 0);
}
