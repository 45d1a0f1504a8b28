// Warpgroup matrix multiply-accumulate, 16-bit operands, f32 accumulators. PTX ISA 9.7.15.
//
// `rows` and `keys` or `values` are matrix descriptors; an A operand of four words is in registers: of a warp's 16 rows and 16 columns, word i holds row
// lane / 4 + 8 (i % 2), columns 8 (i / 2) + 2 (lane % 4) and the next. `accumulate` false: what the accumulator held does not count.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile/elements.cuh"

/// Names the accumulator as changed here, so that no use of it moves above the wait before.
template <int words>
DEVICE void wgmma_result(float (&tile)[words]) {
#pragma unroll
    for (int i = 0; i < words; ++i) asm volatile("" : "+f"(tile[i])::"memory");
}

#define WGMMA_FLOATS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_FLOATS_64(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24)
#define WGMMA_LIST_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_FLOATS_80(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32)
#define WGMMA_LIST_80 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_FLOATS_128(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56)
#define WGMMA_LIST_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_FLOATS_192(d) \
    WGMMA_FLOATS_128(d), WGMMA_FLOATS_8(d, 64), WGMMA_FLOATS_8(d, 72), WGMMA_FLOATS_8(d, 80), WGMMA_FLOATS_8(d, 88)
#define WGMMA_LIST_192 \
    WGMMA_LIST_128 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

/// S (64 x 80) = A B^T, A (64 x 16) and B (80 x 16) of f16 in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n80k16.
DEVICE void wgmma_scores(F16, float (&d)[40], u64 rows, u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %42, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" WGMMA_LIST_80 "}, %40, %41, keep, 1, 1, 0, 0; }"
                 : WGMMA_FLOATS_80(d)
                 : "l"(rows), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// S (64 x 128) = A B^T, A (64 x 16) of f16 in registers, B (128 x 16) in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k16.
DEVICE void wgmma_scores(F16, float (&d)[64], const u32 (&q)[4], u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" WGMMA_LIST_128 "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 0; }"
                 : WGMMA_FLOATS_128(d)
                 : "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// S (64 x 192) = A B^T, A (64 x 16) of f16 in registers, B (192 x 16) in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n192k16.
DEVICE void wgmma_scores(F16, float (&d)[96], const u32 (&q)[4], u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %101, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" WGMMA_LIST_192 "}, {%96, %97, %98, %99}, %100, keep, 1, 1, 0; }"
                 : WGMMA_FLOATS_192(d)
                 : "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// O (64 x 64) = A B, A (64 x 16) of f16 in registers, B (16 x 64) in shared memory, read across its rows. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n64k16.
DEVICE void wgmma_values(F16, float (&d)[32], u32 p0, u32 p1, u32 p2, u32 p3, u64 values, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" WGMMA_LIST_64 "}, {%32, %33, %34, %35}, %36, keep, 1, 1, 1; }"
                 : WGMMA_FLOATS_64(d)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(values), "r"(static_cast<u32>(accumulate)));
}

/// O (64 x 128) = A B, A (64 x 16) of f16 in registers, B (16 x 128) in shared memory, read across its rows. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k16.
DEVICE void wgmma_values(F16, float (&d)[64], u32 p0, u32 p1, u32 p2, u32 p3, u64 values, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" WGMMA_LIST_128 "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1; }"
                 : WGMMA_FLOATS_128(d)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(values), "r"(static_cast<u32>(accumulate)));
}

/// S (64 x 80) = A B^T, A (64 x 16) and B (80 x 16) of bf16 in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n80k16.
DEVICE void wgmma_scores(Bf16, float (&d)[40], u64 rows, u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %42, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" WGMMA_LIST_80 "}, %40, %41, keep, 1, 1, 0, 0; }"
                 : WGMMA_FLOATS_80(d)
                 : "l"(rows), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// S (64 x 128) = A B^T, A (64 x 16) of bf16 in registers, B (128 x 16) in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k16.
DEVICE void wgmma_scores(Bf16, float (&d)[64], const u32 (&q)[4], u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_LIST_128 "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 0; }"
                 : WGMMA_FLOATS_128(d)
                 : "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// S (64 x 192) = A B^T, A (64 x 16) of bf16 in registers, B (192 x 16) in shared memory. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n192k16.
DEVICE void wgmma_scores(Bf16, float (&d)[96], const u32 (&q)[4], u64 keys, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %101, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" WGMMA_LIST_192 "}, {%96, %97, %98, %99}, %100, keep, 1, 1, 0; }"
                 : WGMMA_FLOATS_192(d)
                 : "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "l"(keys), "r"(static_cast<u32>(accumulate)));
}

/// O (64 x 64) = A B, A (64 x 16) of bf16 in registers, B (16 x 64) in shared memory, read across its rows. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n64k16.
DEVICE void wgmma_values(Bf16, float (&d)[32], u32 p0, u32 p1, u32 p2, u32 p3, u64 values, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_LIST_64 "}, {%32, %33, %34, %35}, %36, keep, 1, 1, 1; }"
                 : WGMMA_FLOATS_64(d)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(values), "r"(static_cast<u32>(accumulate)));
}

/// O (64 x 128) = A B, A (64 x 16) of bf16 in registers, B (16 x 128) in shared memory, read across its rows. PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k16.
DEVICE void wgmma_values(Bf16, float (&d)[64], u32 p0, u32 p1, u32 p2, u32 p3, u64 values, bool accumulate) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_LIST_128 "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1; }"
                 : WGMMA_FLOATS_128(d)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(values), "r"(static_cast<u32>(accumulate)));
}

#undef WGMMA_FLOATS_8
#undef WGMMA_FLOATS_64
#undef WGMMA_LIST_64
#undef WGMMA_FLOATS_80
#undef WGMMA_LIST_80
#undef WGMMA_FLOATS_128
#undef WGMMA_LIST_128
#undef WGMMA_FLOATS_192
#undef WGMMA_LIST_192
