// Ops that carry a state from token to token. The state is changed where the result has it; each
// element of it belongs to one thread, so that nothing has to wait for a block.
#include "place.cuh"

__device__ inline const float *floats(const Slot &s) { return reinterpret_cast<const float *>(s.data); }

// (window - 1 + tokens, channels, sequences) with (window, channels) to (channels, tokens,
// sequences). extra: elements.
KERNEL(ssm_conv, 256) {
    const Slot &to = r.slot[DST], &x = r.slot[SRC0], &weights = r.slot[SRC1];
    FOR_PLACES(p, to, r.extra[0]) {
        float sum = 0;
        for (i64 k = 0; k < weights.ne[0]; k++)
            sum += f32(at(x, p.i[1] + k, p.i[0], p.i[2])) * f32(at(weights, k, p.i[0]));
        f32(at(to, p)) = sum;
    }
}

// -- states whose rows are summed over: a warp has a row, a lane every 32nd column ----------------

#define FOR_ROWS_OF_WARPS(row, n)                                               \
    for (i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < (n); \
         row += (i64)gridDim.x * (blockDim.x / 32))
#define FOR_LANES(j, n) for (i64 j = threadIdx.x % 32; j < (n); j += 32)

// Sources: states (S, D, heads, any), x (D, heads, tokens, sequences), dt (heads, tokens, sequences),
// decays (S or 1, heads), B and C (S, groups, tokens, sequences), the sequences' states.
// extra: states that are kept, the latest first. The result is x's shape, then theirs.
KERNEL(ssm_scan, 128) {
    const Slot &states = r.slot[SRC0], &x = r.slot[SRC1], &dt = r.slot[SRC2], &decays = r.slot[SRC3];
    const Slot &b = r.slot[SRC4], &c = r.slot[SRC4 + 1], &ids = r.slot[SRC4 + 2];
    float *const outputs = reinterpret_cast<float *>(r.slot[DST].data);
    const i64 size = states.ne[0], dim = x.ne[0], heads = x.ne[1], tokens = x.ne[2], sequences = x.ne[3];
    const i64 rows = dim * heads * sequences, kept = r.extra[0], per_group = heads / b.ne[1];
    float *const saved = outputs + rows * tokens;
    FOR_ROWS_OF_WARPS(row, rows) {
        const i64 d = row % dim, head = row / dim % heads, sequence = row / dim / heads;
        const i64 id = index_of_warp(at(ids, sequence), ids.type);
        if (!is_index(r, id, states.ne[3])) continue;
        float *const state = saved + row * size;
        const u8 *first = at(states, 0, d, head, id);
        FOR_LANES(j, size) state[j] = *reinterpret_cast<const float *>(first + j * states.nb[0]);
        for (i64 token = 0; token < tokens; token++) {
            const float raw = f32(at(dt, head, token, sequence)), step = raw > 20 ? raw : logf(1 + expf(raw));
            const float added = f32(at(x, d, head, token, sequence)) * step;
            const u8 *in = at(b, 0, head / per_group, token, sequence), *out = at(c, 0, head / per_group, token, sequence);
            const i64 age = tokens - 1 - token;
            float sum = 0;
            FOR_LANES(j, size) {
                const float decay = expf(step * f32(at(decays, decays.ne[0] == 1 ? 0 : j, head)));
                const float value = state[j] * decay + added * *reinterpret_cast<const float *>(in + j * b.nb[0]);
                state[j] = value;
                sum += value * *reinterpret_cast<const float *>(out + j * c.nb[0]);
                if (age && age < kept) saved[(age * rows + row) * size + j] = value;
            }
            sum = over_warp(sum, Sum());
            if (threadIdx.x % 32 == 0) outputs[(sequence * tokens + token) * dim * heads + head * dim + d] = sum;
        }
    }
}

// Sources: r, w, k, v, a, b, all (S, heads, tokens), and states. extra: sequences.
KERNEL(wkv7, 128) {
    const i64 size = r.slot[SRC0].ne[0], heads = r.slot[SRC0].ne[1], tokens = r.slot[SRC0].ne[2];
    const i64 sequences = r.extra[0], each = tokens / sequences, width = size * heads;
    const float *read = floats(r.slot[1]), *w = floats(r.slot[2]), *k = floats(r.slot[3]), *v = floats(r.slot[4]);
    const float *a = floats(r.slot[5]), *b = floats(r.slot[6]), *states = floats(r.slot[7]);
    float *const outputs = reinterpret_cast<float *>(r.slot[DST].data), *const saved = outputs + width * tokens;
    FOR_ROWS_OF_WARPS(row, width * sequences) {
        const i64 i = row % size, head = row / size % heads, sequence = row / width;
        float *const state = saved + row * size;
        FOR_LANES(j, size) state[j] = states[row * size + j];
        for (i64 token = sequence * each; token < (sequence + 1) * each; token++) {
            const i64 now = token * width + head * size;
            float removed = 0, sum = 0;
            FOR_LANES(j, size) removed += state[j] * a[now + j];
            removed = over_warp(removed, Sum());
            FOR_LANES(j, size) {
                const float value = state[j] * w[now + j] + v[now + i] * k[now + j] + removed * b[now + j];
                state[j] = value;
                sum += value * read[now + j];
            }
            sum = over_warp(sum, Sum());
            if (threadIdx.x % 32 == 0) outputs[now + i] = sum;
        }
    }
}

// Sources: queries and keys (S, any heads, tokens, any sequences), values (S, heads, tokens,
// sequences), gates (1 or S, ...), rates (1, ...), states. extra: states that are kept.
// What a state holds at a key is replaced by the value, as far as the rate says.
KERNEL(delta_net, 128) {
    const Slot &q = r.slot[SRC0], &k = r.slot[SRC1], &v = r.slot[SRC2], &gates = r.slot[SRC3], &rates = r.slot[SRC4];
    const float *states = floats(r.slot[SRC4 + 1]);
    const i64 size = v.ne[0], heads = v.ne[1], tokens = v.ne[2], sequences = v.ne[3], kept = r.extra[0];
    const i64 rows = size * heads * sequences;
    float *const outputs = reinterpret_cast<float *>(r.slot[DST].data), *const saved = outputs + rows * tokens;
    const float scale = 1 / sqrtf((float)size);
    if (!tokens && kept > 1) return;
    FOR_ROWS_OF_WARPS(row, rows) {
        const i64 i = row % size, head = row / size % heads, sequence = row / size / heads;
        float *const state = saved + row * size;
        FOR_LANES(j, size) state[j] = states[row * size + j];
        for (i64 token = 0; token < tokens; token++) {
            const u8 *key = at(k, 0, head % k.ne[1], token, sequence / (sequences / k.ne[3]));
            const u8 *query = at(q, 0, head % q.ne[1], token, sequence / (sequences / q.ne[3]));
            const i64 age = tokens - 1 - token;
            float known = 0, sum = 0;
            FOR_LANES(j, size) {
                state[j] *= expf(f32(at(gates, gates.ne[0] == 1 ? 0 : j, head, token, sequence)));
                known += state[j] * *reinterpret_cast<const float *>(key + j * k.nb[0]);
            }
            known = over_warp(known, Sum());
            const float change = (f32(at(v, i, head, token, sequence)) - known) * f32(at(rates, 0, head, token, sequence));
            FOR_LANES(j, size) {
                const float value = state[j] + change * *reinterpret_cast<const float *>(key + j * k.nb[0]);
                state[j] = value;
                sum += value * *reinterpret_cast<const float *>(query + j * q.nb[0]);
                if (age && age < kept) saved[(age * rows + row) * size + j] = value;
            }
            sum = over_warp(sum, Sum());
            if (threadIdx.x % 32 == 0) outputs[((sequence * tokens + token) * heads + head) * size + i] = sum * scale;
        }
    }
}

// -- states whose columns are summed over: a thread has a column -----------------------------------

// The column that a thread of a block, and element `e` of the result's states, has: a state of
// S * S for each head of each sequence.
struct Column {
    i64 size, width, head, j, begin, end;
    const float *before;
    float *state, *outputs;

    __device__ Column(const Record &r, const Slot &states, i64 e) {
        const i64 heads = r.slot[SRC0].ne[1], tokens = r.slot[SRC0].ne[2], sequences = r.extra[1];
        size = r.slot[SRC0].ne[0];
        width = size * heads;
        j = e % size;
        head = e / size % heads;
        const i64 sequence = e / width, each = tokens / sequences, first = e / size * size * size + j;
        begin = sequence * each;
        end = begin + each;
        outputs = reinterpret_cast<float *>(r.slot[DST].data);
        state = outputs + width * tokens + first;
        before = floats(states) + first;
        for (i64 i = 0; i < size; i++) state[i * size] = before[i * size];
    }
};

// Sources: k, v, r (S, heads, tokens), the first's weights (S, heads), decays, states.
// extra: columns of all states, sequences.
KERNEL(wkv6, 128) {
    const float *k = floats(r.slot[1]), *v = floats(r.slot[2]), *read = floats(r.slot[3]);
    const float *weight = floats(r.slot[4]), *decay = floats(r.slot[5]);
    FOR_ELEMENTS(e, r.extra[0]) {
        const Column c(r, r.slot[6], e);
        for (i64 token = c.begin; token < c.end; token++) {
            const i64 now = token * c.width + c.head * c.size;
            const float value = v[now + c.j];
            float sum = 0, own = 0;
            for (i64 i = 0; i < c.size; i++) {
                float &s = c.state[i * c.size];
                sum += read[now + i] * s;
                own += read[now + i] * weight[c.head * c.size + i] * k[now + i];
                s = s * decay[now + i] + k[now + i] * value;
            }
            c.outputs[now + c.j] = sum + own * value;
        }
    }
}

// Sources: k, v, q, gates (S, heads, tokens), states. param[0]: scale. extra as wkv6.
KERNEL(gated_linear, 128) {
    const float *k = floats(r.slot[1]), *v = floats(r.slot[2]), *q = floats(r.slot[3]), *gate = floats(r.slot[4]);
    const float scale = param_f32(r, 0);
    FOR_ELEMENTS(e, r.extra[0]) {
        const Column c(r, r.slot[5], e);
        for (i64 token = c.begin; token < c.end; token++) {
            const i64 now = token * c.width + c.head * c.size;
            const float value = v[now + c.j];
            float sum = 0;
            for (i64 i = 0; i < c.size; i++) {
                float &s = c.state[i * c.size];
                s = s * gate[now + i] + k[now + i] * value;
                sum += q[now + i] * scale * s;
            }
            c.outputs[now + c.j] = sum;
        }
    }
}

// -- triangular systems ----------------------------------------------------------------------------

// A X = B: a thread has a column of X, from the first row to the last. extra: columns of all.
KERNEL(solve_triangular, 128) {
    const Slot &x = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1];
    FOR_ELEMENTS(e, r.extra[0]) {
        const i64 column = e % x.ne[0], i2 = e / x.ne[0] % x.ne[2], i3 = e / x.ne[0] / x.ne[2];
        for (i64 row = 0; row < x.ne[1]; row++) {
            float known = 0;
            for (i64 k = 0; k < row; k++) known += f32(at(a, k, row, i2, i3)) * f32(at(x, column, k, i2, i3));
            f32(at(x, column, row, i2, i3)) = (f32(at(b, column, row, i2, i3)) - known) / f32(at(a, row, row, i2, i3));
        }
    }
}
