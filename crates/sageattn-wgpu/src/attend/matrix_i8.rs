//! The tier of 8-bit integer matrices: what it needs of a device, its tile, and the proof that matrices
//! lie as its kernel expects them.

use sageattn_core::Error;
use sageattn_shaders::{AttendKernel, MatrixI8Tile, Pv, RowGroups, Variant};

use crate::device::Context;
use crate::pipeline::{Dispatch, Range, Step, record};
use crate::tier::{Facts, Request};

/// What the device lacks for the tier.
pub(crate) fn lacks(facts: &Facts) -> Vec<String> {
    use wgpu::Features;
    let mut lacks = Vec::new();
    for (feature, name) in [
        (Features::PASSTHROUGH_SHADERS, "PASSTHROUGH_SHADERS"),
        (
            Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
            "EXPERIMENTAL_COOPERATIVE_MATRIX",
        ),
        (Features::SHADER_F16, "SHADER_F16"),
    ] {
        if !facts.features.contains(feature) {
            lacks.push(format!("the feature {name}"));
        }
    }
    lacks.extend(facts.i8_matrices.clone().err());
    let [least, most] = facts.subgroup;
    if [least, most] != [MatrixI8Tile::SUBGROUP; 2] {
        lacks.push(format!(
            "subgroups of {} (it has {least} to {most})",
            MatrixI8Tile::SUBGROUP
        ));
    }
    lacks
}

/// The kernel for a request.
///
/// # Errors
/// What the device or the tier lacks.
pub(crate) fn kernel(facts: &Facts, request: &Request) -> Result<AttendKernel, Vec<String>> {
    if request.pv != Pv::F16 {
        return Err(vec!["P V in 8 bits".to_owned()]);
    }
    if (request.q_groups, request.k_groups) != (RowGroups::BLOCK_128, RowGroups::BLOCK_64) {
        let (q, k) = (request.q_groups.name, request.k_groups.name);
        return Err(vec![format!("scales by {q} and {k}")]);
    }
    let limits = &facts.limits;
    let tile = tile(request.head_dim);
    let invocations = limits
        .max_compute_invocations_per_workgroup
        .min(limits.max_compute_workgroup_size_x);
    for (needs, has, what) in [
        (
            tile.workgroup_bytes(),
            limits.max_compute_workgroup_storage_size,
            "bytes of workgroup memory",
        ),
        (tile.invocations(), invocations, "invocations per workgroup"),
    ] {
        if needs > has {
            return Err(vec![format!("{needs} {what} (it has {has})")]);
        }
    }
    Ok(AttendKernel::MatrixI8(tile))
}

/// The fastest tile of those measured (`docs/kernels/attend_matrix_i8.md`): what a subgroup holds of O,
/// scores and codes fills its registers.
fn tile(head_dim: u32) -> MatrixI8Tile {
    match head_dim {
        ..=64 => MatrixI8Tile::new(head_dim, 4, 2, 64, 1),
        65..=128 => MatrixI8Tile::new(head_dim, 4, 2, 32, 1),
        _ => MatrixI8Tile::new(head_dim, 8, 1, 32, 1),
    }
}

/// Elements that an invocation holds of a 16 x 16 matrix.
const ELEMENTS: u32 = 8;
/// Matrices that the layout is asked of: f32 sums, integer sums, f16 factors.
const MATRICES: usize = 3;
const ONE_MATRIX: usize = 256;

/// Row by row the number of the element that an invocation of the expected layout holds:
/// `row_half` and `column` of `attend_matrix_i8.comp`.
fn expected(invocation: u32, element: u32) -> u32 {
    let row = invocation / 4 + element / 4 * 8;
    let column = invocation % 4 * 2 + element % 2 + element / 2 % 2 * 8;
    row * 16 + column
}

/// What `matrix_layout.comp` reads, and room for what it writes.
fn layout_question() -> Vec<u32> {
    let numbers = || (0..ONE_MATRIX).map(|n| n as f32);
    let sums = numbers().map(f32::to_bits);
    let integers = 0..256u32;
    let factors: Vec<_> = numbers().map(half::f16::from_f32).collect();
    let mut words: Vec<u32> = sums.chain(integers).collect();
    let (pairs, _) = factors.as_chunks::<2>();
    words.extend(
        pairs
            .iter()
            .map(|[low, high]| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16),
    );
    words
}

/// Whether the device laid its matrices as the kernel expects, by what the probe wrote.
fn layout_fits(answer: &[u32]) -> Result<(), String> {
    let Some((&sizes, elements)) = answer.split_first_chunk::<4>() else {
        return Err("no answer".to_owned());
    };
    let expected_sizes = [32, 8, 8, 8];
    if sizes != expected_sizes {
        return Err(format!(
            "a subgroup and three matrices' shares of it of {sizes:?}, not {expected_sizes:?}"
        ));
    }
    for (matrix, elements) in elements.as_chunks::<ONE_MATRIX>().0.iter().enumerate() {
        for (at, &element) in (0..).zip(elements) {
            let right = expected(at / ELEMENTS, at % ELEMENTS);
            if element != right {
                return Err(format!(
                    "matrix {matrix}: invocation {} holds element {element} as its {}, not {right}",
                    at / ELEMENTS,
                    at % ELEMENTS
                ));
            }
        }
    }
    Ok(())
}

impl Context {
    /// Asks a device that lacks nothing else how its matrices lie, and takes the tier from it where they
    /// do not lie as the kernel expects.
    ///
    /// # Errors
    /// [`Error::Device`] where the device fails beyond refusing the question.
    pub(crate) fn prove_matrix_layout(&mut self) -> Result<(), Error> {
        if !lacks(&self.facts).is_empty() {
            return Ok(());
        }
        let pipeline = match self.pipelines.get(self, &Variant::MatrixLayout) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                self.facts.i8_matrices = Err(format!("a driver that takes its kernels: {error}"));
                return Ok(());
            }
        };
        let question = layout_question();
        let answer_at = 4 * question.len() as u64;
        let mut answer = vec![0u32; 4 + MATRICES * ONE_MATRIX];
        let storage = self.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn matrix layout"),
            size: answer_at + 4 * answer.len() as u64,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })?;
        self.scoped("asking for the layout of matrices", || {
            self.queue
                .write_buffer(&storage, 0, bytemuck::cast_slice(&question));
        })?;
        let step = Step {
            stage: "matrix layout",
            pipeline,
            bindings: vec![Range::whole(&storage)],
            dispatches: vec![Dispatch {
                params: Vec::new(),
                grid: [1, 1],
            }],
        };
        let mut encoder = self.device.create_command_encoder(&Default::default());
        record(self, &mut encoder, &[step], None, None)?;
        self.submit(encoder)?;
        self.read(&storage, answer_at, bytemuck::cast_slice_mut(&mut answer))?;
        self.facts.i8_matrices = layout_fits(&answer)
            .map_err(|found| format!("matrices that lie as its kernel expects: {found}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::tests::{long, plain};

    fn able() -> Facts {
        use wgpu::Features;
        Facts {
            limits: wgpu::Limits {
                max_compute_workgroup_storage_size: 49152,
                ..wgpu::Limits::default()
            },
            features: Features::PASSTHROUGH_SHADERS
                | Features::EXPERIMENTAL_COOPERATIVE_MATRIX
                | Features::SHADER_F16,
            i8_matrices: Ok(()),
            ..plain()
        }
    }

    /// The answer of a device whose invocation holds element `layout(invocation, element)`.
    fn answer(layout: impl Fn(u32, u32) -> u32) -> Vec<u32> {
        let mut words = vec![32, 8, 8, 8];
        for _ in 0..MATRICES {
            words.extend((0..256).map(|at| layout(at / ELEMENTS, at % ELEMENTS)));
        }
        words
    }

    #[test]
    fn every_head_dim_has_a_tile_on_an_able_device() {
        assert!(lacks(&able()).is_empty());
        for head_dim in 1..=256 {
            let kernel = kernel(&able(), &long(head_dim, Pv::F16)).unwrap();
            let AttendKernel::MatrixI8(tile) = kernel else {
                panic!("{kernel:?}");
            };
            assert!(tile.qk_dim >= head_dim && tile.pv_dim >= head_dim);
        }
    }

    #[test]
    fn a_plain_device_lacks_it_and_says_what() {
        let lacks = lacks(&plain()).join("; ");
        for part in ["PASSTHROUGH_SHADERS", "SHADER_F16", "8-bit matrices"] {
            assert!(lacks.contains(part), "{lacks}");
        }
        assert!(kernel(&able(), &long(64, Pv::I8)).is_err());
    }

    #[test]
    fn the_expected_layout_holds_every_element_once() {
        let mut seen = vec![0; ONE_MATRIX];
        for at in 0..256 {
            seen[expected(at / ELEMENTS, at % ELEMENTS) as usize] += 1;
        }
        assert_eq!(seen, vec![1; ONE_MATRIX]);
        assert_eq!(layout_fits(&answer(expected)), Ok(()));
    }

    #[test]
    fn another_layout_is_told() {
        // The halves of a row swapped with the rows: how one might expect it from CUDA.
        let other = |invocation, element| match element {
            2 | 3 => expected(invocation, element + 2),
            4 | 5 => expected(invocation, element - 2),
            _ => expected(invocation, element),
        };
        let found = layout_fits(&answer(other)).unwrap_err();
        assert!(found.contains("matrix 0: invocation 0"), "{found}");
        let mut wide = answer(expected);
        wide[0] = 64;
        assert!(layout_fits(&wide).is_err());
    }
}
