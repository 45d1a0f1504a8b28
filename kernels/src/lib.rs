//! The CUDA kernels of `sageattn` as source text, and the structs that host and device agree on. No logic.

pub mod abi;

/// Every source: its path as `#include` names it, and its text.
pub const SOURCES: &[(&str, &str)] = &[
    ("abi.cuh", include_str!("../abi.cuh")),
    ("attn/mask.cuh", include_str!("../attn/mask.cuh")),
    ("attn/scales.cuh", include_str!("../attn/scales.cuh")),
    ("attn/softmax.cuh", include_str!("../attn/softmax.cuh")),
    ("ptx/bulk_copy.cuh", include_str!("../ptx/bulk_copy.cuh")),
    ("ptx/math.cuh", include_str!("../ptx/math.cuh")),
    ("ptx/mbarrier.cuh", include_str!("../ptx/mbarrier.cuh")),
    ("ptx/memory.cuh", include_str!("../ptx/memory.cuh")),
    ("ptx/sync.cuh", include_str!("../ptx/sync.cuh")),
    ("ptx/types.cuh", include_str!("../ptx/types.cuh")),
    ("ptx/wgmma.cuh", include_str!("../ptx/wgmma.cuh")),
    ("quant/kv_encode.cu", include_str!("../quant/kv_encode.cu")),
    (
        "quant/kv_statistics.cu",
        include_str!("../quant/kv_statistics.cu"),
    ),
    (
        "quant/operations.cuh",
        include_str!("../quant/operations.cuh"),
    ),
    ("quant/q_rows.cuh", include_str!("../quant/q_rows.cuh")),
    ("sm90/attn_i8_f8.cu", include_str!("../sm90/attn_i8_f8.cu")),
    ("tile/elements.cuh", include_str!("../tile/elements.cuh")),
    ("tile/ring.cuh", include_str!("../tile/ring.cuh")),
    (
        "tile/store_rows.cuh",
        include_str!("../tile/store_rows.cuh"),
    ),
    ("tile/swizzle.cuh", include_str!("../tile/swizzle.cuh")),
    ("tile/turns.cuh", include_str!("../tile/turns.cuh")),
];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// The sources under `folder`, as paths from `root`.
    fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else if path.extension().is_some_and(|x| x == "cu" || x == "cuh") {
                let path = path.strip_prefix(root).unwrap().to_str().unwrap();
                found.push(path.replace('\\', "/"));
            }
        }
    }

    #[test]
    fn every_file_is_embedded() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut found = Vec::new();
        walk(root, root, &mut found);
        found.sort();
        let listed: Vec<&str> = super::SOURCES.iter().map(|(path, _)| *path).collect();
        assert_eq!(found, listed);
    }
}
