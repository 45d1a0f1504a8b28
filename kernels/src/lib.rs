//! The CUDA sources of `sageattn`, embedded, and the structs that they share with the host.
//!
//! Nothing is decided here. `crates/sageattn-cuda` compiles a file of [`SOURCES`] with NVRTC, giving it all the others as in-memory headers under
//! the names in the table, and launches it with a struct of [`abi`]. `README.md` says what each entry point wants.
//!
//! ```
//! let (_, text) = sageattn_kernels::SOURCES.iter().find(|(path, _)| *path == "sm90/attn_i8_f8.cu").unwrap();
//! assert!(text.contains("attn_i8_f8_sm90"));
//! ```

#![forbid(unsafe_code)]

pub mod abi;

/// `(path, text)` of one source, the path being the name in `#include "..."`.
macro_rules! sources {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $path)))),*]
    };
}

/// Every source by its path: headers (`.cuh`) and entry files (`.cu`).
pub const SOURCES: &[(&str, &str)] = sources![
    "abi.cuh",
    "attn/mask.cuh",
    "attn/quad.cuh",
    "attn/scales.cuh",
    "attn/softmax.cuh",
    "attn/softmax_half.cuh",
    "attn/softmax_u8.cuh",
    "ptx/async_copy.cuh",
    "ptx/bulk_copy.cuh",
    "ptx/cluster.cuh",
    "ptx/math.cuh",
    "ptx/mbarrier.cuh",
    "ptx/memory.cuh",
    "ptx/mma_half.cuh",
    "ptx/sync.cuh",
    "ptx/tensor_copy.cuh",
    "ptx/types.cuh",
    "ptx/wgmma.cuh",
    "ptx/wgmma_half.cuh",
    "quant/kv_encode.cu",
    "quant/kv_statistics.cu",
    "quant/operations.cuh",
    "quant/q_rows.cuh",
    "quant/residual.cuh",
    "quant/v_codes.cuh",
    "sm90/attn_block.cuh",
    "sm90/attn_half.cu",
    "sm90/attn_i8_f8.cu",
    "sm90/attn_producer.cuh",
    "sm90/kv_prepare.cu",
    "tile/elements.cuh",
    "tile/ring.cuh",
    "tile/store_rows.cuh",
    "tile/swizzle.cuh",
    "tile/turns.cuh",
];

#[cfg(test)]
mod tests {
    use super::SOURCES;

    #[test]
    fn every_include_is_in_the_table() {
        for (path, text) in SOURCES {
            for line in text
                .lines()
                .filter_map(|line| line.strip_prefix("#include \""))
            {
                let name = line.trim_end_matches('"');
                assert!(
                    SOURCES.iter().any(|(other, _)| *other == name),
                    "{path} includes {name}, which is not embedded"
                );
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_in_the_table() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        for folder in ["attn", "ptx", "quant", "sm90", "tile"] {
            for entry in root.join(folder).read_dir().unwrap() {
                let name = format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap());
                assert!(
                    SOURCES.iter().any(|(path, _)| *path == name),
                    "{name} is not embedded"
                );
            }
        }
    }
}
