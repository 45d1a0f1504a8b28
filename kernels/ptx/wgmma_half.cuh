// Warpgroup matrix multiply-accumulate, 16-bit operands, f32 accumulators. PTX ISA 9.7.15.
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
#define WGMMA_LIST_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_FLOATS_64(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24)
#define WGMMA_LIST_80 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_FLOATS_80(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32)
#define WGMMA_LIST_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_FLOATS_96(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40)
#define WGMMA_LIST_112 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_FLOATS_112(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48)
#define WGMMA_LIST_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_FLOATS_128(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56)
#define WGMMA_LIST_160 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_FLOATS_160(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56), \
    WGMMA_FLOATS_8(d, 64), WGMMA_FLOATS_8(d, 72)
#define WGMMA_LIST_176 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_FLOATS_176(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56), \
    WGMMA_FLOATS_8(d, 64), WGMMA_FLOATS_8(d, 72), WGMMA_FLOATS_8(d, 80)
#define WGMMA_LIST_192 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_FLOATS_192(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56), \
    WGMMA_FLOATS_8(d, 64), WGMMA_FLOATS_8(d, 72), WGMMA_FLOATS_8(d, 80), WGMMA_FLOATS_8(d, 88)
#define WGMMA_LIST_208 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_FLOATS_208(d) \
    WGMMA_FLOATS_8(d, 0), WGMMA_FLOATS_8(d, 8), WGMMA_FLOATS_8(d, 16), WGMMA_FLOATS_8(d, 24), \
    WGMMA_FLOATS_8(d, 32), WGMMA_FLOATS_8(d, 40), WGMMA_FLOATS_8(d, 48), WGMMA_FLOATS_8(d, 56), \
    WGMMA_FLOATS_8(d, 64), WGMMA_FLOATS_8(d, 72), WGMMA_FLOATS_8(d, 80), WGMMA_FLOATS_8(d, 88), \
    WGMMA_FLOATS_8(d, 96)
// `a`, `b`, `keep`: numbers of the operands behind the accumulator.
#define WGMMA_SCORES_OF(type, ptx_type, columns, a, b, keep) \
    DEVICE void wgmma_scores(type, float(&d)[columns / 2], u64 rows, u64 keys, bool accumulate) { \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, " keep ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." ptx_type "." ptx_type " {" WGMMA_LIST_##columns "}, " \
                     a ", " b ", keep, 1, 1, 0, 0; }" \
                     : WGMMA_FLOATS_##columns(d) \
                     : "l"(rows), "l"(keys), "r"(static_cast<u32>(accumulate))); \
    }
#define WGMMA_SCORES(columns, a, b, keep) \
    WGMMA_SCORES_OF(F16, "f16", columns, a, b, keep) \
    WGMMA_SCORES_OF(Bf16, "bf16", columns, a, b, keep)
#define WGMMA_VALUES_OF(type, ptx_type, columns, a0, a1, a2, a3, b, keep) \
    DEVICE void wgmma_values(type, float(&d)[columns / 2], u32 p0, u32 p1, u32 p2, u32 p3, u64 values, bool accumulate) { \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, " keep ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." ptx_type "." ptx_type " {" WGMMA_LIST_##columns "}, " \
                     "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", keep, 1, 1, 1; }" \
                     : WGMMA_FLOATS_##columns(d) \
                     : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(values), "r"(static_cast<u32>(accumulate))); \
    }
#define WGMMA_VALUES(columns, a0, a1, a2, a3, b, keep) \
    WGMMA_VALUES_OF(F16, "f16", columns, a0, a1, a2, a3, b, keep) \
    WGMMA_VALUES_OF(Bf16, "bf16", columns, a0, a1, a2, a3, b, keep)
WGMMA_SCORES(64, "%32", "%33", "%34")
WGMMA_SCORES(80, "%40", "%41", "%42")
WGMMA_SCORES(96, "%48", "%49", "%50")
WGMMA_SCORES(112, "%56", "%57", "%58")
WGMMA_SCORES(128, "%64", "%65", "%66")
WGMMA_SCORES(160, "%80", "%81", "%82")
WGMMA_SCORES(176, "%88", "%89", "%90")
WGMMA_SCORES(192, "%96", "%97", "%98")
WGMMA_SCORES(208, "%104", "%105", "%106")
WGMMA_VALUES(64, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_VALUES(128, "%64", "%65", "%66", "%67", "%68", "%69")
