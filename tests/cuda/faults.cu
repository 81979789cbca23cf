// Kernels for test_emulation.py: four that are right, and one for each fault that must be found.
#include "kernel.cuh"

#define IN ((const float *)r.slot[SRC0].data)
#define OUT ((float *)r.slot[DST].data)
#define N ((int)r.slot[DST].ne[0])
#define ME ((int)threadIdx.x)

KERNEL(sound, 1024) {
    SHARED_ARRAY(float, values, 1024);
    values[ME] = IN[ME];
    if (ME == 0) OUT[0] = 0;
    __syncthreads();
    float mine = values[N - 1 - ME];
    if (ME > 0) OUT[ME] = mine;
    float sum = over_warp(mine, Sum());
    if (ME % 32 == 0) atomicAdd(OUT, sum);
}

KERNEL(block_sum, 1024) {
    SHARED_ARRAY(float, room, 32);
    float once = over_block(IN[ME], Sum(), room);
    float twice = over_block(once, Largest(), room);
    OUT[ME] = twice;
}

KERNEL(counts_in_shared_memory, 1024) {
    SHARED_ARRAY(int, count, 1);
    if (ME == 0) count[0] = 0;
    __syncthreads();
    atomicAdd(count, 1);
    __syncthreads();
    OUT[ME] = count[0];
}

KERNEL(reads_past_the_end, 1024) { OUT[ME] = IN[ME + 1]; }
KERNEL(writes_before_the_start, 1024) { OUT[ME - 1] = 1; }
KERNEL(writes_its_source, 1024) { ((float *)IN)[ME] = 1; }
KERNEL(reads_a_null_pointer, 1024) { OUT[ME] = *(const float *)r.slot[SRC1].data; }

KERNEL(reads_past_shared_memory, 1024) {
    DYNAMIC_SHARED(float, values);
    values[ME] = 1;
    __syncthreads();
    OUT[ME] = values[ME + 1];
}

KERNEL(reads_shared_memory_that_nobody_wrote, 1024) {
    DYNAMIC_SHARED(float, values);
    if (ME % 2) values[ME] = 1;
    __syncthreads();
    OUT[ME] = values[ME];
}

KERNEL(misses_a_barrier, 1024) {
    SHARED_ARRAY(float, values, 64);
    values[ME] = 0;
    __syncthreads();
    values[ME] = IN[ME];
    OUT[ME] = values[63 - ME];
}

KERNEL(misses_a_barrier_before_reuse, 1024) {
    SHARED_ARRAY(float, values, 64);
    for (int i = 0; i < 2; i++) {
        values[ME] = IN[ME];
        __syncthreads();
        OUT[ME] = values[63 - ME];
    }
}

KERNEL(misses_a_barrier_of_the_warp, 1024) {
    SHARED_ARRAY(float, values, 64);
    values[ME] = IN[ME];
    __syncwarp();
    float other = values[ME ^ 1];
    values[ME] = other;
    OUT[ME] = other;
}

KERNEL(writes_one_word_from_two_threads, 1024) { OUT[ME / 2] = 1; }
KERNEL(reads_what_another_block_writes, 1024) {
    if (blockIdx.x == 0) OUT[ME] = 1;
    else if (OUT[ME] == 2) OUT[0] = 3;
}

KERNEL(waits_at_different_barriers, 1024) {
    if (ME < 32) __syncthreads();
    else {
        __syncthreads();
    }
}

KERNEL(leaves_lanes_out_of_an_exchange, 1024) {
    if (ME % 2) OUT[ME] = __shfl_xor_sync(ALL_LANES, 1.0f, 2);
}

KERNEL(reads_a_lane_that_takes_no_part, 1024) {
    if (ME % 2) OUT[ME] = __shfl_xor_sync(0xaaaaaaaau, 1.0f, 1);
}

KERNEL(loads_a_misaligned_number, 1024) {
    volatile const long long *words = (volatile const long long *)(IN + 1);
    OUT[ME] = (float)words[0];
}

KERNEL(loads_a_misaligned_vector, 1024) {
    const float2 two = *(const float2 *)(IN + 1);
    OUT[ME] = two.x + two.y;
}

KERNEL(stores_a_misaligned_vector, 1024) {
    if (ME == 0) *(float4 *)(OUT + 2) = make_float4(1, 2, 3, 4);
}

KERNEL(traps, 1024) {
    if (ME == 3) __trap();
}

// Each of two blocks writes half of the result; the last one reads all of it.
#define HALF \
    if (ME < 32) OUT[32 * blockIdx.x + ME] = IN[32 * blockIdx.x + ME]

KERNEL(hands_over, 1024) {
    SHARED_ARRAY(u32, room, 1);
    HALF;
    if (!is_last(r, 0, gridDim.x, room)) return;
    const float other = OUT[N - 1 - ME];
    __syncthreads();
    OUT[ME] = other;
}

// The same with something left out. Block 1 is the last.
__device__ inline void sum_up(float *out, int me, int n) {
    if (blockIdx.x == 1 && out[n - 1 - me] == -1) out[0] = 1;
}
KERNEL(hands_over_without_a_fence, 1024) {
    HALF;
    __syncthreads();
    if (ME == 0) {
        atomicInc(r.status + 1, 1);
        __threadfence();
    }
    __syncthreads();
    sum_up(OUT, ME, N);
}
KERNEL(takes_over_without_a_fence, 1024) {
    HALF;
    __syncthreads();
    if (ME == 0) {
        __threadfence();
        atomicInc(r.status + 1, 1);
    }
    __syncthreads();
    sum_up(OUT, ME, N);
}
KERNEL(takes_over_without_a_barrier, 1024) {
    HALF;
    __syncthreads();
    if (ME == 0) {
        __threadfence();
        atomicInc(r.status + 1, 1);
        __threadfence();
    }
    sum_up(OUT, ME, N);
}
KERNEL(hands_over_before_all_is_written, 1024) {
    if (ME == 0) {
        __threadfence();
        atomicInc(r.status + 1, 1);
        __threadfence();
    }
    HALF;
    __syncthreads();
    sum_up(OUT, ME, N);
}
