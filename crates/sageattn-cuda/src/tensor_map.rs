//! Strided tensors as the copy engine takes them.

use std::ptr;

use cudarc::driver::sys;
use sageattn_core::{DType, Error};
use sageattn_kernels::abi::{BOX_CHANNELS, TensorMap};

use crate::buffer::Tensor;

/// `tensor`, of `[batch, heads, len, head_dim]` elements, in boxes of [`BOX_CHANNELS`] channels and `rows`
/// rows of one head, swizzled as the tensor cores read them (`tile/swizzle.cuh`). What a box has outside
/// of the tensor arrives as zeros. Computed on the host, in about a microsecond; the driver keeps nothing.
///
/// # Errors
/// [`Error::Device`] when the driver does not take the strides.
pub(crate) fn encode(
    name: &'static str,
    tensor: &Tensor,
    shape: [u32; 4],
    dtype: DType,
    rows: u32,
) -> Result<TensorMap, Error> {
    let [batch, heads, len, head_dim] = shape;
    let extents = [head_dim, len, heads, batch].map(u64::from);
    let [of_batch, of_head, of_row] = tensor.strides;
    let bytes = |extent: u32, stride: i64| match extent {
        // Never walked, so it may be anything; the driver wants a multiple of 16.
        1 => 16,
        _ => stride.cast_unsigned() * dtype.size() as u64,
    };
    let strides = [
        bytes(len, of_row),
        bytes(heads, of_head),
        bytes(batch, of_batch),
    ];
    let extents_of_box = [BOX_CHANNELS, rows, 1, 1];
    let every_element = [1; 4];
    let element = match dtype {
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    let failed = |cause| Error::device(format!("encoding {name} for the copy engine"), cause);
    let address = usize::try_from(tensor.address).map_err(|error| failed(error.to_string()))?;
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: `map` is aligned and written before the call returns; four extents, three strides, four
    // box extents and four element strides, as many as the rank asks for. The address is only stored.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            4,
            ptr::without_provenance_mut(address),
            extents.as_ptr(),
            strides.as_ptr(),
            extents_of_box.as_ptr(),
            every_element.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|error| failed(error.to_string()))?;
    Ok(TensorMap(map.opaque))
}
