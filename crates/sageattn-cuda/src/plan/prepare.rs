//! How K and V become codes: the choice that [`choose`](super::choose) leaves to this file.

use sageattn_core::DType;
use sageattn_kernels::abi::MAX_PIECES;

use super::Machine;
use crate::variant::{Prepare, PrepareOnce};

/// How K and V become codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preparation {
    /// Statistics, then codes: K and V are read twice, by as many blocks as fill the device.
    Twice(Prepare),
    /// In one launch: clusters keep K or V of a head in their shared memory. As many clusters as the
    /// device holds take turns, or each has its own head and the device schedules them.
    Once {
        variant: PrepareOnce,
        takes_turns: bool,
    },
}

/// Reads K and V once where that is faster; also says into how many pieces each head is cut (blocks of a
/// cluster, if so), and how many tiles those have.
pub(super) fn preparation(
    prepare: Prepare,
    heads: u32,
    tiles: u32,
    machine: Machine,
) -> (Preparation, u32, u32) {
    let jobs = 2 * u64::from(heads);
    let multiprocessors = u64::from(machine.multiprocessors);
    for way in ways(prepare.width, prepare.dtype) {
        // The smallest cluster that will do, since its blocks wait for each other. While blocks leave
        // multiprocessors without, a few more cost less than they bring.
        let mut cluster = 1;
        loop {
            let each = tiles.div_ceil(cluster);
            let idle = jobs * u64::from(cluster) < u64::from(way.blocks) * multiprocessors;
            let spread = idle && each > 1 && cluster < CHEAP_CLUSTER;
            if 2 * cluster > machine.largest_cluster || !(each > way.tiles || spread) {
                break;
            }
            cluster *= 2;
        }
        let each = tiles.div_ceil(cluster);
        // On less than half of the device, two launches that cut the heads finer are no slower.
        let fills = 2 * jobs * u64::from(cluster) >= multiprocessors;
        if cluster <= machine.largest_cluster && each <= way.most_tiles && fills {
            let preparation = Preparation::Once {
                variant: way.variant(&prepare),
                // A block that is alone on its multiprocessor has the next head's tiles come in while it
                // encodes this one's. Where there are several, one loads while another encodes; and
                // where tiles are read again, the next head's would only be in their way.
                takes_turns: way.blocks == 1 && each <= way.slots,
            };
            return (preparation, cluster, each);
        }
    }
    let (pieces, tiles_per_piece) = pieces(heads, tiles, machine.multiprocessors);
    (Preparation::Twice(prepare), pieces, tiles_per_piece)
}

/// Up to this size the blocks of a cluster hardly notice each other.
const CHEAP_CLUSTER: u32 = 4;

/// How `kv_prepare_sm90` uses a multiprocessor.
struct Way {
    /// Blocks on it, and tiles that each has room for.
    blocks: u32,
    slots: u32,
    /// Tiles of a head that a block should have, and the most that it may: those that it has no room
    /// for are read again.
    tiles: u32,
    most_tiles: u32,
}

/// By the size of a tile; the first whose clusters can be large enough wins. 227 KiB of a multiprocessor
/// hold 192 KiB of tiles beside a row of statistics for each warp. What each was measured against:
/// `docs/kernels/kv_prepare_sm90.md`.
const fn ways(width: u32, dtype: DType) -> &'static [Way] {
    const fn way(blocks: u32, slots: u32, tiles: u32, most_tiles: u32) -> Way {
        Way {
            blocks,
            slots,
            tiles,
            most_tiles,
        }
    }
    match (width, dtype) {
        // 16 KiB a tile. Three blocks hide each other's waits, and there are no registers for a fourth.
        // For longer heads larger blocks; the most is 64 Ki keys, where five tiles of six are read again
        // (one launch is still a tenth faster there).
        (64, DType::F16 | DType::BF16) => const { &[way(3, 4, 4, 4), way(2, 6, 4, 32)] },
        // 32 KiB. Registers for two blocks. For longer heads a block has the multiprocessor to itself.
        (128, DType::F16 | DType::BF16) => const { &[way(2, 3, 3, 3), way(1, 6, 4, 32)] },
        // Half the codes for the same bytes: one block is enough, if its slots never stand empty.
        (64, DType::F32) => const { &[way(1, 6, 4, 32)] },
        // 64 KiB: two tiles, and one of the next head's.
        (256, DType::F16 | DType::BF16) | (128, DType::F32) => const { &[way(1, 3, 2, 16)] },
        // A tile takes half of the memory: it could not come in while another is encoded.
        _ => &[],
    }
}

impl Way {
    const fn variant(&self, prepare: &Prepare) -> PrepareOnce {
        PrepareOnce {
            width: prepare.width,
            dtype: prepare.dtype,
            smooth: prepare.smooth,
            slots: self.slots,
            blocks: self.blocks,
            pv: prepare.pv,
        }
    }
}

/// Into how many pieces the statistics cut each head, and tiles of each.
fn pieces(heads: u32, tiles: u32, multiprocessors: u32) -> (u32, u32) {
    // A multiprocessor holds eight blocks of 256 threads: enough pieces that the K blocks alone fill
    // the device. More would only lengthen the sums in the second launch.
    let wanted = (8 * multiprocessors).div_ceil(heads);
    let pieces = wanted.clamp(1, MAX_PIECES).min(tiles);
    let tiles_per_piece = tiles.div_ceil(pieces);
    (tiles.div_ceil(tiles_per_piece), tiles_per_piece)
}

/// Every kernel that reads K and V once, for tensors of this kind.
pub(super) fn once(prepare: &Prepare) -> impl Iterator<Item = PrepareOnce> {
    let ways = ways(prepare.width, prepare.dtype).iter();
    ways.map(|way| way.variant(prepare))
}

#[cfg(test)]
mod tests;
