//! The kernels with their constants: a variant is a file and a few `#define`s, known by one readable
//! name.

use sageattn_core::{DType, Reference};
use sageattn_kernels::SOURCES;
use sageattn_kernels::abi::{
    AttnParams, BOX_CHANNELS, HalfParams, K_GROUPS, MAX_PIECES, PrepareParams, TILE_KEYS,
};

use crate::launch::Params;
use crate::{attend_half, attend_sm90, quantize};

/// One kernel with its constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Sums of K and largest magnitudes of V: `quant/kv_statistics.cu`.
    Statistics(Prepare),
    /// K and V to codes: `quant/kv_encode.cu`.
    Encode(Prepare),
    /// K and V to codes, each read once: `sm90/kv_prepare.cu`.
    PrepareOnce(PrepareOnce),
    /// Attention over the codes: `sm90/attn_i8_f8.cu`.
    Attend(Attend),
    /// Attention on the 16-bit tensors as they are: `sm90/attn_half.cu`.
    Half(Half),
}

/// What P V is multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PvCodes {
    /// P and V in e4m3: recipe `sage2-i8-f8`.
    E4m3,
    /// P in unsigned 8-bit integers, each tile's relative to its own maximum, V in 8-bit integers: recipe
    /// `i8-i8-dyn`.
    Int8,
}

impl PvCodes {
    /// Constant `INT8_PV` of the kernels.
    fn define(self) -> (&'static str, String) {
        ("INT8_PV", u8::from(self == Self::Int8).to_string())
    }

    /// What names of kernels that make these codes say.
    const fn suffix(self) -> &'static str {
        match self {
            Self::E4m3 => "",
            Self::Int8 => "_i8",
        }
    }
}

/// The constants of the two kernels that quantize K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prepare {
    /// Channels of a row of codes: the problem's head dimension, padded.
    pub width: u32,
    /// The tensors' element type.
    pub dtype: DType,
    /// Whether a mean is subtracted from the keys.
    pub smooth: bool,
    /// Whether the head dimension is no multiple of eight: its last channels are loaded one by one.
    pub cut: bool,
    /// What V becomes.
    pub pv: PvCodes,
}

/// The constants of the kernel that reads K and V once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrepareOnce {
    /// Channels of a row of codes: the problem's head dimension, padded.
    pub width: u32,
    /// The tensors' element type.
    pub dtype: DType,
    /// Whether a mean is subtracted from the keys.
    pub smooth: bool,
    /// Tiles of K or V that a block's shared memory holds.
    pub slots: u32,
    /// Blocks that a multiprocessor holds.
    pub blocks: u32,
    /// What V becomes.
    pub pv: PvCodes,
}

/// The constants of the attention kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attend {
    /// Channels of a row of codes: the problem's head dimension, padded.
    pub width: u32,
    /// The tensors' element type.
    pub dtype: DType,
    /// Whether rows see keys up to a diagonal only.
    pub causal: bool,
    /// Whether LSE is written.
    pub lse: bool,
    /// Whether the head dimension is no multiple of eight.
    pub cut: bool,
    /// What P and V are multiplied in.
    pub pv: PvCodes,
    /// Whether P in e4m3 follows each row's running maximum tile by tile: less error, less speed. P in
    /// integers always follows maxima.
    pub running_max: bool,
    /// Warpgroups that multiply, 64 rows of Q each.
    pub consumers: u32,
    /// Tiles of K, and of V, that shared memory holds.
    pub stages: u32,
}

/// The constants of the attention kernel that does not quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Half {
    /// Channels of a row in shared memory: the problem's head dimension, padded.
    pub width: u32,
    /// The tensors' element type, of 16 bits.
    pub dtype: DType,
    /// Whether rows see keys up to a diagonal only.
    pub causal: bool,
    /// Whether LSE is written.
    pub lse: bool,
    /// Whether the head dimension is no multiple of eight.
    pub cut: bool,
    /// How a block is cut.
    pub tile: HalfTile,
}

/// Rows, keys and stages of a block of the attention kernel that does not quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HalfTile {
    /// Warpgroups that multiply, 64 rows of Q each.
    pub consumers: u32,
    /// Keys of a tile.
    pub keys: u32,
    /// Blocks of rows of Q that shared memory holds.
    pub q_slots: u32,
    /// Tiles of K that shared memory holds.
    pub k_stages: u32,
    /// Tiles of V that shared memory holds.
    pub v_stages: u32,
    /// Whether warpgroups issue their GEMMs one after the other.
    pub turns: bool,
}

/// Head dimensions that the kernels have; others are padded to the next.
pub const WIDTHS: [u32; 3] = [64, 128, 256];

impl Variant {
    /// The name: cache key, test id, bench id, and what logs print.
    pub fn name(&self) -> String {
        match self {
            Self::Statistics(prepare) => format!("kv_statistics_{}", prepare.suffix()),
            Self::Encode(prepare) => format!("kv_encode_{}", prepare.suffix()),
            Self::PrepareOnce(once) => format!("kv_prepare_sm90_{}", once.suffix()),
            Self::Attend(attend) => format!("{}_{}", self.entry(), attend.suffix()),
            Self::Half(half) => format!("attn_half_sm90_{}", half.suffix()),
        }
    }

    /// The kernel's file among [`SOURCES`].
    pub const fn source(&self) -> &'static str {
        match self {
            Self::Statistics(_) => "quant/kv_statistics.cu",
            Self::Encode(_) => "quant/kv_encode.cu",
            Self::PrepareOnce(_) => "sm90/kv_prepare.cu",
            Self::Attend(_) => "sm90/attn_i8_f8.cu",
            Self::Half(_) => "sm90/attn_half.cu",
        }
    }

    /// The `extern "C"` function in that file.
    pub const fn entry(&self) -> &'static str {
        match self {
            Self::Statistics(_) => "kv_statistics",
            Self::Encode(_) => "kv_encode",
            Self::PrepareOnce(_) => "kv_prepare_sm90",
            Self::Attend(attend) => match attend.pv {
                PvCodes::E4m3 => "attn_i8_f8_sm90",
                PvCodes::Int8 => "attn_i8_i8_sm90",
            },
            Self::Half(_) => "attn_half_sm90",
        }
    }

    /// The constants, as the file's head comment names them.
    pub fn defines(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Statistics(prepare) | Self::Encode(prepare) => vec![
                ("HEAD_DIM", prepare.width.to_string()),
                ("IN_T", type_name(prepare.dtype).to_owned()),
                ("SMOOTH", u8::from(prepare.smooth).to_string()),
                ("CUT_OCTET", u8::from(prepare.cut).to_string()),
                prepare.pv.define(),
            ],
            Self::PrepareOnce(once) => vec![
                ("HEAD_DIM", once.width.to_string()),
                ("IN_T", type_name(once.dtype).to_owned()),
                ("SMOOTH", u8::from(once.smooth).to_string()),
                ("SLOTS", once.slots.to_string()),
                ("BLOCKS", once.blocks.to_string()),
                // Only sampled keys are loaded by octets: not worth a variant.
                ("CUT_OCTET", "1".to_owned()),
                once.pv.define(),
            ],
            Self::Attend(attend) => vec![
                ("HEAD_DIM", attend.width.to_string()),
                ("IN_T", type_name(attend.dtype).to_owned()),
                ("CAUSAL", u8::from(attend.causal).to_string()),
                ("LSE", u8::from(attend.lse).to_string()),
                ("CUT_OCTET", u8::from(attend.cut).to_string()),
                attend.pv.define(),
                ("RUNNING_MAX", u8::from(attend.running_max).to_string()),
                ("CONSUMERS", attend.consumers.to_string()),
                ("STAGES", attend.stages.to_string()),
            ],
            Self::Half(half) => vec![
                ("HEAD_DIM", half.width.to_string()),
                ("IN_T", type_name(half.dtype).to_owned()),
                ("CAUSAL", u8::from(half.causal).to_string()),
                ("LSE", u8::from(half.lse).to_string()),
                ("CUT_OCTET", u8::from(half.cut).to_string()),
                ("CONSUMERS", half.tile.consumers.to_string()),
                ("KEYS", half.tile.keys.to_string()),
                ("Q_SLOTS", half.tile.q_slots.to_string()),
                ("K_STAGES", half.tile.k_stages.to_string()),
                ("V_STAGES", half.tile.v_stages.to_string()),
                ("TURNS", u8::from(half.tile.turns).to_string()),
            ],
        }
    }

    /// The constants, the file, and what the host takes for granted of it: what the compiler is given.
    pub fn entry_source(&self) -> String {
        let defines = self.defines().into_iter();
        let mut text: String = defines
            .map(|(name, value)| format!("#define {name} {value}\n"))
            .collect();
        let file = SOURCES.iter().find(|(path, _)| *path == self.source());
        text.push_str(&format!("#line 1 \"{}\"\n", self.source()));
        text.push_str(file.map_or("", |(_, text)| text));
        text.push_str("#line 1 \"checks of the host\"\n");
        for (expression, value) in self.shared_facts() {
            text.push_str(&format!(
                "static_assert({expression} == {value}, \"{expression} is {value} on the host\");\n"
            ));
        }
        text
    }

    /// Numbers that both sides have, which must not drift apart.
    fn shared_facts(&self) -> Vec<(String, String)> {
        let (params, size, offsets, threads) = match self {
            Self::Statistics(_) => (
                "PrepareParams",
                size_of::<PrepareParams>(),
                PrepareParams::FIELDS,
                quantize::STATISTICS_THREADS,
            ),
            Self::Encode(prepare) => (
                "PrepareParams",
                size_of::<PrepareParams>(),
                PrepareParams::FIELDS,
                quantize::encode_threads(prepare),
            ),
            Self::PrepareOnce(once) => (
                "PrepareParams",
                size_of::<PrepareParams>(),
                PrepareParams::FIELDS,
                quantize::once_threads(once),
            ),
            Self::Attend(attend) => (
                "AttnParams",
                size_of::<AttnParams>(),
                AttnParams::FIELDS,
                attend_sm90::threads(attend),
            ),
            Self::Half(half) => (
                "HalfParams",
                size_of::<HalfParams>(),
                HalfParams::FIELDS,
                attend_half::threads(half),
            ),
        };
        let mut facts = vec![
            ("THREADS".to_owned(), threads.to_string()),
            (format!("sizeof({params})"), size.to_string()),
        ];
        // offsetof, in the compiler's own words: NVRTC has no header that would define it.
        facts.extend(offsets.iter().map(|(field, offset)| {
            let expression = format!("__INTADDR__(&(({params}*)0)->{field})");
            (expression, offset.to_string())
        }));
        facts.extend(
            [
                ("TILE_KEYS", TILE_KEYS),
                ("K_GROUPS", K_GROUPS),
                ("MAX_PIECES", MAX_PIECES),
                ("BOX_CHANNELS", BOX_CHANNELS),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_string())),
        );
        if let Self::PrepareOnce(once) = self {
            let shared = quantize::once_shared_bytes(once);
            facts.push(("SHARED_BYTES".to_owned(), shared.to_string()));
        }
        if let Self::Attend(attend) = self {
            let shared = attend_sm90::shared_bytes(attend);
            facts.push(("SHARED_BYTES".to_owned(), shared.to_string()));
            if let Reference::Sum { start, limit } = attend_sm90::rounding(attend).reference {
                facts.push(("P_START_LOG2".to_owned(), format!("{start:?}f")));
                facts.push(("SAFE_SUM".to_owned(), format!("{limit:?}f")));
            }
        }
        if let Self::Half(half) = self {
            let shared = attend_half::shared_bytes(half);
            facts.push(("SHARED_BYTES".to_owned(), shared.to_string()));
            let limit = attend_half::SAFE_SUM;
            facts.push(("SAFE_SUM".to_owned(), format!("{limit:?}f")));
        }
        facts
    }
}

impl Prepare {
    /// The first of the two launches: the same whatever V becomes.
    pub(crate) const fn statistics(self) -> Self {
        Self {
            pv: PvCodes::E4m3,
            ..self
        }
    }

    fn suffix(&self) -> String {
        let mut suffix = format!("d{}_{}", self.width, self.dtype);
        if self.smooth {
            suffix.push_str("_smooth");
        }
        if self.cut {
            suffix.push_str("_cut");
        }
        suffix.push_str(self.pv.suffix());
        suffix
    }
}

impl PrepareOnce {
    fn suffix(&self) -> String {
        let mut suffix = format!("d{}_{}", self.width, self.dtype);
        if self.smooth {
            suffix.push_str("_smooth");
        }
        suffix.push_str(self.pv.suffix());
        suffix.push_str(&format!("_s{}b{}", self.slots, self.blocks));
        suffix
    }
}

/// What the names of all attention kernels say.
fn attention(width: u32, dtype: DType, causal: bool, lse: bool, cut: bool) -> String {
    let mut suffix = format!("d{width}_{dtype}");
    for (is, name) in [(causal, "_causal"), (lse, "_lse"), (cut, "_cut")] {
        if is {
            suffix.push_str(name);
        }
    }
    suffix
}

impl Attend {
    fn suffix(&self) -> String {
        let mut suffix = attention(self.width, self.dtype, self.causal, self.lse, self.cut);
        if self.running_max && self.pv == PvCodes::E4m3 {
            suffix.push_str("_max");
        }
        suffix.push_str(&format!("_c{}s{}", self.consumers, self.stages));
        suffix
    }
}

impl Half {
    fn suffix(&self) -> String {
        let mut suffix = attention(self.width, self.dtype, self.causal, self.lse, self.cut);
        let tile = &self.tile;
        suffix.push_str(&format!(
            "_c{}n{}s{}{}{}",
            tile.consumers, tile.keys, tile.q_slots, tile.k_stages, tile.v_stages
        ));
        if tile.turns {
            suffix.push_str("_turns");
        }
        suffix
    }
}

/// The element types of `tile/elements.cuh`.
const fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "F16",
        DType::BF16 => "Bf16",
        DType::F32 => "F32",
    }
}
