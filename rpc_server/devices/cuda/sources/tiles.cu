// Products of a matrix with many columns, as reading a prompt makes them: by tensor cores where a card has
// them (mma.cuh), four codes at a time where it has none. Weights of blocks are decoded once for all
// columns of a tile, and multiplied as the codes they are; those of half precision or BF16 need tensor
// cores for it, and rows at multiples of 16 bytes.
//
// Columns come from columns.cu. For blocks they are rounded as for matvec.cu: tokens that are read
// together give what they give one by one, but for roundings of sums.
#include "columns.cuh"
#include "mma.cuh"
#include "weights.cuh"

// What WEIGHTS are to the code below: a type of blocks, or floats, which have neither scales nor minima.
#ifdef FLOATS
template <int TYPE_> struct Plain : Kind<0, 0> {
    enum { TYPE = TYPE_ };
};
typedef Plain<WEIGHTS> Weights;
#else
typedef WEIGHTS Weights;
#endif

#if !defined(FLOATS) || ARCHITECTURE >= 750

// A block of threads makes ROWS times COLUMNS elements of the result, RUNS runs of K at a time: of 32
// codes, or of 16 floats, which are 32 bytes, too. In shared memory rows and columns look the same: runs,
// then, for codes, a float4 for each. That they are an odd number of times 16 bytes apart has eight
// neighbours lie in different banks, and so the words that the lanes of a warp load of eight neighbours.
enum {
    THREADS = 128, ROWS = 64, RUNS = 4,
    RUN = Weights::SCALES ? 32 : 16, PITCH = (Weights::SCALES ? 3 : 2) * RUNS + 1
};

// What a sum of products of codes begins with: read as a float, it is 1.5 * 2^23 plus the sum, exactly,
// as long as that is below 2^22; 32 products of signed bytes are 2^19 at most. To subtract it takes a
// quarter of the time of a conversion.
#define SUM_ZERO 0x4b400000
__device__ inline float float_of_sum(int sum) { return __int_as_float(sum) - 12582912.0f; }

// What a run adds to an element of the result: `x` and `y` are the column's and the row's factors. Of
// types with one scale for a run `first` is the sum of all its products, of others that of a half.
template <typename T>
__device__ inline void add_sums(float &total, const float4 &x, const float4 &y, int first, int second) {
    if (T::SCALES == 1) {
        total += x.x * (y.x * float_of_sum(first));
        if (T::MINIMA) total += y.z * x.y;
    } else {
        total += x.x * (y.x * float_of_sum(first) + y.y * float_of_sum(second));
        if (T::MINIMA) total += y.z * x.z + y.w * x.w;
    }
}

// A row's, or a column's, codes and factors of one run.
__device__ inline float4 factors_in(const int4 *shared, int which, int number) {
    return reinterpret_cast<const float4 *>(shared + which * PITCH)[2 * RUNS + number];
}

// Which elements of the result a thread has: ROWS_EACH times EACH, and what they come to so far. `add`
// adds what run `number` of those that are in shared memory comes to.
#if defined(TENSOR_CORES) || defined(FLOATS)

// A warp has as many neighbours as products of 16 rows with 8 columns fill, as near to a square as may be.
template <int COLUMNS> struct Lanes {
    enum {
        ACROSS = COLUMNS > 16 ? 2 : 1, DOWN = THREADS / 32 / ACROSS,
        ROWS_EACH = ROWS / DOWN / 8, EACH = COLUMNS / ACROSS / 4
    };
    int first_row, first_column;  // of the warp
    FloatSums total[ROWS_EACH / 2][EACH / 2];
    __device__ Lanes() : total() {
        const int warp = threadIdx.x / 32;
        first_row = warp / ACROSS * (ROWS / DOWN);
        first_column = warp % ACROSS * (COLUMNS / ACROSS);
    }
    __device__ int row(int i) const { return first_row + i / 2 * 16 + row_of_sum(i % 2 * 2); }
    __device__ int column(int c) const { return first_column + c / 2 * 8 + column_of_sum(c % 2); }
    __device__ float at(int i, int c) const { return total[i / 2][c / 2].of[i % 2 * 2 + c % 2]; }

    template <typename T> __device__ void add(const int4 *rows, const int4 *columns, int number) {
        RowWords a[ROWS_EACH / 2];
        float4 y[ROWS_EACH];
#pragma unroll
        for (int i = 0; i < ROWS_EACH / 2; i++)
            a[i] = rows_of_lane(rows + (first_row + 16 * i) * PITCH + 2 * number, PITCH);
        if constexpr (T::SCALES != 0) {
#pragma unroll
            for (int i = 0; i < ROWS_EACH; i++) y[i] = factors_in(rows, row(i), number);
        }
#pragma unroll
        for (int c = 0; c < EACH; c += 2) {
            const int4 *eight = columns + (first_column + 4 * c) * PITCH + 2 * number;
            const ColumnWords b = columns_of_lane(eight, PITCH);
            if constexpr (T::SCALES == 0) {
#pragma unroll
                for (int i = 0; i < ROWS_EACH / 2; i++) add_whole<T::TYPE>(total[i][c / 2], a[i], b);
            } else {
                const float4 x[2] = {factors_in(columns, column(c), number), factors_in(columns, column(c + 1), number)};
#pragma unroll
                for (int i = 0; i < ROWS_EACH; i += 2) {
                    Sums first = {{SUM_ZERO, SUM_ZERO, SUM_ZERO, SUM_ZERO}}, second = first;
                    if (T::SCALES == 1) {
                        add_whole(first, a[i / 2], b);
                    } else {
                        add_half<0>(first, a[i / 2], b);
                        add_half<1>(second, a[i / 2], b);
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        add_sums<T>(total[i / 2][c / 2].of[j], x[j % 2], y[i + j / 2], first.of[j], second.of[j]);
                }
            }
        }
    }
};

#else

// A thread has four columns, and so many rows that the block has ROWS.
template <int COLUMNS> struct Lanes {
    enum { EACH = 4, ACROSS = COLUMNS / EACH, DOWN = THREADS / ACROSS, ROWS_EACH = ROWS / DOWN };
    int first_row, first_column;  // the thread's; the next ones are DOWN and ACROSS further
    float total[ROWS_EACH][EACH];
    __device__ Lanes() : total() {
        // A warp is 8 by 4. Lanes that differ in bit 1 share rows, in bit 0 or 2 columns: loads of 16
        // bytes are served by quarters of a warp, which may be joined where neighbours want the same.
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps_across = ACROSS / 4;
        first_row = (lane & 1) + (lane >> 1 & 6) + 8 * (warp / warps_across);
        first_column = (lane >> 1 & 1) + (lane >> 3 & 2) + 4 * (warp % warps_across);
    }
    __device__ int row(int i) const { return first_row + i * DOWN; }
    __device__ int column(int c) const { return first_column + c * ACROSS; }
    __device__ float at(int i, int c) const { return total[i][c]; }

    template <typename T> __device__ void add(const int4 *rows, const int4 *columns, int number) {
        int4 front[EACH], back[EACH];
        float4 x[EACH];
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const int4 *codes = columns + column(c) * PITCH + 2 * number;
            front[c] = codes[0];
            back[c] = codes[1];
            x[c] = factors_in(columns, column(c), number);
        }
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++) {
            const int4 *codes = rows + row(i) * PITCH + 2 * number;
            const int4 a = codes[0], b = codes[1];
            const float4 y = factors_in(rows, row(i), number);
#pragma unroll
            for (int c = 0; c < EACH; c++) {
                const int first = dot16(a, front[c], SUM_ZERO);
                if (T::SCALES == 1) add_sums<T>(total[i][c], x[c], y, dot16(b, back[c], first), 0);
                else add_sums<T>(total[i][c], x[c], y, first, dot16(b, back[c], SUM_ZERO));
            }
        }
    }
};

#endif

// Row number `i` of the tile. One behind the last is the last once more: nobody looks at what becomes of it.
__device__ inline const u8 *row_of_tile(const Job &job, int i) {
    return job.weights + min((i64)blockIdx.x * ROWS + i, job.rows - 1) * job.row_bytes;
}

// What brings runs of rows and of columns to shared memory. `ask` begins to load from run `first` on,
// `put` writes what was asked for last; there may be fewer than RUNS. `source` are the columns.
#ifndef FLOATS

template <int COLUMNS> struct Loads {
    const Job &job;
    const u8 *const *source;
    i64 k;
    int first, count;
    __device__ Loads(const Job &job, const u8 *const *source, i64 k) : job(job), source(source), k(k) {}
    __device__ void ask(int run) {
        first = run;
        count = min((int)RUNS, (int)(k / RUN) - run);
    }
    __device__ void put(int4 *rows, int4 *columns) const {
        put_rows<Weights>(rows);
        put_columns(columns);
    }

    // Rows' runs: codes, and (scales, minima).
    template <typename T> __device__ void put_rows(int4 *shared) const {
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * RUNS; i += THREADS) {
            const int number = i % RUNS;
            if (number < count) {
                Run run;
                decode_run<T>(run, row_of_tile(job, i / RUNS), first + number);
                int4 *to = shared + i / RUNS * PITCH;
                to[2 * number] = run.front();
                to[2 * number + 1] = run.back();
                reinterpret_cast<float4 *>(to)[2 * RUNS + number] =
                    make_float4(run.scale[0], run.scale[1], run.minimum[0], run.minimum[1]);
            }
        }
    }

    // Columns' runs as columns.cu has made them: codes, and (scale, sums).
    __device__ void put_columns(int4 *shared) const {
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
};

#else

// Floats are on their way in registers while those before them are multiplied: a thread has of some rows
// and columns the same eight elements. Behind the end of K are zeros.
template <int COLUMNS> struct Loads {
    enum { UNITS = 2 * RUNS, APART = THREADS / UNITS };
    const Job &job;
    const u8 *const *source;
    int units, mine, first;
    int4 of_rows[ROWS / APART], of_columns[COLUMNS / APART];
    __device__ Loads(const Job &job, const u8 *const *source, i64 k)
        : job(job), source(source), units((int)(k / 8)), mine(threadIdx.x % UNITS), first(threadIdx.x / UNITS) {}
    __device__ int4 unit(const u8 *from, int number) const {
        return number < units ? reinterpret_cast<const int4 *>(from)[number] : make_int4(0, 0, 0, 0);
    }
    __device__ void ask(int run) {
        const int number = 2 * run + mine;
#pragma unroll
        for (int i = 0; i < ROWS / APART; i++) of_rows[i] = unit(row_of_tile(job, first + i * APART), number);
#pragma unroll
        for (int c = 0; c < COLUMNS / APART; c++) of_columns[c] = unit(source[first + c * APART], number);
    }
    __device__ void put(int4 *rows, int4 *columns) const {
#pragma unroll
        for (int i = 0; i < ROWS / APART; i++) rows[(first + i * APART) * PITCH + mine] = of_rows[i];
#pragma unroll
        for (int c = 0; c < COLUMNS / APART; c++) columns[(first + c * APART) * PITCH + mine] = of_columns[c];
    }
};

#endif

template <int COLUMNS> __device__ inline void multiply_tile(const Record &r, const Job &job) {
    typedef Lanes<COLUMNS> L;
    const Slot &to = r.slot[DST], &w = r.slot[SRC0];
    SHARED_ARRAY(int4, rows, ROWS * PITCH);
    SHARED_ARRAY(int4, columns, COLUMNS * PITCH);
    SHARED_ARRAY(const u8 *, source, COLUMNS);
    if (!job.valid) return;
    for (int c = threadIdx.x; c < COLUMNS; c += THREADS) source[c] = job.source(r, min(c, job.columns - 1));
    __syncthreads();
    L mine;
    Loads<COLUMNS> loads(job, source, w.ne[0]);
    const int runs = (int)((w.ne[0] + RUN - 1) / RUN);
    loads.ask(0);
    for (int first = 0; first < runs; first += RUNS) {
        const int count = min((int)RUNS, runs - first);
        loads.put(rows, columns);
        __syncthreads();
        if (first + RUNS < runs) loads.ask(first + RUNS);
#pragma unroll 1
        for (int number = 0; number < count; number++) mine.template add<Weights>(rows, columns, number);
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < L::EACH; c++) {
        const int column = mine.column(c);
        if (column >= job.columns) continue;
        const float factor = Weights::SCALES ? 1 : factor_of_floats(source[column], w.ne[0]);
        u8 *target = job.target(r, column);
#pragma unroll
        for (int i = 0; i < L::ROWS_EACH; i++) {
            const i64 row = (i64)blockIdx.x * ROWS + mine.row(i);
            if (row < w.ne[1]) *reinterpret_cast<float *>(target + row * to.nb[0]) = mine.at(i, c) * factor;
        }
    }
}

// How many blocks shared memory has room for on a multiprocessor with 96 KiB, so many are to have
// registers. Where dot4 is many instructions they need twice as many.
#if ARCHITECTURE < 610
#define BLOCKS(n) 2
#else
#define BLOCKS(n) n
#endif

// One set for each type, WEIGHTS. Blocks along x are tiles of rows. Columns are neighbours, unless
// extra[4] tells that experts choose them.
template <int COLUMNS> __device__ inline void make_tile(const Record &r) {
    multiply_tile<COLUMNS>(r, r.extra[4] ? grouped_job(r) : plain_job(r, COLUMNS));
}
KERNEL(tiles_16, THREADS, BLOCKS(5)) { make_tile<16>(r); }
KERNEL(tiles_32, THREADS, BLOCKS(4)) { make_tile<32>(r); }
KERNEL(tiles_64, THREADS, BLOCKS(3)) { make_tile<64>(r); }
#ifdef FLOATS
KERNEL(tiles_128, THREADS, 3) { make_tile<128>(r); }
#endif
#endif
