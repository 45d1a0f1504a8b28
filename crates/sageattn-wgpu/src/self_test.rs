//! What a device is asked to prove when it is opened: drivers have been seen to get these wrong.

use sageattn_core::Error;
use sageattn_shaders::{Native, Variant};

use crate::device::Context;
use crate::memory::index;
use crate::pipeline::{Dispatch, Range, Step, record};

impl Context {
    /// Runs the instructions that kernels rely on against the host's arithmetic.
    pub(crate) fn self_test(&mut self) -> Result<(), Error> {
        let cases = self_test_cases();
        let size = 16 * cases.len() as u64;
        let storage = self.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn self-test"),
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })?;
        let operands: Vec<u32> = cases.iter().flat_map(|&(a, b)| [a, b, 0, 0]).collect();
        self.scoped("uploading the self-test", || {
            self.queue
                .write_buffer(&storage, 0, bytemuck::cast_slice(&operands));
        })?;
        let step = Step {
            stage: "self test",
            pipeline: self.pipelines.get(self, &Variant::SelfTest)?,
            bindings: vec![Range::whole(&storage)],
            dispatches: vec![Dispatch {
                params: Vec::new(),
                grid: [index(cases.len().div_ceil(64) as u64), 1],
            }],
        };
        let mut encoder = self.device.create_command_encoder(&Default::default());
        record(self, &mut encoder, &[step], None, None)?;
        self.submit(encoder)?;
        let mut results = vec![0u32; 4 * cases.len()];
        self.read(&storage, 0, bytemuck::cast_slice_mut(&mut results))?;
        for (&(a, b), result) in cases.iter().zip(results.as_chunks::<4>().0) {
            let [dot, packed, x, y] = *result;
            self.native.dot &= dot == dot4(a, b).cast_unsigned();
            // WGSL leaves open what becomes of floats beyond f16, and of a NaN's bits.
            let fit = |x: u32| f32::from_bits(x).abs() <= half::f16::MAX.to_f32();
            self.native.pack &= !(fit(a) && fit(b)) || packed == pack_halves(a, b);
            for (got, right) in [x, y].map(f32::from_bits).into_iter().zip(halves(b)) {
                let same = got.to_bits() == right.to_bits() || got.is_nan() && right.is_nan();
                if !same && self.broken.is_empty() {
                    self.broken.push(format!(
                        "a right unpack2x16float: its self-test gave {got:?} for {right:?}"
                    ));
                }
            }
        }
        if self.native != Native::ALL || !self.broken.is_empty() {
            let device = &self.info.name;
            tracing::warn!(device, native = ?self.native, broken = ?self.broken, "the self-test struck out instructions");
        }
        Ok(())
    }
}

/// Operand pairs: as four signed bytes each, as two floats to round to f16, and the second as two f16.
fn self_test_cases() -> Vec<(u32, u32)> {
    let mut cases = vec![
        (0x8181_8181, 0x7f7f_7f7f),
        (0x8080_8080, 0x7f81_7f81),
        (0x0102_0304, 0xfffe_fdfc),
    ];
    // Ties, both ways; the largest half; halves below 2^-14; two that round up into the next binade.
    let floats = [
        1.0f32,
        1.000_488_3,
        1.001_464_8,
        0.333_333_34,
        65504.0,
        -2.5,
        6.1e-5,
        3.0e-5,
        5.96e-8,
        0.999_9,
        1.4e-7,
        0.0,
    ];
    for (number, x) in floats.iter().enumerate() {
        let other = floats[(number + 5) % floats.len()];
        cases.push((x.to_bits(), other.to_bits()));
    }
    // Halves to unpack: one, the smallest subnormal, the largest subnormal, the smallest normal.
    cases.extend([(0, 0x0001_3c00), (0, 0x0400_83ff), (0, 0x7bff_fbff)]);
    cases
}

fn dot4(a: u32, b: u32) -> i32 {
    let bytes = |x: u32| x.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
    bytes(a).iter().zip(bytes(b)).map(|(x, y)| x * y).sum()
}

fn pack_halves(a: u32, b: u32) -> u32 {
    let half = |x: u32| u32::from(half::f16::from_f32(f32::from_bits(x)).to_bits());
    half(a) | (half(b) << 16)
}

fn halves(word: u32) -> [f32; 2] {
    let [a, b, c, d] = word.to_le_bytes();
    [[a, b], [c, d]].map(|bytes| half::f16::from_le_bytes(bytes).to_f32())
}
