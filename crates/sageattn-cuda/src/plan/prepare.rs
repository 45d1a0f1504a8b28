//! How K and V become codes: the choice that [`choose`](super::choose) leaves to this file.

use sageattn_kernels::abi::MAX_PIECES;

use super::Machine;
use crate::quantize;
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
    for way in ways(quantize::tile_bytes(prepare.width, prepare.dtype)) {
        // The smallest cluster that will do, since its blocks wait for each other.
        let mut cluster = 1;
        while cluster < machine.largest_cluster && tiles.div_ceil(cluster) > way.tiles {
            cluster *= 2;
        }
        let each = tiles.div_ceil(cluster);
        // With fewer blocks than multiprocessors, two launches cut the heads finer.
        let blocks = 2 * u64::from(heads) * u64::from(cluster);
        let fills = blocks >= u64::from(machine.multiprocessors);
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

/// How `kv_prepare_sm90` uses a multiprocessor.
pub(super) struct Way {
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
pub(super) const fn ways(tile_bytes: u32) -> &'static [Way] {
    const fn way(blocks: u32, slots: u32, tiles: u32, most_tiles: u32) -> Way {
        Way {
            blocks,
            slots,
            tiles,
            most_tiles,
        }
    }
    match tile_bytes / 1024 {
        // Three blocks hide each other's waits, and there are no registers for a fourth. For longer
        // heads larger blocks: up to ten of a block's sixteen tiles are then read again, from L2.
        16 => const { &[way(3, 4, 4, 4), way(2, 6, 4, 16)] },
        // Registers for two blocks. Two of three slots are the head's: larger clusters beat fuller
        // slots. For longer heads a block has the multiprocessor to itself.
        32 => const { &[way(2, 3, 2, 2), way(1, 6, 4, 16)] },
        64 => const { &[way(1, 3, 2, 8)] },
        // A tile takes half of the memory: it could not come in while another is encoded.
        _ => &[],
    }
}

impl Way {
    pub(super) const fn variant(&self, prepare: &Prepare) -> PrepareOnce {
        PrepareOnce {
            width: prepare.width,
            dtype: prepare.dtype,
            smooth: prepare.smooth,
            slots: self.slots,
            blocks: self.blocks,
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

#[cfg(test)]
mod tests;
