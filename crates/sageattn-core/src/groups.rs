//! Which rows share a scale. The oracles, the scratch sizes and every kernel's host code count with
//! this arithmetic and no other.

/// The rows of Q and K that share one quantization scale, counted from row 0 of each (batch, head).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grouping {
    /// One scale for a whole (batch, head).
    PerTensor,
    /// One scale for each block of consecutive rows.
    PerBlock {
        /// Rows of a block of Q.
        q: usize,
        /// Rows of a block of K.
        k: usize,
    },
    /// One scale for each row.
    PerToken,
    /// The rows that one thread of a tensor-core kernel holds (SageAttention2, arXiv 2411.10958,
    /// section 3.2): within each block of Q the rows equal modulo 8, within each block of K the rows
    /// whose `(row % 8) / 2` is equal. Named after the threads, defined by the rows.
    PerThread {
        /// Rows of a block of Q, a multiple of 8.
        q: usize,
        /// Rows of a block of K, a multiple of 8.
        k: usize,
    },
}

impl Grouping {
    /// The groups of Q's rows.
    pub const fn q(self) -> Groups {
        Groups(match self {
            Self::PerTensor => Rule::Whole,
            Self::PerBlock { q, .. } => Rule::Block(q),
            Self::PerToken => Rule::Block(1),
            Self::PerThread { q, .. } => Rule::Strided {
                block: q,
                per_block: 8,
                divisor: 1,
            },
        })
    }

    /// The groups of K's rows.
    pub const fn k(self) -> Groups {
        Groups(match self {
            Self::PerTensor => Rule::Whole,
            Self::PerBlock { k, .. } => Rule::Block(k),
            Self::PerToken => Rule::Block(1),
            Self::PerThread { k, .. } => Rule::Strided {
                block: k,
                per_block: 4,
                divisor: 2,
            },
        })
    }
}

/// The map from the rows of one tensor to the groups that share a scale.
///
/// ```
/// use sageattn_core::Grouping;
/// let groups = Grouping::PerThread { q: 16, k: 128 };
/// assert_eq!(groups.q().of(17), 8 + 1);
/// assert_eq!(groups.k().of(130), 4 + 1);
/// assert_eq!(groups.k().count(129), 8);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups(Rule);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Rule {
    Whole,
    Block(usize),
    Strided {
        block: usize,
        per_block: usize,
        divisor: usize,
    },
}

impl Groups {
    /// The group of `row`.
    pub const fn of(self, row: usize) -> usize {
        match self.0 {
            Rule::Whole => 0,
            Rule::Block(rows) => row / rows,
            Rule::Strided {
                block,
                per_block,
                divisor,
            } => (row / block) * per_block + (row % 8) / divisor,
        }
    }

    /// Scales stored for `len` rows: whole blocks, also where the last one is partial.
    pub const fn count(self, len: usize) -> usize {
        match self.0 {
            Rule::Whole => 1,
            Rule::Block(rows) => len.div_ceil(rows),
            Rule::Strided {
                block, per_block, ..
            } => len.div_ceil(block) * per_block,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn per_thread_is_the_fragment_layout_of_the_paper() {
        let groups = Grouping::PerThread { q: 16, k: 128 };
        // A Q group is a pair of rows 8 apart; a K group is 32 keys, two neighbours out of every 8.
        let rows = |g: Groups, group: usize, len: usize| -> Vec<usize> {
            (0..len).filter(|&row| g.of(row) == group).collect()
        };
        assert_eq!(rows(groups.q(), 3, 64), [3, 11]);
        assert_eq!(rows(groups.q(), 8, 64), [16, 24]);
        assert_eq!(rows(groups.k(), 1, 256)[..4], [2, 3, 10, 11]);
        assert_eq!(rows(groups.k(), 1, 256).len(), 32);
    }

    proptest! {
        #[test]
        fn every_row_has_a_group_within_the_count(row in 0usize..5000, extra in 0usize..300) {
            let kinds = [
                Grouping::PerTensor,
                Grouping::PerBlock { q: 128, k: 64 },
                Grouping::PerToken,
                Grouping::PerThread { q: 16, k: 128 },
            ];
            for grouping in kinds {
                for groups in [grouping.q(), grouping.k()] {
                    prop_assert!(groups.of(row) < groups.count(row + 1 + extra));
                }
            }
        }
    }
}
