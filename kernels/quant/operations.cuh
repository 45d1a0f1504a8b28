// What the statistics of K and V are joined by. Both start from 0.
#pragma once
#include "ptx/types.cuh"

struct Add {
    DEVICE static float join(float total, float x) {
        return total + x;
    }
};
struct LargestMagnitude {
    DEVICE static float join(float total, float x) {
        return fmaxf(total, fabsf(x));
    }
};
