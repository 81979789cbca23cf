// What sparse attention and hyper connections of DeepSeek's models need.
#include "place.cuh"

// How much each token wants each position: for each element of (positions, tokens, 1, streams) the
// sum over heads of products of query and key, those below 0 left out, with the heads' weights, and
// the mask. Keys (E, 1, positions, streams) are loaded one by one. extra: elements.
KERNEL(lightning_indexer, 128) {
    const Slot &to = r.slot[DST], &q = r.slot[SRC0], &k = r.slot[SRC1], &weights = r.slot[SRC2], &mask = r.slot[SRC3];
    FOR_PLACES(p, to, r.extra[0]) {
        const i64 position = p.i[0], token = p.i[1], stream = p.i[3];
        float sum = 0;
        for (i64 head = 0; head < q.ne[1]; head++) {
            float product = 0;
            for (i64 i = 0; i < q.ne[0]; i++)
                product += f32(at(q, i, head, token, stream)) * load(k, i, 0, position, stream);
            sum += fmaxf(product, 0) * f32(at(weights, head, token, 0, stream));
        }
        f32(at(to, p)) = sum + load(mask, position, token, 0, stream % mask.ne[3]);
    }
}

enum { STREAMS = 4, FIRST = 2 * STREAMS };

// A thread makes a token's matrix: softmax over destinations, then sums over sources and
// destinations made 1 in turn. param: eps, rounds. extra: tokens.
KERNEL(combine, 128) {
    const Slot &to = r.slot[DST], &mixes = r.slot[SRC0], &scale = r.slot[SRC1], &base = r.slot[SRC2];
    const float eps = param_f32(r, 0), factor = f32(at(scale, 2));
    FOR_ELEMENTS(token, r.extra[0]) {
        float m[STREAMS][STREAMS];
        for (int i = 0; i < STREAMS; i++) {
            float top = -INF, sum = 0;
            for (int j = 0; j < STREAMS; j++) {
                const int place = FIRST + STREAMS * i + j;
                m[i][j] = f32(at(mixes, place, token)) * factor + f32(at(base, place));
                top = fmaxf(top, m[i][j]);
            }
            for (int j = 0; j < STREAMS; j++) sum += m[i][j] = expf(m[i][j] - top);
            for (int j = 0; j < STREAMS; j++) m[i][j] = m[i][j] / sum + eps;
        }
        for (i64 round = 0; round < r.param[1]; round++) {
            if (round)
                for (int i = 0; i < STREAMS; i++) {
                    float sum = 0;
                    for (int j = 0; j < STREAMS; j++) sum += m[i][j];
                    for (int j = 0; j < STREAMS; j++) m[i][j] *= 1 / (sum + eps);
                }
            for (int j = 0; j < STREAMS; j++) {
                float sum = 0;
                for (int i = 0; i < STREAMS; i++) sum += m[i][j];
                for (int i = 0; i < STREAMS; i++) m[i][j] *= 1 / (sum + eps);
            }
        }
        for (int i = 0; i < STREAMS; i++)
            for (int j = 0; j < STREAMS; j++) f32(at(to, j, i, token)) = m[i][j];
    }
}

// (E, streams, tokens) to (E, tokens): streams with weights, or gates (param[1]), times param[0].
KERNEL(streams_to_one, 256) {
    const Slot &to = r.slot[DST], &x = r.slot[SRC0], &weights = r.slot[SRC1];
    FOR_PLACES(p, to, r.extra[0]) {
        float sum = 0;
        for (i64 s = 0; s < x.ne[1]; s++) {
            const float value = f32(at(x, p.i[0], s, p.i[1]));
            if (r.param[1]) sum += value / (1 + expf(-f32(at(weights, p.i[0], s, p.i[1]))));
            else sum += f32(at(weights, s, p.i[1])) * value;
        }
        f32(at(to, p)) = param_f32(r, 0) * sum;
    }
}

// The reverse: x (E, tokens) with weights (streams, tokens) added to residuals (E, streams, tokens),
// which source 3 (destinations, sources, tokens) has mixed if extra[1].
KERNEL(one_to_streams, 256) {
    const Slot &to = r.slot[DST], &x = r.slot[SRC0], &residual = r.slot[SRC1], &post = r.slot[SRC2], &mix = r.slot[SRC3];
    FOR_PLACES(p, to, r.extra[0]) {
        float value = 0;
        if (r.extra[1]) {
            for (i64 s = 0; s < to.ne[1]; s++)
                value += f32(at(mix, p.i[1], s, p.i[2])) * f32(at(residual, p.i[0], s, p.i[2]));
        } else {
            value = f32(at(residual, p));
        }
        f32(at(to, p)) = f32(at(x, p.i[0], p.i[2])) * f32(at(post, p.i[1], p.i[2])) + value;
    }
}
