// The copy engine, for boxes of strided tensors. PTX ISA 9.7.9.27.
#pragma once
#include "ptx/types.cuh"

/// A tensor as the driver encodes it for the copy engine (cuTensorMapEncodeTiled): address, extents, strides, box, swizzle. PTX ISA 5.5.8.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

/// Fetches the map itself, so that the first copy need not wait for it. PTX ISA 9.7.9.16, prefetch.tensormap.
DEVICE void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Copies the map's box at (column, row, head, batch) and reports it to `barrier`, always with all its bytes: what lies outside of the tensor
/// arrives as zeros. PTX ISA 9.7.9.27.1.2, cp.async.bulk.tensor.
DEVICE void tensor_copy_to_shared(u32 to, const TensorMap& map, i32 column, i32 row, i32 head, i32 batch, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
                 : "memory");
}
