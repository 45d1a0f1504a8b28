//! O as a file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use sageattn::{DType, Description, Device, HostTensor, Layout, Problem};

use crate::args::mask_name;

/// A place where O can be written, checked before the work starts.
#[derive(Debug)]
pub(crate) struct Target(PathBuf);

impl Target {
    /// Checks that the folder is there and that no input is overwritten.
    pub(crate) fn new(path: &Path, input: &Path) -> Result<Self> {
        let named = || format!("output {}", path.display());
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        ensure!(
            folder.is_dir(),
            "{}: no folder {}",
            named(),
            folder.display()
        );
        ensure!(!path.is_dir(), "{}: is a folder", named());
        // Either path may not exist; then they are not the same file.
        if let (Ok(path), Ok(input)) = (path.canonicalize(), input.canonicalize()) {
            ensure!(path != input, "{}: is the input", named());
        }
        Ok(Self(path.to_owned()))
    }

    /// Writes `out` with the input's metadata and, beside it, what was computed and how.
    pub(crate) fn write(
        &self,
        problem: &Problem,
        out: &[f32],
        mut metadata: HashMap<String, String>,
        device: &Device,
        plan: &Description,
    ) -> Result<()> {
        let shape = problem.shape().q();
        let tensor = HostTensor::from_f32(Layout::hnd(shape), problem.dtype(), out)?;
        let dtype = match problem.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::F32 => Dtype::F32,
        };
        let view = TensorView::new(dtype, shape.to_vec(), tensor.bytes())?;
        metadata.extend([
            (
                "softmax_scale".to_owned(),
                problem.softmax_scale().to_string(),
            ),
            ("mask".to_owned(), mask_name(problem.mask()).to_owned()),
            ("sageattn_backend".to_owned(), device.name().to_owned()),
            ("sageattn_device".to_owned(), device.device().name),
            ("sageattn_recipe".to_owned(), plan.recipe.to_string()),
            ("sageattn_variant".to_owned(), plan.variant.clone()),
        ]);
        // `mask` says more.
        metadata.remove("causal");
        let bytes = serialize([("out", view)], Some(metadata))?;
        std::fs::write(&self.0, bytes).with_context(|| format!("output {}", self.0.display()))
    }
}
