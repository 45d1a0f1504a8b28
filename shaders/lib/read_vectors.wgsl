// Reads eight channels of a row of Q, K or V as 16-byte vectors: rows start on one, and HEAD_DIM is a
// multiple of eight.

alias element = vec4<u32>;

fn read_q(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        let at = start / 4u + 2u * column;
        return Raw(q[at], q[at + 1u]);
    }
    return Raw(q[start / 4u + column], vec4<u32>());
}

fn read_k(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        let at = start / 4u + 2u * column;
        return Raw(k[at], k[at + 1u]);
    }
    return Raw(k[start / 4u + column], vec4<u32>());
}

fn read_v(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        let at = start / 4u + 2u * column;
        return Raw(v[at], v[at + 1u]);
    }
    return Raw(v[start / 4u + column], vec4<u32>());
}
