// Which keys a row sees.
#pragma once
#include "ptx/types.cuh"

/// Score of a key that the row does not see. No product of s8 rows reaches it (256 * 127 * 127 < 2^23), and a maximum passes over it. The
/// exponentials test for it: times a tiny scale no finite score is surely nothing.
constexpr float HIDDEN = -2147483648.f;

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

/// Hides what lies past the last visible key of each of this thread's two rows. Fragment of S: word 4j + 2h + e is row 8h + lane / 4,
/// column 8j + 2 (lane % 4) + e; `past[h]` is the row's last visible key less the tile's first and less 2 (lane % 4).
DEVICE void hide_keys(float (&scores)[64], const i32 (&past)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const int column = i / 4 * 8 + i % 2;
        if (column > past[i / 2 % 2]) scores[i] = HIDDEN;
    }
}
