// Ops that make each element of the result of one element of each source. All compute in F32.
//
// extra: rows and elements of a row as they are walked (1 and all where everything is dense).
#include "gated.cuh"

// UnaryOp, then ops that are functions by themselves (lower/elementwise.py has the same numbers).
enum {
    ABS, SGN, NEG, STEP, TANH, ELU, RELU, SIGMOID, GELU, GELU_QUICK, SILU, HARDSWISH, HARDSIGMOID,
    EXP, EXPM1, SOFTPLUS, GELU_ERF, XIELU, FLOOR, CEIL, ROUND, TRUNC,
    SQR = 100, SQRT, LOG, SIN, COS, SCALE, CLAMP, LEAKY_RELU
};

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float hard_sigmoid(float x) { return fminf(1, fmaxf(0, (x + 3) / 6)); }

__device__ inline float xielu(const Record &r, float x) {
    const float alpha_n = param_f32(r, 1), alpha_p = param_f32(r, 2), beta = param_f32(r, 3), eps = param_f32(r, 4);
    if (x > 0) return alpha_p * x * x + beta * x;
    return (expm1f(fminf(x, eps)) - x) * alpha_n + beta * x;
}

__device__ inline float function(const Record &r, int which, float x, i64 type) {
    switch (which) {
    case ABS: return fabsf(x);
    case SGN: return x > 0 ? 1 : x < 0 ? -1 : 0;
    case NEG: return -x;
    case STEP: return x > 0 ? 1 : 0;
    case TANH: return tanhf(x);
    case ELU: return x > 0 ? x : expm1f(x);
    case RELU: return x > 0 ? x : 0;
    case SIGMOID: return sigmoid(x);
    case GELU: return gelu(x, type);
    case GELU_QUICK: return gelu_quick(x, type);
    case SILU: return silu(x);
    case HARDSWISH: return x * hard_sigmoid(x);
    case HARDSIGMOID: return hard_sigmoid(x);
    case EXP: return expf(x);
    case EXPM1: return expm1f(x);
    case SOFTPLUS: return x > 20 ? x : logf(1 + expf(x));
    case GELU_ERF: return gelu_erf(x);
    case XIELU: return xielu(r, x);
    case FLOOR: return floorf(x);
    case CEIL: return ceilf(x);
    case ROUND: return roundf(x);
    case TRUNC: return truncf(x);
    case SQR: return x * x;
    case SQRT: return sqrtf(x);
    case LOG: return logf(x);
    case SIN: return sinf(x);
    case COS: return cosf(x);
    case SCALE: {
        const float bias = param_f32(r, 1), scaled = x * param_f32(r, 0);
        // Adding 0 would turn -0 into 0.
        return bias == 0 ? scaled : scaled + bias;
    }
    case CLAMP: {
        // As C's MIN and MAX: NaN becomes a bound.
        const float low = param_f32(r, 0), high = param_f32(r, 1);
        const float capped = x < high ? x : high;
        return capped > low ? capped : low;
    }
    case LEAKY_RELU: return (x > 0 ? x : 0) + param_f32(r, 0) * (x < 0 ? x : 0);
    }
    return 0;
}

// extra[2]: the function.
KERNEL(unary, 256) {
    const Slot &to = r.slot[DST], &from = r.slot[SRC0];
    const int which = (int)r.extra[2];
    FOR_ROWS(row, r.extra[0]) {
        const Row at(to, row);
        u8 *target = at.in(to);
        const u8 *source = at.in(from);
        FOR_COLUMNS(i, r.extra[1])
            store_f32(target + i * to.nb[0], to.type, function(r, which, load_f32(source + i * from.nb[0], from.type), from.type));
    }
}

enum { ADD, SUB, MUL, DIV };

// extra[2]: which of them; source 1 is repeated over source 0. extra[3]: elements of a row of
// source 1 (all are walked as one row where nothing repeats but a single element).
KERNEL(binary, 256) {
    const Slot &to = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1];
    const int which = (int)r.extra[2];
    const i64 width = r.extra[3];
    FOR_ROWS(row, r.extra[0]) {
        const Row at(to, row);
        u8 *target = at.in(to);
        const u8 *first = at.in(a), *second = at.repeated_in(b);
        FOR_COLUMNS(i, r.extra[1]) {
            const i64 j = i < width ? i : width == 1 ? 0 : i % width;
            const float x = load_f32(first + i * a.nb[0], a.type), y = load_f32(second + j * b.nb[0], b.type);
            const float value = which == ADD ? x + y : which == SUB ? x - y : which == MUL ? x * y : x / y;
            store_f32(target + i * to.nb[0], to.type, value);
        }
    }
}

// Sources 0 and 1 are what is gated, and the gate.
KERNEL(glu, 256) {
    const Slot &to = r.slot[DST], &a = r.slot[SRC0], &b = r.slot[SRC1];
    FOR_ROWS(row, r.extra[0]) {
        const Row at(to, row);
        u8 *target = at.in(to);
        const u8 *first = at.in(a), *second = at.in(b);
        FOR_COLUMNS(i, r.extra[1]) {
            const float x = load_f32(first + i * a.nb[0], a.type), gate = load_f32(second + i * b.nb[0], b.type);
            store_f32(target + i * to.nb[0], to.type, gated(r, x, gate, a.type));
        }
    }
}
