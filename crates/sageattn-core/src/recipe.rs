//! How a call is quantized. A recipe fixes the numerics; which kernel computes it is the backend's.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use crate::{Error, Grouping};

/// The constant subtracted from every key of one (batch, KV head) before quantization. The softmax
/// does not see it: every score of a row shifts by the same amount (SageAttention, arXiv 2410.02367,
/// section 4.2). Only LSE is corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Smooth {
    /// Quantize the keys as they are.
    Off,
    /// The mean over all real keys.
    #[default]
    Mean,
    /// The mean over this many evenly spaced keys: a cheaper estimate of the same offset, exact for O
    /// all the same.
    Sampled(NonZeroU32),
}

/// The constants subtracted from the queries before quantization (SageAttention2, arXiv 2411.10958,
/// section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum SmoothQ {
    /// Quantize the queries as they are.
    #[default]
    Off,
    /// The mean over each block of [`SmoothQ::BLOCK`] rows; its product with the smoothed keys is
    /// added to the scores unquantized.
    BlockMean,
}

impl SmoothQ {
    /// Rows of Q that share one mean.
    pub const BLOCK: usize = 128;
}

/// How Q K^T is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkQuant {
    /// Not quantized: the tensors' own numbers, summed in f32.
    None,
    /// Symmetric 8-bit integers, -127 to 127, exact 32-bit accumulation.
    Int8(Grouping),
    /// Symmetric 4-bit integers, -7 to 7, exact 32-bit accumulation.
    Int4(Grouping, SmoothQ),
}

/// How P V is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PvQuant {
    /// Not quantized.
    None,
    /// V as it is, P rounded to the tensors' own element type (for f32 tensors not at all); accumulated
    /// in f32.
    Native,
    /// P and V rounded to f16, accumulated in f32.
    F16,
    /// P in e4m3 at a static power-of-two scale, V in e4m3 per channel; each key tile is summed in the
    /// matrix unit, the tiles in f32 (two-level accumulation, arXiv 2411.10958, section 3.3).
    E4m3,
    /// P as `rint(127 p)` at a static scale, V in INT8 per channel (arXiv 2410.02367, section 4.3).
    Int8Static,
    /// P as unsigned 8-bit integers, scaled by each row's maximum within each key tile; V in INT8 per
    /// channel.
    Int8Dynamic,
}

/// One quantization scheme, from 16- or 32-bit tensors to O.
///
/// ```
/// use sageattn_core::{Recipe, Smooth};
/// let recipe: Recipe = "sage1-b".parse()?;
/// assert_eq!(recipe, Recipe::SAGE1_B);
/// assert_eq!(recipe.with_smooth(Smooth::Off).to_string(), "sage1-b+unsmoothed");
/// # Ok::<(), sageattn_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Recipe {
    /// What is subtracted from the keys.
    pub smooth: Smooth,
    /// The first product.
    pub qk: QkQuant,
    /// The second product.
    pub pv: PvQuant,
}

const PER_BLOCK: Grouping = Grouping::PerBlock { q: 128, k: 64 };
const PER_THREAD: Grouping = Grouping::PerThread { q: 16, k: 128 };

impl Recipe {
    /// Attention in f64, without quantization: the reference.
    pub const EXACT: Self = Self::new(QkQuant::None, PvQuant::None);
    /// Plain attention on the tensors' own numbers, as FlashAttention computes it (arXiv 2205.14135):
    /// for 16-bit tensors on matrix units, and where quantizing costs more than it saves, such as
    /// decoding.
    pub const HALF: Self = Self::new(QkQuant::None, PvQuant::Native);
    /// SageAttention (arXiv 2410.02367, table 6), SAGEAttn-T: INT8 per token, P V in f16.
    pub const SAGE1_T: Self = Self::new(QkQuant::Int8(Grouping::PerToken), PvQuant::F16);
    /// SageAttention (arXiv 2410.02367, table 6), SAGEAttn-B: INT8 per block of 128 queries and 64
    /// keys, P V in f16.
    pub const SAGE1_B: Self = Self::new(QkQuant::Int8(PER_BLOCK), PvQuant::F16);
    /// SageAttention (arXiv 2410.02367, table 6), SAGEAttn-vT: as -T, P V in INT8 at a static scale.
    pub const SAGE1_VT: Self = Self::new(QkQuant::Int8(Grouping::PerToken), PvQuant::Int8Static);
    /// SageAttention (arXiv 2410.02367, table 6), SAGEAttn-vB: as -B, P V in INT8 at a static scale.
    pub const SAGE1_VB: Self = Self::new(QkQuant::Int8(PER_BLOCK), PvQuant::Int8Static);
    /// SageAttention2 (arXiv 2411.10958), 8-bit: INT8 per thread, P V in e4m3.
    pub const SAGE2_I8_F8: Self = Self::new(QkQuant::Int8(PER_THREAD), PvQuant::E4m3);
    /// SageAttention2 (arXiv 2411.10958), 4-bit: INT4 per thread with Q smoothed, P V in e4m3.
    pub const SAGE2_I4_F8: Self =
        Self::new(QkQuant::Int4(PER_THREAD, SmoothQ::BlockMean), PvQuant::E4m3);
    /// INT8 throughout, with a dynamic scale for P: for devices with integer dot products and no FP8, and
    /// less than half of its error where there is both.
    pub const I8_I8_DYN: Self = Self::new(QkQuant::Int8(PER_THREAD), PvQuant::Int8Dynamic);

    /// Every named recipe, smoothed where it quantizes, in the order of the papers.
    pub const NAMED: [(&'static str, Self); 9] = [
        ("sage1-t", Self::SAGE1_T),
        ("sage1-b", Self::SAGE1_B),
        ("sage1-vt", Self::SAGE1_VT),
        ("sage1-vb", Self::SAGE1_VB),
        ("sage2-i8-f8", Self::SAGE2_I8_F8),
        ("sage2-i4-f8", Self::SAGE2_I4_F8),
        ("i8-i8-dyn", Self::I8_I8_DYN),
        ("half", Self::HALF),
        ("exact", Self::EXACT),
    ];

    const fn new(qk: QkQuant, pv: PvQuant) -> Self {
        let smooth = match qk {
            QkQuant::None => Smooth::Off,
            QkQuant::Int8(_) | QkQuant::Int4(..) => Smooth::Mean,
        };
        Self { smooth, qk, pv }
    }

    /// The same recipe with other smoothing of the keys; `Smooth::Off` also stops smoothing of Q. A
    /// recipe that does not quantize the keys has nothing to smooth and stays as it is.
    #[must_use]
    pub const fn with_smooth(self, smooth: Smooth) -> Self {
        let qk = match (self.qk, smooth) {
            (QkQuant::None, _) => return self,
            (QkQuant::Int4(groups, _), Smooth::Off) => QkQuant::Int4(groups, SmoothQ::Off),
            (qk, _) => qk,
        };
        Self { smooth, qk, ..self }
    }

    /// The name in [`Recipe::NAMED`], whatever the smoothing; `None` for a combination of one's own.
    pub fn name(&self) -> Option<&'static str> {
        let same = |named: &Self| {
            self.pv == named.pv
                && match (self.qk, named.qk) {
                    (QkQuant::Int4(mine, _), QkQuant::Int4(theirs, _)) => mine == theirs,
                    (mine, theirs) => mine == theirs,
                }
        };
        Self::NAMED
            .iter()
            .find(|(_, named)| same(named))
            .map(|&(name, _)| name)
    }

    /// Keys whose P shares one scale or one accumulator, where the recipe fixes it.
    pub const fn key_tile(&self) -> usize {
        match self.pv {
            PvQuant::E4m3 => 128,
            PvQuant::None
            | PvQuant::Native
            | PvQuant::F16
            | PvQuant::Int8Static
            | PvQuant::Int8Dynamic => 64,
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name)?,
            None => write!(f, "custom({:?}, {:?})", self.qk, self.pv)?,
        }
        match self.smooth {
            Smooth::Off if self.qk == QkQuant::None => Ok(()),
            Smooth::Off => f.write_str("+unsmoothed"),
            Smooth::Mean => Ok(()),
            Smooth::Sampled(n) => write!(f, "+sampled{n}"),
        }
    }
}

impl FromStr for Recipe {
    type Err = Error;

    /// Parses `NAME`, `NAME+unsmoothed` or `NAME+sampledN`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, suffix) = match text.split_once('+') {
            Some((name, suffix)) => (name, Some(suffix)),
            None => (text, None),
        };
        let known = Self::NAMED.iter().find(|(known, _)| *known == name);
        let Some(&(_, recipe)) = known else {
            let names = Self::NAMED.map(|(name, _)| name).join(", ");
            let reason = format!("unknown name {text:?}; the known ones are {names}");
            return Err(Error::invalid("recipe", reason));
        };
        let smooth = match suffix {
            None => return Ok(recipe),
            Some("unsmoothed") => Some(Smooth::Off),
            Some(suffix) => suffix
                .strip_prefix("sampled")
                .and_then(|n| n.parse().ok())
                .map(Smooth::Sampled),
        };
        let smooth = smooth.filter(|_| recipe.qk != QkQuant::None).ok_or_else(|| {
            let reason = format!("{text:?}: the suffix is neither +unsmoothed nor +sampledN, or the recipe has no smoothing");
            Error::invalid("recipe", reason)
        })?;
        Ok(recipe.with_smooth(smooth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_survives_a_round_trip() {
        for (name, recipe) in Recipe::NAMED {
            assert_eq!(recipe.to_string(), name);
            let mut forms = vec![recipe];
            if recipe.qk != QkQuant::None {
                let sampled = NonZeroU32::new(64).map(Smooth::Sampled).unwrap();
                forms.extend([Smooth::Off, sampled].map(|s| recipe.with_smooth(s)));
            }
            for form in forms {
                assert_eq!(form.to_string().parse::<Recipe>().unwrap(), form);
            }
        }
    }

    #[test]
    fn what_is_not_quantized_is_not_smoothed() {
        let sampled = NonZeroU32::new(64).map(Smooth::Sampled).unwrap();
        for recipe in [Recipe::HALF, Recipe::EXACT] {
            assert_eq!(recipe.smooth, Smooth::Off);
            for smooth in [Smooth::Off, Smooth::Mean, sampled] {
                assert_eq!(recipe.with_smooth(smooth), recipe);
            }
        }
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        for text in [
            "sage9",
            "",
            "sage1-b+smooth",
            "sage1-b+sampled0",
            "exact+unsmoothed",
            "half+sampled64",
        ] {
            let error = text.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.starts_with("recipe: "), "{error}");
        }
        let error = "sage9".parse::<Recipe>().unwrap_err().to_string();
        assert!(error.contains("i8-i8-dyn"), "{error}");
    }
}
