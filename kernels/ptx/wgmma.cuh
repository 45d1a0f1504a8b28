// Warpgroup matrix multiply-accumulate, 8-bit operands. PTX ISA 9.7.15.
//
// Every accumulator is an array of 32-bit words, also the f32 ones: the scores of one GEMM and the partial output of the next live in the same
// registers, and one type for both keeps the compiler from copying between them.
#pragma once
#include "ptx/types.cuh"

/// Orders register accesses before the GEMMs that follow. PTX ISA 9.7.15.7.1, wgmma.fence.
DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Closes the group of GEMMs issued so far. PTX ISA 9.7.15.7.2, wgmma.commit_group.
DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `pending` groups are in flight. PTX ISA 9.7.15.7.3, wgmma.wait_group.
template <int pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// Names the accumulator as changed here, so that no use of it moves above the wait before.
template <int words>
DEVICE void wgmma_result(i32 (&tile)[words]) {
#pragma unroll
    for (int i = 0; i < words; ++i) asm volatile("" : "+r"(tile[i])::"memory");
}

#define WGMMA_WORDS_4(d) "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
#define WGMMA_WORDS_8(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define WGMMA_WORDS_32(d, i) WGMMA_WORDS_8(d, i), WGMMA_WORDS_8(d, i + 8), WGMMA_WORDS_8(d, i + 16), WGMMA_WORDS_8(d, i + 24)
#define WGMMA_WORDS_64(d) WGMMA_WORDS_32(d, 0), WGMMA_WORDS_32(d, 32)

/// S (64 x 128, s32) = A B^T + (accumulate ? S : 0), A (64 x 32) and B (128 x 32) of s8 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k32.s32.s8.s8.
template <bool accumulate>
DEVICE void wgmma_m64n128k32_s8(i32 (&d)[64], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, \n"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, \n"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, \n"
        "%64, %65, keep; }"
        : WGMMA_WORDS_64(d)
        : "l"(a), "l"(b), "n"(accumulate));
}

/// S (64 x 64, s32) = A B^T + (accumulate ? S : 0), A (64 x 32) and B (64 x 32) of s8 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n64k32.s32.s8.s8.
template <bool accumulate>
DEVICE void wgmma_m64n64k32_s8(i32 (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, \n"
        "%32, %33, keep; }"
        : WGMMA_WORDS_32(d, 0)
        : "l"(a), "l"(b), "n"(accumulate));
}

/// T (64 x 64, f32) = A B^T + (accumulate ? T : 0), A (64 x 32) of e4m3 in registers, B (64 x 32) of e4m3 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n64k32.f32.e4m3.e4m3.
DEVICE void wgmma_k32_e4m3(i32 (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, \n"
        "{%32, %33, %34, %35}, %36, keep, 1, 1; }"
        : WGMMA_WORDS_32(d, 0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<u32>(accumulate)));
}

/// T (64 x 128, f32) = A B^T + (accumulate ? T : 0), A (64 x 32) of e4m3 in registers, B (128 x 32) of e4m3 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k32.f32.e4m3.e4m3.
DEVICE void wgmma_k32_e4m3(i32 (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, \n"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, \n"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, \n"
        "{%64, %65, %66, %67}, %68, keep, 1, 1; }"
        : WGMMA_WORDS_64(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<u32>(accumulate)));
}

/// T (64 x 64, s32) = A B^T + (accumulate ? T : 0), A (64 x 32) of u8 in registers, B (64 x 32) of u8 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n64k32.s32.u8.u8.
DEVICE void wgmma_k32_u8(i32 (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, \n"
        "{%32, %33, %34, %35}, %36, keep; }"
        : WGMMA_WORDS_32(d, 0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<u32>(accumulate)));
}

/// T (64 x 128, s32) = A B^T + (accumulate ? T : 0), A (64 x 32) of u8 in registers, B (128 x 32) of u8 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n128k32.s32.u8.u8.
DEVICE void wgmma_k32_u8(i32 (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.u8\n"
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, \n"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, \n"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, \n"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, \n"
        "{%64, %65, %66, %67}, %68, keep; }"
        : WGMMA_WORDS_64(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<u32>(accumulate)));
}

/// T (64 x 8, f32) = A B^T + (accumulate ? T : 0), A (64 x 32) of e4m3 in registers, B (8 x 32) of e4m3 in shared memory.
/// PTX ISA 9.7.15.5.2, wgmma.mma_async.m64n8k32.f32.e4m3.e4m3.
template <bool accumulate>
DEVICE void wgmma_m64n8k32_e4m3(i32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %9, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, keep, 1, 1; }"
        : WGMMA_WORDS_4(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(accumulate));
}

#undef WGMMA_WORDS_4
#undef WGMMA_WORDS_8
#undef WGMMA_WORDS_32
#undef WGMMA_WORDS_64
