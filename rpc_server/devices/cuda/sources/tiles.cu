// Products of a matrix of blocks with many columns, as reading a prompt makes them: weights are decoded
// once for all columns of a tile, and multiplied as the codes they are, four at a time.
//
// Columns come from columns.cu, rounded as for matvec.cu: tokens that are read together give what they
// give one by one, but for roundings of sums.
#include "columns.cuh"
#include "weights.cuh"

// A block of threads makes ROWS times COLUMNS elements of the result, RUNS runs of 32 of K at a time.
// In shared memory rows and columns look the same: codes, then a float4 for each run. That they are 13
// times 16 bytes apart, an odd number, has eight neighbours lie in different banks.
enum { THREADS = 128, ROWS = 64, RUNS = 4, PITCH = 3 * RUNS + 1 };

// A thread has four columns, and so many rows that the block has ROWS.
template <int COLUMNS> struct Lanes {
    enum { EACH = 4, ACROSS = COLUMNS / EACH, DOWN = THREADS / ACROSS, ROWS_EACH = ROWS / DOWN };
    int row, column;  // the thread's first; the next ones are DOWN and ACROSS further
    __device__ Lanes() {
        // A warp is 8 by 4. Lanes that differ in bit 1 share rows, in bit 0 or 2 columns: loads of 16
        // bytes are served by quarters of a warp, which may be joined where neighbours want the same.
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps_across = ACROSS / 4;
        row = (lane & 1) + (lane >> 1 & 6) + 8 * (warp / warps_across);
        column = (lane >> 1 & 1) + (lane >> 3 & 2) + 4 * (warp % warps_across);
    }
};

// What a sum of products of codes begins with: read as a float, it is 1.5 * 2^23 plus the sum, exactly,
// as long as that is below 2^22; 32 products of signed bytes are 2^19 at most. To subtract it takes a
// quarter of the time of a conversion.
#define SUM_ZERO 0x4b400000
__device__ inline float float_of_sum(int sum) { return __int_as_float(sum) - 12582912.0f; }

// Rows' runs: codes, and (scales, minima).
template <typename T>
__device__ inline void decode_rows(int4 *shared, const Slot &w, const Job &job, int first, int count) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * RUNS; i += THREADS) {
        const int number = i % RUNS;
        // A row behind the last is the last once more: nobody looks at what becomes of it.
        const i64 row = min((i64)blockIdx.x * ROWS + i / RUNS, w.ne[1] - 1);
        if (number < count) {
            Run run;
            decode_run<T>(run, job.weights + row * w.nb[1], first + number);
            int4 *to = shared + i / RUNS * PITCH;
            to[2 * number] = run.front();
            to[2 * number + 1] = run.back();
            reinterpret_cast<float4 *>(to)[2 * RUNS + number] =
                make_float4(run.scale[0], run.scale[1], run.minimum[0], run.minimum[1]);
        }
    }
}

// Columns' runs as columns.cu has made them: codes, and (scale, sums).
template <int COLUMNS>
__device__ inline void load_columns(int4 *shared, const u8 *const *source, i64 k, int first, int count) {
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * 2 * RUNS; i += THREADS) {
        const int c = i / (2 * RUNS), half = i % (2 * RUNS);
        if (half < 2 * count) shared[c * PITCH + half] = codes_of(source[c])[2 * first + half];
    }
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * RUNS; i += THREADS) {
        const int c = i / RUNS, number = i % RUNS;
        if (number < count)
            reinterpret_cast<float4 *>(shared + c * PITCH)[2 * RUNS + number] =
                factors_of(source[c], k)[first + number];
    }
}

template <typename T, int COLUMNS> __device__ inline void multiply_tile(const Record &r, const Job &job) {
    typedef Lanes<COLUMNS> L;
    const Slot &to = r.slot[DST], &w = r.slot[SRC0];
    SHARED_ARRAY(int4, rows, ROWS * PITCH);
    SHARED_ARRAY(int4, columns, COLUMNS * PITCH);
    SHARED_ARRAY(const u8 *, source, COLUMNS);
    if (!job.valid) return;
    for (int c = threadIdx.x; c < COLUMNS; c += THREADS) source[c] = job.source(r, min(c, job.columns - 1));
    const L mine;
    float total[L::ROWS_EACH][L::EACH];
#pragma unroll
    for (int i = 0; i < L::ROWS_EACH; i++)
#pragma unroll
        for (int c = 0; c < L::EACH; c++) total[i][c] = 0;
    const int runs = (int)(w.ne[0] / 32);
    for (int first = 0; first < runs; first += RUNS) {
        const int count = min((int)RUNS, runs - first);
        __syncthreads();
        decode_rows<T>(rows, w, job, first, count);
        load_columns<COLUMNS>(columns, source, w.ne[0], first, count);
        __syncthreads();
#pragma unroll 1
        for (int number = 0; number < count; number++) {
            int4 front[L::EACH], back[L::EACH];
            float4 x[L::EACH];
#pragma unroll
            for (int c = 0; c < L::EACH; c++) {
                const int4 *column = columns + (mine.column + c * L::ACROSS) * PITCH;
                front[c] = column[2 * number];
                back[c] = column[2 * number + 1];
                x[c] = reinterpret_cast<const float4 *>(column)[2 * RUNS + number];
            }
#pragma unroll
            for (int i = 0; i < L::ROWS_EACH; i++) {
                const int4 *row = rows + (mine.row + i * L::DOWN) * PITCH;
                const int4 a = row[2 * number], b = row[2 * number + 1];
                const float4 y = reinterpret_cast<const float4 *>(row)[2 * RUNS + number];
#pragma unroll
                for (int c = 0; c < L::EACH; c++) {
                    float &sum = total[i][c];
                    if (T::SCALES == 1) {
                        sum += x[c].x * (y.x * float_of_sum(dot16(b, back[c], dot16(a, front[c], SUM_ZERO))));
                        if (T::MINIMA) sum += y.z * x[c].y;
                    } else {
                        sum += x[c].x * (y.x * float_of_sum(dot16(a, front[c], SUM_ZERO)) +
                                         y.y * float_of_sum(dot16(b, back[c], SUM_ZERO)));
                        if (T::MINIMA) sum += y.z * x[c].z + y.w * x[c].w;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int c = 0; c < L::EACH; c++) {
        const int column = mine.column + c * L::ACROSS;
        if (column >= job.columns) continue;
        u8 *target = job.target(r, column);
#pragma unroll
        for (int i = 0; i < L::ROWS_EACH; i++) {
            const i64 row = (i64)blockIdx.x * ROWS + mine.row + i * L::DOWN;
            if (row < w.ne[1]) *reinterpret_cast<float *>(target + row * to.nb[0]) = total[i][c];
        }
    }
}

// How many blocks shared memory has room for on a multiprocessor with 96 KiB, so many are to have
// registers. Where dot4 is many instructions they need twice as many.
#if !defined(CUDA_EMULATION) && __CUDA_ARCH__ < 610
#define BLOCKS(n) 2
#else
#define BLOCKS(n) n
#endif

// One set for each type, WEIGHTS. Blocks along x are tiles of rows. Columns are neighbours, unless
// extra[4] tells that experts choose them.
template <int COLUMNS> __device__ inline void make_tile(const Record &r) {
    multiply_tile<WEIGHTS, COLUMNS>(r, r.extra[4] ? grouped_job(r) : plain_job(r, COLUMNS));
}
KERNEL(tiles_16, THREADS, BLOCKS(5)) { make_tile<16>(r); }
KERNEL(tiles_32, THREADS, BLOCKS(4)) { make_tile<32>(r); }
KERNEL(tiles_64, THREADS, BLOCKS(3)) { make_tile<64>(r); }
