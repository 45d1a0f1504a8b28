//! Tiers: the ways a device may compute one recipe, and which of them a call takes.
//!
//! The choice is a function of facts, request and order, and nothing else: no device is asked here.
//! A tier is a file in `attend`, which says what the tier needs and picks its tile.

use std::fmt;
use std::str::FromStr;

use sageattn_core::Error;
use sageattn_shaders::{AttendKernel, DecodeVariant, Pv, RowGroups};

use crate::attend;

/// A way to compute attention on a GPU. All tiers compute the same recipes by the same definitions;
/// they differ in speed and in what they need of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Tier {
    /// Q K^T on matrix cores in 8-bit integers, P V on them in f16: SPIR-V, on Vulkan.
    MatrixI8,
    /// Cooperative matrices in WGSL, f16 with f32 sums: matrix cores, where wgpu offers them.
    Matrix,
    /// Packed 8-bit dot products, in plain WGSL: on every device.
    Dot,
}

impl Tier {
    /// Every tier, in the order in which they are tried when nothing has been measured.
    pub const ALL: &'static [Self] = &[Self::MatrixI8, Self::Matrix, Self::Dot];

    /// Its name, as in [`Description::variant`](sageattn_core::Description::variant): `attend_dot_..`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MatrixI8 => "matrix_i8",
            Self::Matrix => "matrix",
            Self::Dot => "dot",
        }
    }

    /// What the device lacks for this tier, whatever the request.
    pub(crate) fn lacks(self, facts: &Facts) -> Vec<String> {
        match self {
            Self::MatrixI8 => attend::matrix_i8::lacks(facts),
            Self::Matrix => attend::matrix::lacks(facts),
            Self::Dot => Vec::new(),
        }
    }

    /// The tier of a kernel.
    pub(crate) const fn of(kernel: &AttendKernel) -> Self {
        match kernel {
            AttendKernel::MatrixI8(_) => Self::MatrixI8,
            AttendKernel::Matrix(_) => Self::Matrix,
            AttendKernel::Dot(_) => Self::Dot,
        }
    }

    /// The kernel for a request.
    fn kernel(self, facts: &Facts, request: &Request) -> Result<AttendKernel, Vec<String>> {
        let lacks = self.lacks(facts);
        if !lacks.is_empty() {
            return Err(lacks);
        }
        match self {
            Self::MatrixI8 => attend::matrix_i8::kernel(facts, request),
            Self::Matrix => attend::matrix::kernel(facts, request),
            Self::Dot => attend::dot::kernel(facts, request),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|tier| tier.name() == name);
        found.copied().ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|tier| tier.name()).collect();
            let reason = format!("unknown name {name:?}; there are {}", known.join(", "));
            Error::invalid("tier", reason)
        })
    }
}

/// What the caller, or a measurement, has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forced {
    /// The tier, whatever its tile.
    Tier(Tier),
    /// The very kernel, tried or not: to try it.
    Kernel(AttendKernel),
    /// The same of the kernel for few queries.
    Decode(DecodeVariant),
}

/// What the choice looks at of a device.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) limits: wgpu::Limits,
    /// Features that the device was opened with.
    pub(crate) features: wgpu::Features,
    /// Shapes of cooperative matrices, as the adapter reports them; none without the adapter.
    pub(crate) matrices: Vec<wgpu::CooperativeMatrixProperties>,
    /// Why it has not the 8-bit matrices of which wgpu does not report, or not as their kernel expects.
    pub(crate) i8_matrices: Result<(), String>,
    /// The smallest and the largest subgroup that a kernel may meet.
    pub(crate) subgroup: [u32; 2],
    /// Whether matrices may be loaded from arrays of vectors.
    pub(crate) vector_items: bool,
    /// Whether invocations may store components of one vector side by side: WGSL lets a store of one
    /// rewrite all, and Metal's compiler does; SPIR-V's does not.
    pub(crate) lone_components: bool,
}

/// What the choice looks at of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Request {
    pub(crate) q_len: usize,
    pub(crate) kv_len: usize,
    /// Query heads that share a KV head.
    pub(crate) heads_per_kv: usize,
    /// Batches times query heads.
    pub(crate) pairs: usize,
    pub(crate) head_dim: u32,
    pub(crate) pv: Pv,
    pub(crate) q_groups: RowGroups,
    pub(crate) k_groups: RowGroups,
}

impl Request {
    /// Rows of a KV head when its query heads are packed, each on a multiple of four.
    pub(crate) fn packed_rows(&self) -> usize {
        self.heads_per_kv * self.q_len.next_multiple_of(4)
    }
}

/// The kernel for a request: that of the first tier in `order` that takes it.
///
/// # Errors
/// What the last tier of the order lacks.
pub(crate) fn choose(
    facts: &Facts,
    request: &Request,
    order: &[Tier],
) -> Result<AttendKernel, Vec<String>> {
    let mut needs = Vec::new();
    for tier in order {
        match tier.kernel(facts, request) {
            Ok(kernel) => return Ok(kernel),
            Err(lacks) => {
                let in_tier = |lack| format!("tier {tier}: {lack}");
                needs = lacks.into_iter().map(in_tier).collect();
            }
        }
    }
    Err(needs)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A device with nothing beyond wgpu's defaults.
    pub(crate) fn plain() -> Facts {
        Facts {
            limits: wgpu::Limits::default(),
            features: wgpu::Features::empty(),
            matrices: Vec::new(),
            i8_matrices: Err("8-bit matrices".to_owned()),
            subgroup: [32, 32],
            vector_items: true,
            lone_components: true,
        }
    }

    /// One long head.
    pub(crate) fn long(head_dim: u32, pv: Pv) -> Request {
        Request {
            q_len: 4096,
            kv_len: 4096,
            heads_per_kv: 1,
            pairs: 32,
            head_dim,
            pv,
            q_groups: RowGroups::BLOCK_128,
            k_groups: RowGroups::BLOCK_64,
        }
    }

    #[test]
    fn names_parse_back() {
        for tier in Tier::ALL {
            assert_eq!(tier.name().parse::<Tier>().unwrap(), *tier);
        }
        assert!("dots".parse::<Tier>().is_err());
    }

    #[test]
    fn a_plain_device_takes_dot_products() {
        for pv in [Pv::F16, Pv::I8] {
            let kernel = choose(&plain(), &long(128, pv), Tier::ALL).unwrap();
            assert!(matches!(kernel, AttendKernel::Dot(_)), "{kernel:?}");
        }
    }
}
