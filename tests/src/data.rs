//! The real activations of `tests/data`, embedded.

use safetensors::{Dtype, SafeTensors};
use sageattn_core::{DType, Error, HostTensor, Layout, Mask, Problem, Shape};

/// Q, K and V of one attention layer of a trained model.
#[derive(Clone, Debug)]
pub struct Activations {
    /// The problem that the file's shapes and metadata describe.
    pub problem: Problem,
    /// Q, K and V as stored.
    pub tensors: [HostTensor; 3],
}

const FILES: [(&str, &[u8]); 4] = [
    (
        "kokoro_albert_step1_n512",
        include_bytes!("../data/kokoro_albert_step1_n512.safetensors"),
    ),
    (
        "minilm_l6_layer0_n480",
        include_bytes!("../data/minilm_l6_layer0_n480.safetensors"),
    ),
    (
        "minilm_l6_layer3_n480",
        include_bytes!("../data/minilm_l6_layer3_n480.safetensors"),
    ),
    (
        "minilm_l6_layer5_n480",
        include_bytes!("../data/minilm_l6_layer5_n480.safetensors"),
    ),
];

/// The names of the embedded files, without extension.
pub fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|&(name, _)| name)
}

/// One embedded file.
///
/// # Errors
/// [`Error::Invalid`] when there is no such file or it does not hold one attention problem.
pub fn load(name: &str) -> Result<Activations, Error> {
    let (_, bytes) = FILES
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| Error::invalid("file", format!("no embedded file {name:?}")))?;
    let wrong = |reason: String| Error::invalid(name, reason);
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| wrong(e.to_string()))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| wrong(e.to_string()))?;
    let read = |tensor: &str| {
        let view = file.tensor(tensor).map_err(|e| wrong(e.to_string()))?;
        let shape = <[usize; 4]>::try_from(view.shape());
        let (Ok(shape), Dtype::F16) = (shape, view.dtype()) else {
            return Err(wrong(format!("{tensor} is not 4-dimensional f16")));
        };
        HostTensor::from_bytes(Layout::hnd(shape), DType::F16, view.data().to_vec())
    };
    let tensors = [read("q")?, read("k")?, read("v")?];
    let [batch, q_heads, q_len, head_dim] = tensors[0].layout().shape();
    let [_, kv_heads, kv_len, _] = tensors[1].layout().shape();
    let shape = Shape {
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
    };
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let scale = metadata
        .get("softmax_scale")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| wrong("no softmax_scale in the metadata".to_owned()))?;
    if metadata
        .get("causal")
        .is_some_and(|causal| causal != "false")
    {
        return Err(wrong("a causal file names no alignment".to_owned()));
    }
    let problem = Problem::new(shape, DType::F16)?
        .with_mask(Mask::None)
        .with_softmax_scale(scale)?;
    Ok(Activations { problem, tensors })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_loads() {
        for name in names() {
            let file = load(name).unwrap();
            assert!(file.problem.shape().q_len >= 480, "{name}");
            assert_ne!(file.problem.softmax_scale(), 0.0);
        }
        assert!(load("nothing").is_err());
    }
}
