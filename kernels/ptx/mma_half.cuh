// Matrix multiply-accumulate of one warp, 16-bit operands, f32 accumulator. PTX ISA 9.7.14.5.14.
//
// Fragments are those of wgmma: A as its A operand in registers, D as eight columns of its accumulator. B as load_matrices brings eight rows of 32 bytes.
#pragma once
#include "tile/elements.cuh"

/// D (16 x 8) += A B^T, A (16 x 16) and B (8 x 16) of f16. PTX ISA 9.7.14.5.14, mma.m16n8k16.
DEVICE void mma_k16(F16, float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// D (16 x 8) += A B^T, A (16 x 16) and B (8 x 16) of bf16. PTX ISA 9.7.14.5.14, mma.m16n8k16.
DEVICE void mma_k16(Bf16, float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
