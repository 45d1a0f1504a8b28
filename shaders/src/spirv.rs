//! Kernels that WGSL cannot express: GLSL in `spirv/`, and beside it the SPIR-V that was compiled from it.
//!
//! No user needs a shader compiler: `cargo xtask spirv` compiles, and the words are committed together
//! with `manifest.txt`, which `tests/spirv.rs` holds against both. A variant is the same words with other
//! specialization constants. wgpu hands SPIR-V to the driver as it is and applies no constants to it, so
//! [`Spirv::specialize`] writes them into the words.

/// One module as compiled.
#[derive(Clone, Copy, Debug)]
pub struct Spirv {
    /// The stem of its files in `spirv/`.
    pub name: &'static str,
    bytes: &'static [u8],
}

macro_rules! module {
    ($name:literal) => {
        Spirv {
            name: $name,
            bytes: include_bytes!(concat!("../spirv/", $name, ".spv")),
        }
    };
}

/// Attention with Q K^T in 8-bit integer matrices.
pub const ATTEND_MATRIX_I8: Spirv = module!("attend_matrix_i8");

/// Which element of a matrix each invocation holds.
pub const MATRIX_LAYOUT: Spirv = module!("matrix_layout");

/// Opcodes of the SPIR-V specification, section 3.49.
const OP_SPEC_CONSTANT: u32 = 50;
const OP_DECORATE: u32 = 71;
/// The decoration that numbers a specialization constant: section 3.20.
const SPEC_ID: u32 = 1;
/// Words before the first instruction.
const HEADER: usize = 5;

impl Spirv {
    /// Every module.
    pub const ALL: [Self; 2] = [ATTEND_MATRIX_I8, MATRIX_LAYOUT];

    /// The words with these specialization constants, by number. A number that the module does not have
    /// changes nothing.
    pub fn specialize(&self, constants: &[(u32, u32)]) -> Vec<u32> {
        let mut words = self.words();
        for (spec_id, at) in Self::constants_in(&words) {
            if let Some(&(_, value)) = constants.iter().find(|(number, _)| *number == spec_id) {
                words[at] = value;
            }
        }
        words
    }

    /// The numbers of the module's specialization constants, in the module's order.
    pub fn constants(&self) -> Vec<u32> {
        let constants = Self::constants_in(&self.words());
        constants.into_iter().map(|(number, _)| number).collect()
    }

    fn words(&self) -> Vec<u32> {
        let (words, _) = self.bytes.as_chunks();
        words.iter().map(|&word| u32::from_le_bytes(word)).collect()
    }

    /// Number and place of the value of every 32-bit specialization constant.
    fn constants_in(words: &[u32]) -> Vec<(u32, usize)> {
        let mut numbers = std::collections::HashMap::new();
        let mut constants = Vec::new();
        let mut at = HEADER;
        while let Some(&first) = words.get(at) {
            let (opcode, length) = (first & 0xffff, (first >> 16) as usize);
            // Decorations come before the constants that they number.
            match words.get(at + 1..at + length) {
                Some(&[target, SPEC_ID, number]) if opcode == OP_DECORATE => {
                    numbers.insert(target, number);
                }
                Some(&[_, result, _]) if opcode == OP_SPEC_CONSTANT => {
                    if let Some(&number) = numbers.get(&result) {
                        constants.push((number, at + 3));
                    }
                }
                _ => {}
            }
            at += length.max(1);
        }
        constants
    }

    /// What the manifest holds of the binary.
    pub fn fingerprint(&self) -> u64 {
        fingerprint(self.bytes)
    }
}

/// FNV-1a, 64 bits: tells whether somebody changed a file and forgot the other, not whether somebody
/// wanted to deceive.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(start, |hash: u64, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
