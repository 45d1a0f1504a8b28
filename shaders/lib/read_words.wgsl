// Reads eight channels of a row of Q, K or V word by word, where HEAD_DIM is no multiple of eight. What
// lies behind the last channel counts as zero, whatever it is.

alias element = u32;

// Words of a row, and how much of the last one is the row's.
const WORDS: u32 = select((HEAD_DIM + 1u) / 2u, HEAD_DIM, DTYPE == DTYPE_F32);
const LAST_WORD: u32 = select(0xffffffffu, 0xffffu, DTYPE != DTYPE_F32 && HEAD_DIM % 2u == 1u);

fn kept(word: u32, x: u32) -> u32 {
    return select(x, x & LAST_WORD, word + 1u == WORDS);
}

fn word_of_q(start: u32, word: u32) -> u32 {
    if (word < WORDS) {
        return kept(word, q[start + word]);
    }
    return 0u;
}

fn four_of_q(start: u32, word: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of_q(start, word),
        word_of_q(start, word + 1u),
        word_of_q(start, word + 2u),
        word_of_q(start, word + 3u),
    );
}

fn read_q(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        return Raw(four_of_q(start, 8u * column), four_of_q(start, 8u * column + 4u));
    }
    return Raw(four_of_q(start, 4u * column), vec4<u32>());
}

fn word_of_k(start: u32, word: u32) -> u32 {
    if (word < WORDS) {
        return kept(word, k[start + word]);
    }
    return 0u;
}

fn four_of_k(start: u32, word: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of_k(start, word),
        word_of_k(start, word + 1u),
        word_of_k(start, word + 2u),
        word_of_k(start, word + 3u),
    );
}

fn read_k(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        return Raw(four_of_k(start, 8u * column), four_of_k(start, 8u * column + 4u));
    }
    return Raw(four_of_k(start, 4u * column), vec4<u32>());
}

fn word_of_v(start: u32, word: u32) -> u32 {
    if (word < WORDS) {
        return kept(word, v[start + word]);
    }
    return 0u;
}

fn four_of_v(start: u32, word: u32) -> vec4<u32> {
    return vec4<u32>(
        word_of_v(start, word),
        word_of_v(start, word + 1u),
        word_of_v(start, word + 2u),
        word_of_v(start, word + 3u),
    );
}

fn read_v(start: u32, column: u32) -> Raw {
    if (DTYPE == DTYPE_F32) {
        return Raw(four_of_v(start, 8u * column), four_of_v(start, 8u * column + 4u));
    }
    return Raw(four_of_v(start, 4u * column), vec4<u32>());
}
