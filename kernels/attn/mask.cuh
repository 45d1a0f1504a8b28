// Which keys a row sees.
#pragma once
#include "ptx/types.cuh"

/// Whether a tile holds keys that some row does not see, as a type.
struct Masked {
    static constexpr bool value = true;
};
struct Unmasked {
    static constexpr bool value = false;
};

/// Last key that `row` sees, -1 if none.
template <bool causal>
DEVICE i32 last_visible_key(i64 row, i64 diagonal, u32 kv_len) {
    const i64 end = static_cast<i64>(kv_len) - 1;
    if constexpr (!causal) return static_cast<i32>(end);
    const i64 last = row + diagonal;
    return static_cast<i32>(last < -1 ? -1 : last > end ? end : last);
}

/// Fragment of S: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e.
DEVICE constexpr int fragment_row(int word) {
    return word / 2 % 2;
}
DEVICE constexpr int fragment_column(int word) {
    return word / 4 * 8 + word % 2;
}
