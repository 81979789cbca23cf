// What a CUDA C++ source needs to be compiled as C++ for the host: keywords, built-in variables,
// vector types and intrinsics. It is included before the first line of the source (g++ -include).
//
// Threads of a block are fibers of one host thread; runtime.cpp runs them, and sees every load and
// store, since the source is compiled with -fsanitize=thread and runtime.cpp has what that calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

#define EMULATED_VECTOR(T, name)                                      \
    struct __align__(2 * sizeof(T)) name##2 { T x, y; };              \
    struct __align__(4 * sizeof(T)) name##4 { T x, y, z, w; };        \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }        \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR(signed char, char)
EMULATED_VECTOR(unsigned char, uchar)
EMULATED_VECTOR(short, short)
EMULATED_VECTOR(unsigned short, ushort)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned int, uint)
EMULATED_VECTOR(float, float)
struct __align__(16) longlong2 { long long x, y; };
struct __align__(16) ulonglong2 { unsigned long long x, y; };
struct __align__(16) double2 { double x, y; };

namespace emulation {

// What one thread of a kernel is; the runtime points `self` to the one that runs.
struct Thread {
    uint3 thread_index;
    uint3 block_index;
    dim3 block_size;
    dim3 grid_size;
};
extern Thread *self;

enum Collective { SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, ANY, ALL, SYNC_WARP, MATCH_ANY, MATRICES };

// `site` tells barriers apart: threads that meet must do so in one place of the source.
void barrier(const char *site);
int barrier_reduce(const char *site, int predicate, int kind);
std::uint64_t collective(
    const char *site, Collective kind, unsigned mask, std::uint64_t value, int argument, int width);
// mma.sync: M by 8 with K in between, as one lane has it. A and B are signed bytes, and sums whole
// numbers, or half precision or BF16, and sums floats; the products are added to the sums.
enum Elements { BYTES, HALVES, BFLOATS };
struct Matrices {
    Elements of;
    int m, k;
    const int *a, *b;
    void *sums;
};
void multiply_matrices(const char *site, const Matrices &lane);
void atomic_access(const char *site, void *address, unsigned size);
void fence();
void *shared_array(const char *site, std::size_t size, std::size_t alignment);
void *dynamic_shared();
unsigned active_lanes();
[[noreturn]] void trap(const char *site, const char *what);

}  // namespace emulation

#define threadIdx (emulation::self->thread_index)
#define blockIdx (emulation::self->block_index)
#define blockDim (emulation::self->block_size)
#define gridDim (emulation::self->grid_size)
#define warpSize 32

// A place of the source, told apart from others by its address.
#define EMULATED_TEXT(x) #x
#define EMULATED_LINE(line) EMULATED_TEXT(line)
#define EMULATED_SITE \
    ([]() -> const char * { static const char site[] = __FILE__ ":" EMULATED_LINE(__LINE__); return site; }())

#define __syncthreads() emulation::barrier(EMULATED_SITE)
#define __syncthreads_or(p) emulation::barrier_reduce(EMULATED_SITE, (p), 0)
#define __syncthreads_and(p) emulation::barrier_reduce(EMULATED_SITE, (p), 1)
#define __syncthreads_count(p) emulation::barrier_reduce(EMULATED_SITE, (p), 2)
#define __threadfence() emulation::fence()
#define __threadfence_block() ((void)0)
#define __trap() emulation::trap(EMULATED_SITE, "__trap()")

namespace emulation {

#define EMULATED_INLINE inline __attribute__((no_sanitize("thread")))

template <typename T> EMULATED_INLINE std::uint64_t as_bits(T value) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T> EMULATED_INLINE T of_bits(std::uint64_t bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename T>
EMULATED_INLINE T exchange(const char *site, Collective kind, unsigned mask, T value, int argument, int width) {
    return of_bits<T>(collective(site, kind, mask, as_bits(value), argument, width));
}

template <typename T, typename F> EMULATED_INLINE T update(const char *site, T *address, F change) {
#ifdef __SANITIZE_THREAD__
    // Without it nobody has seen what was written.
    atomic_access(site, address, sizeof(T));
#endif
    T old = *address;
    *address = change(old);
    return old;
}

}  // namespace emulation

#define EMULATED_SHUFFLE(kind, mask, value, argument, ...) \
    emulation::exchange(EMULATED_SITE, kind, mask, value, argument, emulation::width(__VA_ARGS__))
namespace emulation {
inline int width(int w = 32) { return w; }
}
#define __shfl_sync(mask, value, lane, ...) \
    EMULATED_SHUFFLE(emulation::SHUFFLE, mask, value, lane, ##__VA_ARGS__)
#define __shfl_up_sync(mask, value, delta, ...) \
    EMULATED_SHUFFLE(emulation::SHUFFLE_UP, mask, value, delta, ##__VA_ARGS__)
#define __shfl_down_sync(mask, value, delta, ...) \
    EMULATED_SHUFFLE(emulation::SHUFFLE_DOWN, mask, value, delta, ##__VA_ARGS__)
#define __shfl_xor_sync(mask, value, lanes, ...) \
    EMULATED_SHUFFLE(emulation::SHUFFLE_XOR, mask, value, lanes, ##__VA_ARGS__)
#define __ballot_sync(mask, predicate) \
    ((unsigned)emulation::collective(EMULATED_SITE, emulation::BALLOT, mask, (predicate) ? 1 : 0, 0, 32))
#define __any_sync(mask, predicate) \
    ((int)emulation::collective(EMULATED_SITE, emulation::ANY, mask, (predicate) ? 1 : 0, 0, 32))
#define __all_sync(mask, predicate) \
    ((int)emulation::collective(EMULATED_SITE, emulation::ALL, mask, (predicate) ? 1 : 0, 0, 32))
#define __match_any_sync(mask, value) \
    ((unsigned)emulation::collective(EMULATED_SITE, emulation::MATCH_ANY, mask, emulation::as_bits(value), 0, 32))
#define EMULATED_SYNC_WARP(mask, ...) \
    ((void)emulation::collective(EMULATED_SITE, emulation::SYNC_WARP, mask, 0, 0, 32))
#define __syncwarp(...) EMULATED_SYNC_WARP(__VA_ARGS__ __VA_OPT__(,) 0xffffffffu)
#define __activemask() emulation::active_lanes()

#define atomicAdd(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return (decltype(old))(old + (value)); })
#define atomicInc(address, most) emulation::update(EMULATED_SITE, address, [&](auto old) { return old >= (most) ? 0u : old + 1; })
#define atomicSub(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return (decltype(old))(old - (value)); })
#define atomicMax(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { auto v = (decltype(old))(value); return v > old ? v : old; })
#define atomicMin(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { auto v = (decltype(old))(value); return v < old ? v : old; })
#define atomicOr(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return (decltype(old))(old | (value)); })
#define atomicAnd(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return (decltype(old))(old & (value)); })
#define atomicExch(address, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return (decltype(old))(value); })
#define atomicCAS(address, expected, value) emulation::update(EMULATED_SITE, address, [&](auto old) { return old == (decltype(old))(expected) ? (decltype(old))(value) : old; })

// Arrays in shared memory; kernels declare them with these two macros (see kernel.cuh).
#define SHARED_ARRAY(T, name, n)                                                    \
    T *const name = static_cast<T *>(                                               \
        emulation::shared_array(EMULATED_SITE, sizeof(T) * (n), alignof(T)))
#define DYNAMIC_SHARED(T, name) T *const name = static_cast<T *>(emulation::dynamic_shared())

template <typename T> inline T __ldg(const T *address) { return *address; }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++)
        c += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += ((a >> (8 * i)) & 255) * ((b >> (8 * i)) & 255);
    return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    std::uint64_t both = ((std::uint64_t)b << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = (selector >> (4 * i)) & 15;
        unsigned byte = (unsigned)(both >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = (byte & 128) ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
// The low word of both, a word of which `shift` bits have gone; the second keeps to 32 at most.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((std::uint64_t)high << 32) | low) >> (shift & 31));
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((std::uint64_t)high << 32) | low) >> (shift < 32 ? shift : 32));
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= ((v >> i) & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((std::uint64_t)a * b) >> 32); }
inline int __float_as_int(float f) { return emulation::of_bits<int>(emulation::as_bits(f)); }
inline unsigned __float_as_uint(float f) { return emulation::of_bits<unsigned>(emulation::as_bits(f)); }
inline float __int_as_float(int i) { return emulation::of_bits<float>(emulation::as_bits(i)); }
inline float __uint_as_float(unsigned i) { return emulation::of_bits<float>(emulation::as_bits(i)); }
inline int __float2int_rn(float f) {
    // As the card: NaN is 0, what doesn't fit is the nearest that does.
    if (std::isnan(f)) return 0;
    float r = std::nearbyint(f);
    if (r >= 2147483648.0f) return INT32_MAX;
    if (r <= -2147483648.0f) return INT32_MIN;
    return (int)r;
}
inline float __fdividef(float a, float b) { return a / b; }
// Rounded by itself, as on the card: the compiler must not make one instruction of products and sums.
#if defined(__x86_64__)
inline float by_itself(float value) {
    asm("" : "+x"(value));
    return value;
}
#else
inline float by_itself(volatile float value) { return value; }
#endif
inline float __fmul_rn(float a, float b) { return by_itself(a * b); }
inline float __fadd_rn(float a, float b) { return by_itself(by_itself(a) + by_itself(b)); }
inline float __fsub_rn(float a, float b) { return by_itself(by_itself(a) - by_itself(b)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float exp10f(float a) { return std::pow(10.0f, a); }
inline void sincosf(float a, float *s, float *c, int) { *s = std::sin(a); *c = std::cos(a); }
inline long long clock64() { return 0; }

template <typename A, typename B> inline auto min(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B> inline auto max(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    return (T)a < (T)b ? (T)b : (T)a;
}

// Half precision as the card converts it.
inline float emulated_half_to_float(unsigned short bits) {
    return (float)emulation::of_bits<_Float16>(bits);
}
inline unsigned short emulated_float_to_half(float value) {
    return (unsigned short)emulation::as_bits((_Float16)value);
}
