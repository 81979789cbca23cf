// Functions of single values that a gate is made with, and GLU itself.
#pragma once

#include "kernel.cuh"

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

// GELU and its quick form as ggml's CPU backend has them, by table: argument and result are rounded to
// half precision. Of BF16 neither is; far from 0 GELU of F32 is the argument, or 0.
__device__ inline float as_half(float x) { return half_to_float(float_to_half(x)); }
__device__ inline float gelu(float x, i64 type) {
    if (type == F32 && (x >= 10 || x <= -10)) return x > 0 ? x : 0;
    if (type != BF16) x = as_half(x);
    const float inner = 0.79788456080286535588f * x * fmaf(x * 0.044715f, x, 1);
    const float y = 0.5f * x * (1 + tanhf(inner));
    return type == BF16 ? y : as_half(y);
}
__device__ inline float gelu_quick(float x, i64 type) {
    if (type != BF16) x = as_half(x);
    const float y = x * (1 / (1 + expf(-1.702f * x)));
    return type == BF16 ? y : as_half(y);
}
__device__ inline float gelu_erf(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752440f)); }

enum { REGLU, GEGLU, SWIGLU, SWIGLU_OAI, GEGLU_ERF, GEGLU_QUICK, SWIGLU_CLAMP };

// GLU of elements of `type`; param: that of GLU.
__device__ inline float gated(const Record &r, float x, float gate, i64 type) {
    const float alpha = param_f32(r, 2), limit = param_f32(r, 3);
    // A NaN stays one, as by C++'s min and clamp: not so by fminf.
    const float within = gate < -limit ? -limit : limit < gate ? limit : gate;
    const float capped = limit < x ? limit : x;
    switch (r.param[0]) {
    case REGLU: return x > 0 ? x * gate : 0;
    // Far below 0 ggml doesn't look at the gate of F32, whatever it is.
    case GEGLU: return type == F32 && x <= -10 ? 0 : gelu(x, type) * gate;
    case SWIGLU: return silu(x) * gate;
    case SWIGLU_OAI: return capped / (1 + expf(-alpha * capped)) * (within + 1);
    case GEGLU_ERF: return gelu_erf(x) * gate;
    case GEGLU_QUICK: return gelu_quick(x, type) * gate;
    case SWIGLU_CLAMP: return silu(capped) * within;
    }
    return 0;
}
