//! From a safetensors file to a checked problem and its tensors. No device is involved.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sageattn::{Align, DType, HostTensor, Layout, Mask, Problem, Shape};

/// What a file asks for.
#[derive(Debug)]
pub(crate) struct Input {
    /// Shape, element type, mask and softmax scale.
    pub(crate) problem: Problem,
    /// Q, K and V.
    pub(crate) tensors: [HostTensor; 3],
    /// The file's own metadata, as it stands.
    pub(crate) metadata: HashMap<String, String>,
}

impl Input {
    /// Reads q, k and v. The header is checked against the file's length before any of them, and only
    /// they are read: a damaged or hostile file cannot ask for more memory than it has bytes.
    pub(crate) fn read(path: &Path, mask: Option<Mask>) -> Result<Self> {
        Self::read_file(path, mask).with_context(|| path.display().to_string())
    }

    fn read_file(path: &Path, mask: Option<Mask>) -> Result<Self> {
        // Opening a pipe or a device may never return, and reading one may never end.
        let info = std::fs::metadata(path)?;
        ensure!(info.is_file(), "not a regular file");
        let mut file = File::open(path)?;
        let (header, data_start) = read_header(&mut file, info.len())?;
        let named = ["q", "k", "v"].map(|name| find(&header, name));
        let [q, k, v] = named;
        let (q, k, v) = (q?, k?, v?);
        let metadata = header.metadata().clone().unwrap_or_default();
        let problem = problem(&q, &k, &v, &metadata, mask)?;
        let tensors = [
            q.read(&mut file, data_start)?,
            k.read(&mut file, data_start)?,
            v.read(&mut file, data_start)?,
        ];
        Ok(Self {
            problem,
            tensors,
            metadata,
        })
    }

    /// Whether every element of Q, K and V is finite.
    pub(crate) fn is_finite(&self) -> bool {
        self.tensors
            .iter()
            .all(|tensor| tensor.to_f32().iter().all(|x| x.is_finite()))
    }
}

/// The longest header that the safetensors format allows.
const MAX_HEADER: u64 = 100_000_000;

fn read_header(file: &mut File, file_len: u64) -> Result<(Metadata, u64)> {
    let not_safetensors = "not a safetensors file";
    ensure!(
        file_len >= 8,
        "{not_safetensors}: {file_len} bytes are too few"
    );
    let mut len = [0; 8];
    file.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    ensure!(
        len <= MAX_HEADER,
        "{not_safetensors}: a header of {len} bytes is above the format's limit of {MAX_HEADER}"
    );
    let data_start = 8 + len;
    ensure!(
        data_start <= file_len,
        "truncated, or {not_safetensors}: the header takes {len} bytes, the file has {file_len}"
    );
    let mut header = Vec::new();
    file.take(len).read_to_end(&mut header)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| anyhow!("{not_safetensors}: {error}"))?;
    let promised = data_start.checked_add(header.data_len() as u64);
    match promised {
        Some(promised) if promised == file_len => Ok((header, data_start)),
        Some(promised) if promised < file_len => {
            bail!("damaged: the tensors end at byte {promised}, the file has {file_len}")
        }
        _ => bail!(
            "truncated: the tensors take {} bytes after the header, the file has {}",
            header.data_len(),
            file_len - data_start
        ),
    }
}

/// A tensor of the file, not yet read.
struct Found<'a> {
    name: &'static str,
    shape: [usize; 4],
    dtype: DType,
    info: &'a TensorInfo,
}

fn find<'a>(header: &'a Metadata, name: &'static str) -> Result<Found<'a>> {
    let Some(info) = header.info(name) else {
        const SHOWN: usize = 8;
        let mut names = header.offset_keys();
        let more = if names.len() > SHOWN { ", .." } else { "" };
        names.truncate(SHOWN);
        bail!("no tensor {name:?}; the file has {names:?}{more}");
    };
    let shape = <[usize; 4]>::try_from(info.shape.as_slice()).map_err(|_| {
        anyhow!(
            "{name}: rank {} where 4 is needed: [batch, heads, length, head_dim]",
            info.shape.len()
        )
    })?;
    let dtype = match info.dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        other => bail!("{name}: element type {other:?} where F16, BF16 or F32 is needed"),
    };
    Ok(Found {
        name,
        shape,
        dtype,
        info,
    })
}

impl Found<'_> {
    fn read(&self, file: &mut File, data_start: u64) -> Result<HostTensor> {
        let (start, end) = self.info.data_offsets;
        file.seek(SeekFrom::Start(data_start + start as u64))?;
        let mut bytes = Vec::new();
        file.take((end - start) as u64).read_to_end(&mut bytes)?;
        let tensor = HostTensor::from_bytes(Layout::hnd(self.shape), self.dtype, bytes);
        tensor.context(self.name)
    }
}

fn problem(
    q: &Found<'_>,
    k: &Found<'_>,
    v: &Found<'_>,
    metadata: &HashMap<String, String>,
    mask: Option<Mask>,
) -> Result<Problem> {
    for other in [k, v] {
        let (name, dtype) = (other.name, other.dtype);
        ensure!(dtype == q.dtype, "{name}: {dtype} where q is {}", q.dtype);
        for (index, dimension) in [(0, "batch"), (3, "head_dim")] {
            let (theirs, ours) = (other.shape[index], q.shape[index]);
            ensure!(
                theirs == ours,
                "{name}: {dimension} {theirs} where q has {ours}"
            );
        }
    }
    ensure!(
        v.shape == k.shape,
        "v: shape {:?} where k has {:?}",
        v.shape,
        k.shape
    );
    // Nothing in the shape tells HND and NHD apart: read the wrong way, the numbers are wrong.
    if let Some(layout) = metadata.get("layout") {
        let nhd = layout.trim_start().to_ascii_uppercase().starts_with("NHD");
        ensure!(!nhd, "metadata layout: {layout:?}; only HND is read");
    }
    let shape = Shape {
        batch: q.shape[0],
        q_heads: q.shape[1],
        kv_heads: k.shape[1],
        q_len: q.shape[2],
        kv_len: k.shape[2],
        head_dim: q.shape[3],
    };
    let mut problem = Problem::new(shape, q.dtype)?;
    if let Some(scale) = metadata.get("softmax_scale") {
        let scale: f32 = scale
            .trim()
            .parse()
            .map_err(|_| anyhow!("metadata softmax_scale: {scale:?} is not a number"))?;
        problem = problem.with_softmax_scale(scale)?;
    }
    let mask = match mask {
        Some(mask) => mask,
        None => mask_of(metadata, &shape)?,
    };
    Ok(problem.with_mask(mask))
}

fn mask_of(metadata: &HashMap<String, String>, shape: &Shape) -> Result<Mask> {
    let Some(causal) = metadata.get("causal") else {
        return Ok(Mask::None);
    };
    // Python writes `True`.
    match causal.trim().to_ascii_lowercase().as_str() {
        "false" => Ok(Mask::None),
        // With equal lengths both alignments are the same mask.
        "true" if shape.q_len == shape.kv_len => Ok(Mask::Causal(Align::TopLeft)),
        "true" => bail!(
            "causal with {} queries and {} keys is ambiguous: say --mask causal-top-left or \
             --mask causal-bottom-right",
            shape.q_len,
            shape.kv_len
        ),
        _ => bail!("metadata causal: {causal:?} is neither \"true\" nor \"false\""),
    }
}
