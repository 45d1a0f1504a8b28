// Reductions over a quad: the four lanes that share the rows of an accumulator fragment.
#pragma once
#include "ptx/types.cuh"

/// Sum over the quad that shares the rows.
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/// Maximum over the quad that shares the rows.
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
