// Where a byte of an operand tile lies in shared memory, and how the tensor core is told.
//
// wgmma reads 8-bit operands "K-major": rows of consecutive bytes, eight rows to an atom, the 16-byte chunks of a row XORed with the row's number
// so that eight rows of one chunk fall into eight different banks. PTX ISA 9.7.15.5.1. Rows here are 128 bytes, or 64 where a tile is only 64
// bytes wide; tiles wider than 128 bytes are several such panels, one after the other.
#pragma once
#include "ptx/types.cuh"

/// Bytes of one row of a panel.
template <int width>
constexpr int PANEL_WIDTH = width < 128 ? width : 128;

/// Offset of byte `column` of row `row` in a tile of `rows` rows and `width` bytes.
template <int rows, int width>
DEVICE u32 swizzled(int row, int column) {
    static_assert(width == 64 || width % 128 == 0, "a row fills a 64- or 128-byte swizzle atom");
    constexpr int panel = PANEL_WIDTH<width>;
    const int chunk = column % panel / 16;
    const int mixed = chunk ^ (panel == 128 ? row % 8 : row / 2 % 4);
    return column / panel * rows * panel + row * panel + mixed * 16 + column % 16;
}

/// Row of a transposed tile of V that holds `channel`. Of 32 channels a lane of the PV GEMM's accumulator has columns 8 j + 2 c and the next, c = lane % 4: in
/// this order these are eight neighbouring channels, which it can store at once.
DEVICE int row_of_channel(int channel) {
    return channel / 32 * 32 + channel / 2 % 4 * 8 + channel / 8 % 4 * 2 + channel % 2;
}

/// Matrix descriptor of a tile that starts at `address`, aligned to its swizzle atom; shared memory ends long before the field's 18 bits do. PTX ISA 9.7.15.5.1.2.2.
template <int width>
DEVICE u64 operand_descriptor(u32 address) {
    constexpr u64 eight_rows = 8 * PANEL_WIDTH<width>;
    constexpr u64 mode = width >= 128 ? 1 : width == 64 ? 2 : 3;
    return mode << 62 | (eight_rows >> 4) << 32 | u64{1} << 16 | u64{address >> 4};
}

/// The descriptor of an operand `bytes` behind. In the low word alone, of which the compiler is not told that it belongs to a larger number: a 64-bit
/// sum would carry from one half to the other in every GEMM's issue.
DEVICE u64 descriptor_at(u64 descriptor, u32 bytes) {
    const u32 low = static_cast<u32>(descriptor) + bytes / 16, high = static_cast<u32>(descriptor >> 32);
    u64 moved;
    asm("mov.b64 %0, {%1, %2};" : "=l"(moved) : "r"(low), "r"(high));
    return moved;
}

/// Bytes from the start of a tile to its 32-byte slice `slice` along a row, for descriptors.
template <int rows, int width>
DEVICE constexpr int slice_offset(int slice) {
    constexpr int panel = PANEL_WIDTH<width>;
    return slice * 32 / panel * rows * panel + slice * 32 % panel;
}

/// The same for 16-bit operands that lie with their other dimension along the rows ("MN-major"): B = V, rows of channels, one row a key. Panels of
/// 64 channels follow each other; adding bytes / 16 of whole rows moves the first key.
template <int rows>
DEVICE u64 transposed_descriptor(u32 address) {
    constexpr u64 eight_rows = 8 * 128, panel = rows * 128;
    static_assert(panel >> 4 < 1 << 14, "the field has 14 bits");
    return u64{1} << 62 | (eight_rows >> 4) << 32 | (panel >> 4) << 16 | u64{(address & 0x3ffff) >> 4};
}
