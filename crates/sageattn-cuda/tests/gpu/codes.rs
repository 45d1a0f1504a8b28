//! What the preparation of K and V leaves in the workspace, against docs/numerics.md, over every way
//! that a plan chooses.

use std::num::NonZeroU32;

use libtest_mimic::Failed;
use sageattn_core::{DType, HostTensor, Layout, PvQuant, Recipe, Shape, Smooth};
use sageattn_cuda::Cuda;

use crate::support::{Call, OnDevice, normal};

/// Keys in a tile of codes.
const TILE: usize = 128;
/// Groups of keys in a tile that share a scale.
const GROUPS: usize = 4;

/// One preparation.
struct Case {
    heads: usize,
    kv_len: usize,
    head_dim: usize,
    dtype: DType,
    smooth: Smooth,
    /// Rows of one key's heads next to each other, as `nhd`.
    keys_first: bool,
    /// The launches, as profiles name them.
    launches: &'static [&'static str],
}

const ONCE: &[&str] = &["prepare", "attend"];
const TWICE: &[&str] = &["statistics", "encode", "attend"];

fn case(heads: usize, kv_len: usize, head_dim: usize, launches: &'static [&'static str]) -> Case {
    Case {
        heads,
        kv_len,
        head_dim,
        dtype: DType::F16,
        smooth: Smooth::Mean,
        keys_first: false,
        launches,
    }
}

/// On 132 multiprocessors, as every H100 and H200 with SXM has; elsewhere the ways may be others, and the
/// assertion on the launches says so.
fn cases() -> Vec<Case> {
    let sampled = |n| NonZeroU32::new(n).map(Smooth::Sampled).unwrap();
    vec![
        // Too few heads for clusters, the second and third of them just so.
        case(2, 300, 64, TWICE),
        case(8, 300, 128, TWICE),
        case(2, 5000, 128, TWICE),
        // One block a head; clusters of two to sixteen, with a partial last tile or blocks without one.
        case(66, 1, 64, ONCE),
        case(200, 197, 64, ONCE),
        case(133, 256, 128, ONCE),
        case(66, 197, 64, ONCE),
        case(40, 513, 64, ONCE),
        case(20, 1000, 128, ONCE),
        case(20, 1500, 128, ONCE),
        case(9, 2100, 64, ONCE),
        case(17, 1000, 256, ONCE),
        case(5, 4500, 64, ONCE),
        case(5, 4096, 128, ONCE),
        // Blocks of other sizes for longer heads: all tiles kept, clusters taking turns; tiles read again.
        case(5, 8300, 64, ONCE),
        case(9, 7000, 128, ONCE),
        case(9, 4000, 256, ONCE),
        case(5, 13000, 64, ONCE),
        case(5, 12300, 128, ONCE),
        case(5, 6300, 256, ONCE),
        // Types, head dimensions that are padded or cut an octet, tensors with keys outermost.
        Case {
            dtype: DType::BF16,
            ..case(20, 1000, 100, ONCE)
        },
        Case {
            dtype: DType::BF16,
            keys_first: true,
            ..case(9, 3000, 72, ONCE)
        },
        Case {
            dtype: DType::F32,
            ..case(17, 1000, 41, ONCE)
        },
        Case {
            dtype: DType::F32,
            keys_first: true,
            ..case(9, 2500, 128, ONCE)
        },
        Case {
            dtype: DType::F32,
            ..case(20, 300, 250, TWICE)
        },
        Case {
            keys_first: true,
            ..case(40, 700, 20, ONCE)
        },
        // No mean, and the mean of a few keys.
        Case {
            smooth: Smooth::Off,
            ..case(20, 1000, 128, ONCE)
        },
        Case {
            smooth: sampled(50),
            ..case(20, 1000, 100, ONCE)
        },
        Case {
            smooth: sampled(777),
            ..case(5, 13000, 64, ONCE)
        },
        Case {
            smooth: sampled(3),
            ..case(66, 130, 64, ONCE)
        },
        Case {
            smooth: Smooth::Off,
            ..case(3, 700, 64, TWICE)
        },
    ]
}

pub(crate) fn codes(cuda: &Cuda) -> Result<(), Failed> {
    for case in cases() {
        for recipe in [Recipe::SAGE2_I8_F8, Recipe::I8_I8_DYN] {
            check(cuda, &case, recipe)?;
        }
    }
    Ok(())
}

fn check(cuda: &Cuda, case: &Case, recipe: Recipe) -> Result<(), Failed> {
    let call = case.call().by(recipe.with_smooth(case.smooth));
    let what = format!(
        "{:?} {} {}",
        call.problem, call.recipe, case.keys_first as u8
    );
    let device = OnDevice::new(cuda, &call);
    let io = device.io(&call);
    let profile = device.plan.profile(&io, &device.workspace)?;
    let launches: Vec<&str> = profile.stages.iter().map(|(name, _)| *name).collect();
    assert_eq!(launches, case.launches, "{what}");

    let bytes = device.read(&device.workspace);
    let codes = Codes::of(&device, &bytes);
    let [_, k, v] = call.tensors().map(HostTensor::to_f32);
    let per_head = case.kv_len * case.head_dim;
    let heads = k.chunks_exact(per_head).zip(v.chunks_exact(per_head));
    for (head, (k, v)) in heads.enumerate() {
        codes
            .check_k(head, k, case)
            .and_then(|()| match recipe.pv {
                PvQuant::E4m3 => codes.check_v(head, v, case),
                _ => codes.check_integer_v(head, v, case),
            })
            .map_err(|complaint| format!("{what}: head {head}: {complaint}"))?;
    }

    for run in 1..10 {
        device.plan.run(&io, &device.workspace)?;
        if device.read(&device.workspace) != bytes {
            return Err(format!("{what}: run {run} gives other bits").into());
        }
    }
    Ok(())
}

impl Case {
    fn call(&self) -> Call {
        let shape = Shape {
            q_len: 1,
            kv_len: self.kv_len,
            ..Shape::mha(1, self.heads, 1, self.head_dim)
        };
        let mut call = Call::new(shape, self.dtype);
        let layout = match self.keys_first {
            false => Layout::hnd_padded(shape.kv(), self.dtype),
            true => Layout::nhd_padded(shape.kv(), self.dtype),
        };
        for (tensor, seed) in [(1, 2), (2, 3)] {
            let mut values = normal(seed, shape.kv().iter().product());
            for (i, value) in values.iter_mut().enumerate() {
                // Channels differ in their offsets, as the keys of trained models do, and in size.
                let channel = i % self.head_dim;
                *value = (*value + (channel % 5) as f32 - 1.0) * (1.0 + (channel % 3) as f32);
            }
            // A channel of V that is zero throughout.
            if tensor == 2 {
                values
                    .iter_mut()
                    .step_by(self.head_dim)
                    .for_each(|x| *x = 0.0);
            }
            call.tensors[tensor] = HostTensor::from_f32(layout, self.dtype, &values).unwrap();
        }
        call
    }

    /// Channels of the codes.
    fn width(&self) -> usize {
        let widths = sageattn_cuda::WIDTHS.map(|width| width as usize);
        widths
            .into_iter()
            .find(|&width| self.head_dim <= width)
            .unwrap()
    }

    /// Of a head's `values`; 0 in the padding of keys and channels.
    fn value(&self, values: &[f32], key: usize, channel: usize) -> f32 {
        match channel < self.head_dim && key < self.kv_len {
            true => values[key * self.head_dim + channel],
            false => 0.0,
        }
    }

    fn sampled_keys(&self) -> Vec<usize> {
        match self.smooth {
            Smooth::Off => Vec::new(),
            Smooth::Mean => (0..self.kv_len).collect(),
            Smooth::Sampled(n) => {
                let n = self.kv_len.min(n.get() as usize);
                (0..n).map(|i| i * self.kv_len / n).collect()
            }
        }
    }
}

/// The ranges of a workspace that the preparation fills.
struct Codes<'a> {
    k_mean: Vec<f32>,
    k_scales: Vec<f32>,
    k_tiles: &'a [u8],
    v_scales: Vec<f32>,
    v_tiles: &'a [u8],
    /// Empty where V becomes integers.
    v_residuals: Vec<f32>,
}

impl<'a> Codes<'a> {
    fn of(device: &OnDevice<'_>, bytes: &'a [u8]) -> Self {
        let description = device.plan.describe();
        let range = |name: &str| {
            let found = description.scratch.iter().find(|range| range.name == name);
            let Some(range) = found else { return &[][..] };
            let start = usize::try_from(range.offset).unwrap();
            &bytes[start..][..usize::try_from(range.bytes).unwrap()]
        };
        let floats = |name| -> Vec<f32> {
            let words = range(name).as_chunks().0.iter();
            words.map(|&word| f32::from_le_bytes(word)).collect()
        };
        Self {
            k_mean: floats("k_mean"),
            k_scales: floats("k_tile_scales"),
            k_tiles: range("k_tiles"),
            v_scales: floats("v_scales"),
            v_tiles: range("v_tiles"),
            v_residuals: floats("v_tile_residuals"),
        }
    }

    fn check_k(&self, head: usize, keys: &[f32], case: &Case) -> Result<(), String> {
        let (width, tiles) = (case.width(), case.kv_len.div_ceil(TILE));
        let at = |key: usize, channel: usize| match channel < case.head_dim {
            true => keys[key * case.head_dim + channel],
            false => 0.0,
        };
        let largest = keys.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        let sampled = case.sampled_keys();
        let means = &self.k_mean[head * width..][..width];
        for (channel, &mean) in means.iter().enumerate() {
            let sum: f64 = sampled.iter().map(|&key| f64::from(at(key, channel))).sum();
            let want = sum / (sampled.len().max(1) as f64);
            if (f64::from(mean) - want).abs() > 1e-5 * f64::from(largest) {
                return Err(format!("mean of channel {channel} is {mean}, not {want}"));
            }
        }
        for tile in 0..tiles {
            let real = TILE.min(case.kv_len - tile * TILE);
            let codes = &self.k_tiles[(head * tiles + tile) * TILE * width..][..TILE * width];
            for group in 0..GROUPS {
                let members = (0..real).filter(|key| key % 8 / 2 == group);
                let x = |key: usize, channel| at(tile * TILE + key, channel) - means[channel];
                let amax = members
                    .flat_map(|key| (0..width).map(move |channel| x(key, channel).abs()))
                    .fold(0.0, f32::max);
                let scale = self.k_scales[(head * tiles + tile) * GROUPS + group];
                scale_is(scale, amax, 127.0)
                    .map_err(|e| format!("K, tile {tile}, group {group}: {e}"))?;
                for key in (0..TILE).filter(|key| key % 8 / 2 == group) {
                    for channel in 0..width {
                        let code = codes[swizzled(key, channel, width)].cast_signed();
                        let x = if key < real {
                            x(key, channel) / scale
                        } else {
                            0.0
                        };
                        if (x - f32::from(code)).abs() > 0.501 {
                            return Err(format!(
                                "K, tile {tile}, key {key}, channel {channel}: {code} for {x}"
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Of the `tile`th tile of all heads.
    fn v_code(&self, tile: usize, key: usize, channel: usize, width: usize) -> u8 {
        // Rows of 128 keys, swizzled; of each 16 keys, the two halves' pairs alternate.
        let place = key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
        // Of 32 channels, the eight of an octet are pairs of rows, eight apart.
        let row = channel / 32 * 32 + channel / 2 % 4 * 8 + channel / 8 % 4 * 2 + channel % 2;
        let byte = TILE * row + 16 * ((key / 16) ^ (row % 8)) + place;
        self.v_tiles[tile * TILE * width + byte]
    }

    fn check_integer_v(&self, head: usize, values: &[f32], case: &Case) -> Result<(), String> {
        let (width, tiles) = (case.width(), case.kv_len.div_ceil(TILE));
        for channel in 0..width {
            let at = |key| case.value(values, key, channel);
            let amax = (0..case.kv_len).map(|key| at(key).abs());
            let amax = amax.fold(0.0, f32::max);
            let scale = self.v_scales[head * width + channel];
            // A channel of zeros has scale 0, so that it gives 0 whatever its codes.
            if amax >= 1e-30 {
                scale_is(scale, amax, 127.0).map_err(|e| format!("V, channel {channel}: {e}"))?;
            } else if scale != 0.0 {
                return Err(format!("V, channel {channel} of zeros: scale {scale}"));
            }
            for key in 0..tiles * TILE {
                let byte = self.v_code(head * tiles + key / TILE, key % TILE, channel, width);
                let (code, x) = (f32::from(byte) - 128.0, at(key) / amax.max(1e-30) * 127.0);
                if (x - code).abs() > 0.501 {
                    return Err(format!("V, key {key}, channel {channel}: {code} for {x}"));
                }
            }
        }
        match self.v_residuals.is_empty() {
            true => Ok(()),
            false => Err("residuals that nothing reads".to_owned()),
        }
    }

    fn check_v(&self, head: usize, values: &[f32], case: &Case) -> Result<(), String> {
        let (width, tiles) = (case.width(), case.kv_len.div_ceil(TILE));
        for channel in 0..width {
            let at = |key| case.value(values, key, channel);
            let amax = (0..case.kv_len).map(|key| at(key).abs());
            let amax = amax.fold(0.0, f32::max);
            let scale = self.v_scales[head * width + channel];
            scale_is(scale, amax, 448.0).map_err(|e| format!("V, channel {channel}: {e}"))?;
            let mut residuals = vec![Residual::default(); tiles];
            for key in 0..tiles * TILE {
                let tile = key / TILE;
                let code = e4m3(self.v_code(head * tiles + tile, key % TILE, channel, width));
                let x = at(key) / scale;
                let gap = (x.abs().log2().floor().max(-6.0) - 3.0).exp2();
                if (x - code).abs() > 0.501 * gap {
                    return Err(format!("V, key {key}, channel {channel}: {code} for {x}"));
                }
                residuals[tile].add(x, code);
            }
            for (tile, want) in residuals.iter().enumerate() {
                let got = self.v_residuals[(head * tiles + tile) * width + channel];
                want.is(got)
                    .map_err(|e| format!("V, tile {tile}, channel {channel}: {e}"))?;
            }
        }
        Ok(())
    }
}

/// What rounding took from a tile's keys in one channel, and how far a kernel that adds it up in f16 may
/// be off.
#[derive(Clone, Default)]
struct Residual {
    sum: f64,
    tolerance: f64,
}

impl Residual {
    fn add(&mut self, x: f32, code: f32) {
        self.sum += f64::from(x) - f64::from(code);
        // Half a unit in the last place of x, and as much for the sums that its residual passes through.
        self.tolerance += f64::from(x.abs()) / 2048.0;
    }

    fn is(&self, got: f32) -> Result<(), String> {
        match (f64::from(got) - self.sum).abs() <= self.tolerance {
            true => Ok(()),
            false => Err(format!("residual {got}, not {}", self.sum)),
        }
    }
}

/// Within 4 units in the last place of `amax / largest`; 1 for a group of zeros.
fn scale_is(scale: f32, amax: f32, largest: f32) -> Result<(), String> {
    let want = if amax < 1e-30 { 1.0 } else { amax / largest };
    match (scale - want).abs() <= 4.0 * f32::EPSILON * want {
        true => Ok(()),
        false => Err(format!("scale {scale}, not {want}")),
    }
}

/// The number that a byte of 1, 4 and 3 bits stands for.
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match exponent {
        0 => fraction / 512.0,
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// Where tile/swizzle.cuh puts a byte of a tile of 128 rows.
fn swizzled(row: usize, column: usize, width: usize) -> usize {
    let panel = width.min(128);
    let mixed = (column % panel / 16) ^ if panel == 128 { row % 8 } else { row / 2 % 4 };
    column / panel * 128 * panel + row * panel + mixed * 16 + column % 16
}
