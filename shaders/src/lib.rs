//! The kernels of `sageattn`'s portable tier: WGSL, and SPIR-V for what WGSL cannot express ([`spirv`]).
//!
//! A WGSL kernel is the concatenation of a generated prelude of `const` lines, the files of `lib/` that it
//! names, and one stage file. WGSL's module scope has no order, so nothing else is needed, except where
//! a kernel must have loops written out (`unroll.rs`). [`Variant`] lists what can be composed; its name identifies the result in
//! caches, tests and logs.
//!
//! ```
//! use sageattn_shaders::{DType, Variant, ValuesVariant};
//! let variant = Variant::ValuesF16(ValuesVariant { dtype: DType::BF16, head_dim: 64, pv_dim: 64 });
//! let kernel = variant.compose(sageattn_shaders::Native::ALL);
//! assert_eq!(kernel.name, "values_f16_bf16_d64");
//! let sageattn_shaders::Source::Wgsl(text) = kernel.source else { unreachable!() };
//! assert!(text.contains("const HEAD_DIM: u32 = 64u;"));
//! ```

pub mod abi;
mod attend;
mod decode;
pub mod spirv;
mod unroll;
mod variant;

use unroll::{Constants, unroll};

pub use attend::*;
pub use decode::{
    DecodeTile, DecodeVariant, MERGE_CHANNELS, MergeVariant, PACK_ROWS, decode_columns,
    decode_shuffles,
};
pub use variant::*;

/// The parameter blocks, as the kernels declare them.
pub const ABI_WGSL: &str = include_str!("../lib/abi.wgsl");

/// Keys per step of the attention kernel, and per tile of V as it is laid out.
pub const KEY_TILE: u32 = 64;

/// Rows of K or V that one workgroup reduces to one partial result per channel: eight for each of its
/// row lanes, few enough that a few thousand rows of a head keep a large GPU busy.
pub const SPLIT_ROWS: u32 = 128;

/// A composed kernel: its entry point is `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The variant's name.
    pub name: String,
    /// The whole module.
    pub source: Source,
}

/// A module in the language that it is handed to wgpu in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Checked and translated by wgpu.
    Wgsl(String),
    /// Handed to the Vulkan driver as it is.
    Spirv(Vec<u32>),
}

/// A file of this crate.
#[derive(Clone, Copy, Debug)]
struct Part {
    path: &'static str,
    text: &'static str,
}

macro_rules! part {
    ($path:literal) => {
        Part {
            path: $path,
            text: include_str!(concat!("../", $path)),
        }
    };
}

const ABI: Part = Part {
    path: "lib/abi.wgsl",
    text: ABI_WGSL,
};
const LOAD: Part = part!("lib/load.wgsl");
const STORE: Part = part!("lib/store.wgsl");
const HALF: Part = part!("lib/half.wgsl");
const CODES: Part = part!("lib/codes.wgsl");
const DOT: Part = part!("lib/dot.wgsl");
const PV_F16: Part = part!("lib/pv_f16.wgsl");
const PV_I8: Part = part!("lib/pv_i8.wgsl");
const RANGE: Part = part!("lib/range.wgsl");
const CHANNELS: Part = part!("channels.wgsl");
const CHANNELS_FINISH: Part = part!("channels_finish.wgsl");
const QUANTIZE_ROWS: Part = part!("quantize_rows.wgsl");
const VALUES_F16: Part = part!("values_f16.wgsl");
const VALUES_ROWS: Part = part!("values_rows.wgsl");
const VALUES_I8: Part = part!("values_i8.wgsl");
const ATTENTION: Part = part!("lib/attention.wgsl");
const ATTEND: Part = part!("attend.wgsl");
const ATTEND_MATRIX: Part = part!("attend_matrix.wgsl");
const EIGHT: Part = part!("lib/eight.wgsl");
const READ_VECTORS: Part = part!("lib/read_vectors.wgsl");
const READ_WORDS: Part = part!("lib/read_words.wgsl");
const DECODE_LIB: Part = part!("lib/decode.wgsl");
const DECODE: Part = part!("decode.wgsl");
const DECODE_SHUFFLED: Part = part!("decode_shuffled.wgsl");
const MERGE: Part = part!("merge.wgsl");
const SELF_TEST: Part = part!("self_test.wgsl");

/// The `const` lines at the head of a module.
#[derive(Debug)]
struct Prelude {
    text: String,
    /// The constants as directives see them: flags are 0 and 1.
    constants: Constants,
}

impl Prelude {
    fn new(name: &str) -> Self {
        Self::enabling(name, &[])
    }

    /// A module that uses language extensions.
    fn enabling(name: &str, extensions: &[&str]) -> Self {
        let enables: String = extensions
            .iter()
            .map(|e| format!("enable {e};\n"))
            .collect();
        // Without an override, wgpu's Vulkan backend translates a module before it knows the pipeline's
        // options, and silently keeps loop bounding, division checks and zeroed workgroup memory.
        Self {
            text: format!("// {name}\n{enables}override translated_late: u32 = 0u;\n"),
            constants: Constants::new(),
        }
    }

    fn number(mut self, name: &str, value: u32) -> Self {
        self.text += &format!("const {name}: u32 = {value}u;\n");
        self.constants.insert(name.to_owned(), value);
        self
    }

    fn flag(mut self, name: &str, value: bool) -> Self {
        self.text += &format!("const {name}: bool = {value};\n");
        self.constants.insert(name.to_owned(), u32::from(value));
        self
    }

    fn float(mut self, name: &str, value: f32) -> Self {
        self.text += &format!("const {name}: f32 = {value:?};\n");
        self
    }

    fn alias(mut self, name: &str, ty: &str) -> Self {
        self.text += &format!("alias {name} = {ty};\n");
        self
    }

    /// The module: this prelude, then the parts, each under its path for error messages to point at.
    fn compose(self, name: String, parts: &[Part]) -> Kernel {
        let mut source = self.text;
        for part in parts {
            let text = unroll(part.text, &self.constants);
            source += &format!("\n// ---- {}\n{text}", part.path);
        }
        Kernel {
            name,
            source: Source::Wgsl(source),
        }
    }
}
