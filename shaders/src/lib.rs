//! The WGSL kernels of `sageattn`'s portable tier.
//!
//! A kernel is the concatenation of a generated prelude of `const` lines, the files of `lib/` that it
//! names, and one stage file. WGSL's module scope has no order, so nothing else is needed: no
//! preprocessor, no templates. [`Variant`] lists what can be composed; its name identifies the result in
//! caches, tests and logs.
//!
//! ```
//! use sageattn_shaders::{DType, Variant, ValuesVariant};
//! let variant = Variant::ValuesF16(ValuesVariant { dtype: DType::BF16, head_dim: 64, pv_dim: 64 });
//! let kernel = variant.compose(sageattn_shaders::Native::ALL);
//! assert_eq!(kernel.name, "values_f16_bf16_d64");
//! assert!(kernel.source.contains("const HEAD_DIM: u32 = 64u;"));
//! ```

pub mod abi;
mod attend;
mod variant;

pub use attend::*;
pub use variant::*;

/// The parameter blocks, as the kernels declare them.
pub const ABI_WGSL: &str = include_str!("../lib/abi.wgsl");

/// Keys per step of the attention kernel, and per tile of V as it is laid out.
pub const KEY_TILE: u32 = 64;

/// Rows of K or V that one workgroup reduces to one partial result per channel.
pub const SPLIT_ROWS: u32 = 512;

/// A composed kernel: its entry point is `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The variant's name.
    pub name: String,
    /// The whole WGSL module.
    pub source: String,
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
const ATTEND: Part = part!("attend.wgsl");
const SELF_TEST: Part = part!("self_test.wgsl");

/// The `const` lines at the head of a module.
#[derive(Debug)]
struct Prelude(String);

impl Prelude {
    fn new(name: &str) -> Self {
        // Without an override, wgpu's Vulkan backend translates a module before it knows the pipeline's
        // options, and silently keeps loop bounding, division checks and zeroed workgroup memory.
        Self(format!("// {name}\noverride translated_late: u32 = 0u;\n"))
    }

    fn number(mut self, name: &str, value: u32) -> Self {
        self.0 += &format!("const {name}: u32 = {value}u;\n");
        self
    }

    fn flag(mut self, name: &str, value: bool) -> Self {
        self.0 += &format!("const {name}: bool = {value};\n");
        self
    }

    /// The module: this prelude, then the parts, each under its path for error messages to point at.
    fn compose(self, name: String, parts: &[Part]) -> Kernel {
        let mut source = self.0;
        for part in parts {
            source += &format!("\n// ---- {}\n{}", part.path, part.text);
        }
        Kernel { name, source }
    }
}
