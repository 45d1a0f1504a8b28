//! Small files to run the command on, and what it answered.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use tempfile::NamedTempFile;

/// A file of tensors to be written: `q`, `k` and `v` that fit each other, until a test changes one.
#[derive(Clone)]
pub(crate) struct Fixture {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) metadata: Vec<(&'static str, String)>,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) fill: Fill,
}

#[derive(Clone, Copy)]
pub(crate) enum Fill {
    /// Values between plus and minus this amplitude.
    Wave(f32),
    /// One value in every element.
    Value(f32),
}

impl Fixture {
    /// One batch, two heads, nine queries and keys, sixteen channels, f32.
    pub(crate) fn good() -> Self {
        let tensor = |name| Tensor {
            name,
            dtype: Dtype::F32,
            shape: vec![1, 2, 9, 16],
            fill: Fill::Wave(1.0),
        };
        Self {
            tensors: vec![tensor("q"), tensor("k"), tensor("v")],
            metadata: Vec::new(),
        }
    }

    pub(crate) fn shape(mut self, name: &str, shape: &[usize]) -> Self {
        self.tensor(name).shape = shape.to_vec();
        self
    }

    pub(crate) fn dtype(mut self, name: &str, dtype: Dtype) -> Self {
        self.tensor(name).dtype = dtype;
        self
    }

    pub(crate) fn fill(mut self, name: &str, fill: Fill) -> Self {
        self.tensor(name).fill = fill;
        self
    }

    pub(crate) fn metadata(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.to_owned()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    pub(crate) fn every_dtype(mut self, dtype: Dtype) -> Self {
        for tensor in &mut self.tensors {
            tensor.dtype = dtype;
        }
        self
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        found.expect("a tensor of the fixture")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let data: Vec<Vec<u8>> = self.tensors.iter().map(Tensor::bytes).collect();
        let views = self.tensors.iter().zip(&data).map(|(tensor, data)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), data).unwrap();
            (tensor.name, view)
        });
        let metadata = self.metadata.iter();
        let metadata = metadata.map(|(key, value)| ((*key).to_owned(), value.clone()));
        serialize(views, Some(metadata.collect())).unwrap()
    }

    pub(crate) fn write(&self) -> NamedTempFile {
        write(&self.bytes())
    }
}

impl Tensor {
    fn bytes(&self) -> Vec<u8> {
        let count: usize = self.shape.iter().product();
        let values = (0..count).map(|index| match self.fill {
            Fill::Wave(amplitude) => amplitude * (index as f32 * 0.37).sin(),
            Fill::Value(value) => value,
        });
        match self.dtype {
            Dtype::F16 => values
                .flat_map(|x| half::f16::from_f32(x).to_le_bytes())
                .collect(),
            Dtype::BF16 => values
                .flat_map(|x| half::bf16::from_f32(x).to_le_bytes())
                .collect(),
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            // Types that the command refuses: what they hold does not matter.
            other => vec![0; count * other.bitsize() / 8],
        }
    }
}

/// A file of its own with these bytes; gone when dropped.
pub(crate) fn write(bytes: &[u8]) -> NamedTempFile {
    let mut file = tempfile::Builder::new()
        .suffix(".safetensors")
        .tempfile()
        .unwrap();
    file.write_all(bytes).unwrap();
    file.flush().unwrap();
    file
}

/// What the command answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    /// The lines on stderr that are ours. Graphics drivers write there as well.
    pub(crate) fn complaints(&self) -> Vec<&str> {
        let lines = self.stderr.lines();
        lines
            .filter(|line| line.starts_with("sageattn: "))
            .collect()
    }
}

/// The command with these arguments, in the root of the workspace, logging nothing.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sageattn"));
    command
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command
}

pub(crate) fn sageattn(args: &[&str]) -> Answer {
    let output = command(args).output().unwrap();
    Answer {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// `run` on a file with more arguments.
pub(crate) fn run(file: &Path, more: &[&str]) -> Answer {
    let mut args = vec!["run", file.to_str().unwrap()];
    args.extend(more);
    sageattn(&args)
}
