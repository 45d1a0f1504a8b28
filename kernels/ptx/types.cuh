// Fixed-width names. NVRTC is given no system header, so nothing here may include one.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "the ABI counts in 32- and 64-bit words");

#define DEVICE __device__ __forceinline__

/// A number as a type, for arguments that must be constants.
template <int n>
struct Constant {
    static constexpr int value = n;
};
