//! Kernels, compiled once per device, and the recording of dispatches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sageattn_core::Error;
use sageattn_shaders::{Source, Variant};

use crate::device::Context;
use crate::memory::index;

/// A compiled kernel and the layout of what it binds.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    /// Size of its parameter block in bytes; zero for none.
    params: u64,
}

/// The kernels of one device, shared by its plans.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pipelines(Arc<Mutex<HashMap<Variant, Slot>>>);

/// One kernel, once it is compiled.
type Slot = Arc<Mutex<Option<Arc<Pipeline>>>>;

/// Bytes of a buffer as bound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    /// A multiple of the device's alignment.
    pub(crate) offset: u64,
    /// A multiple of 4, not zero.
    pub(crate) bytes: u64,
}

impl<'a> Range<'a> {
    pub(crate) fn whole(buffer: &'a wgpu::Buffer) -> Self {
        Self {
            buffer,
            offset: 0,
            bytes: buffer.size(),
        }
    }
}

/// One dispatch: its parameter block and its workgroups in x and y.
#[derive(Clone, Debug)]
pub(crate) struct Dispatch {
    pub(crate) params: Vec<u8>,
    pub(crate) grid: [u32; 2],
}

/// A kernel on one set of bindings, cut into dispatches.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    pub(crate) stage: &'static str,
    pub(crate) pipeline: Arc<Pipeline>,
    /// In the order of the kernel's bindings, after the parameters.
    pub(crate) bindings: Vec<Range<'a>>,
    pub(crate) dispatches: Vec<Dispatch>,
}

/// Parameter blocks on the device, by content. A block never changes once written, so commands that were
/// recorded but not yet run keep their own whatever is recorded after them; and a call with tensors laid
/// out as before finds its blocks there and allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct ParamCache(Mutex<HashMap<Vec<u8>, wgpu::Buffer>>);

impl Pipelines {
    /// The kernel, compiled if this device has not seen it.
    pub(crate) fn get(&self, context: &Context, variant: &Variant) -> Result<Arc<Pipeline>, Error> {
        let slot = {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(known.entry(*variant).or_default())
        };
        // Held while compiling: two plans that need the same kernel compile it once, and nobody waits
        // for a kernel that he does not need. What did not compile is tried again.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = slot.as_ref() {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(compile(context, variant)?);
        Ok(Arc::clone(slot.insert(pipeline)))
    }
}

/// The storage bindings of a kernel: read-only or not. The workspace is always bound writable: wgpu
/// tracks whole buffers, and would refuse one that a dispatch both reads and writes.
fn storage_bindings(variant: &Variant) -> &'static [bool] {
    const READ: bool = true;
    const WRITE: bool = false;
    match variant {
        Variant::Channels(_) => &[READ, WRITE],
        Variant::ChannelsFinish { .. } | Variant::SelfTest | Variant::MatrixLayout => &[WRITE],
        Variant::QuantizeRows(_)
        | Variant::ValuesF16(_)
        | Variant::ValuesRows(_)
        | Variant::ValuesI8(_) => &[READ, WRITE, WRITE],
        Variant::Attend(_) => &[WRITE; 6],
        Variant::Decode(_) => &[READ, READ, READ, WRITE],
        Variant::Merge(_) => &[WRITE; 3],
    }
}

fn params_size(variant: &Variant) -> u64 {
    use sageattn_shaders::abi::{AttendParams, DecodeParams, MergeParams, TensorParams};
    let size = match variant {
        Variant::SelfTest | Variant::MatrixLayout => 0,
        Variant::Attend(_) => size_of::<AttendParams>(),
        Variant::Decode(_) => size_of::<DecodeParams>(),
        Variant::Merge(_) => size_of::<MergeParams>(),
        _ => size_of::<TensorParams>(),
    };
    size as u64
}

/// The module of a kernel, without wgpu's own checks.
fn module(device: &wgpu::Device, name: &str, source: Source) -> wgpu::ShaderModule {
    match source {
        Source::Wgsl(text) => {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(name),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            };
            // SAFETY: The kernels guard what the removed checks would. Storage accesses: rows and channels
            // are compared with the lengths of the parameter block before each access to a tensor, and the
            // host binds ranges that hold all rows up to those lengths (`memory.rs`); scratch is padded to
            // whole tiles. Workgroup arrays are indexed by constants and the invocation's index, within
            // sizes that `tests/validate.rs` of the shaders checks. Loops count up to uniform bounds and
            // end. Divisors are non-zero constants or counts that `Problem` keeps above zero. No workgroup
            // variable is read before it is written.
            unsafe {
                device.create_shader_module_trusted(
                    descriptor,
                    wgpu::ShaderRuntimeChecks::unchecked(),
                )
            }
        }
        Source::Spirv(words) => {
            let entry = wgpu::PassthroughShaderEntryPoint {
                name: "main".into(),
                // Metal's alone to know.
                workgroup_size: (0, 0, 0),
            };
            let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
                label: Some(name),
                entry_points: vec![entry].into(),
                spirv: Some(words.into()),
                ..Default::default()
            };
            // SAFETY: The words are those that `cargo xtask spirv` compiled and validated, with numbers
            // from `AttendVariant` for constants. They bind set 0 in the order of `storage_bindings`,
            // use no capability beyond the features in `attend/matrix_i8.rs`, and guard their accesses
            // as said above for WGSL.
            unsafe { device.create_shader_module_passthrough(descriptor) }
        }
    }
}

fn compile(context: &Context, variant: &Variant) -> Result<Pipeline, Error> {
    let kernel = variant.compose(context.native);
    let name = kernel.name;
    let device = &context.device;
    let params = params_size(variant);
    let entry = |binding, ty, dynamic, size| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: dynamic,
            min_binding_size: std::num::NonZeroU64::new(size),
        },
        count: None,
    };
    let mut entries = Vec::new();
    if params > 0 {
        entries.push(entry(0, wgpu::BufferBindingType::Uniform, true, params));
    }
    for &read_only in storage_bindings(variant) {
        let ty = wgpu::BufferBindingType::Storage { read_only };
        entries.push(entry(index(entries.len() as u64), ty, false, 0));
    }
    tracing::debug!(kernel = %name, "compiling");
    let created = context.catch(|| {
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(&name),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let module = module(device, &name, kernel.source);
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        (pipeline, layout)
    });
    match created {
        Ok((pipeline, layout)) => Ok(Pipeline {
            pipeline,
            layout,
            params,
        }),
        Err(error) => Err(Error::Compile {
            kernel: name,
            log: error.to_string(),
        }),
    }
}

/// Records steps into an encoder: one compute pass, or one per step with timestamps round it when
/// `queries` is given (two per step).
pub(crate) fn record(
    context: &Context,
    encoder: &mut wgpu::CommandEncoder,
    steps: &[Step<'_>],
    cache: Option<&ParamCache>,
    queries: Option<&wgpu::QuerySet>,
) -> Result<(), Error> {
    let align = context
        .facts
        .limits
        .min_uniform_buffer_offset_alignment
        .max(16) as usize;
    let mut blocks = Vec::new();
    let mut offsets = Vec::new();
    for dispatch in steps.iter().flat_map(|step| &step.dispatches) {
        offsets.push(index(blocks.len() as u64));
        blocks.extend_from_slice(&dispatch.params);
        blocks.resize(blocks.len().next_multiple_of(align), 0);
    }
    let params = match cache {
        Some(cache) if !blocks.is_empty() => Some(cache.buffer(context, blocks)?),
        _ => None,
    };
    let mut offsets = offsets.into_iter();
    context.scoped("recording commands", || {
        let mut pass = None;
        for (number, step) in (0u32..).zip(steps) {
            let group = bind(context, step, params.as_ref());
            if queries.is_some() {
                pass = None;
            }
            let pass = pass.get_or_insert_with(|| {
                let timestamp_writes = queries.map(|query_set| wgpu::ComputePassTimestampWrites {
                    query_set,
                    beginning_of_pass_write_index: Some(2 * number),
                    end_of_pass_write_index: Some(2 * number + 1),
                });
                encoder
                    .begin_compute_pass(&wgpu::ComputePassDescriptor {
                        label: Some("sageattn"),
                        timestamp_writes,
                    })
                    .forget_lifetime()
            });
            pass.set_pipeline(&step.pipeline.pipeline);
            for dispatch in &step.dispatches {
                let offset = offsets.next();
                let dynamic = if step.pipeline.params > 0 {
                    offset
                } else {
                    None
                };
                pass.set_bind_group(0, &group, dynamic.as_slice());
                pass.dispatch_workgroups(dispatch.grid[0], dispatch.grid[1], 1);
            }
        }
    })
}

fn bind(context: &Context, step: &Step<'_>, params: Option<&wgpu::Buffer>) -> wgpu::BindGroup {
    let block = params.map(|buffer| Range {
        buffer,
        offset: 0,
        bytes: step.pipeline.params,
    });
    let ranges = block.iter().chain(&step.bindings);
    let entries: Vec<_> = ranges
        .zip(0u32..)
        .map(|(range, binding)| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: range.buffer,
                offset: range.offset,
                size: std::num::NonZeroU64::new(range.bytes),
            }),
        })
        .collect();
    context
        .device
        .create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(step.stage),
            layout: &step.pipeline.layout,
            entries: &entries,
        })
}

impl ParamCache {
    fn buffer(&self, context: &Context, blocks: Vec<u8>) -> Result<wgpu::Buffer, Error> {
        // Callers with more layouts than this in turn pay a small allocation per call.
        const ENTRIES: usize = 64;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = known.get(&blocks) {
            return Ok(buffer.clone());
        }
        let buffer = context.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn parameters"),
            size: blocks.len() as u64,
            usage: wgpu::BufferUsages::UNIFORM,
            mapped_at_creation: true,
        })?;
        buffer
            .get_mapped_range_mut(..)
            .map_err(|source| Error::device("writing parameters", source))?
            .copy_from_slice(&blocks);
        buffer.unmap();
        if known.len() >= ENTRIES {
            known.clear();
        }
        known.insert(blocks, buffer.clone());
        Ok(buffer)
    }
}

/// Cuts a grid of `blocks` by `pairs` workgroups into dispatches that stay within the device's bound on
/// work and on either dimension; `params` makes the parameter block for a first block and pair.
pub(crate) fn cut(
    context: &Context,
    blocks: u64,
    pairs: u64,
    ops_per_block: u64,
    params: impl Fn(u32, u32) -> Vec<u8>,
) -> Vec<Dispatch> {
    let side = u64::from(context.facts.limits.max_compute_workgroups_per_dimension);
    let [width, height] = cut_sizes(
        blocks,
        pairs,
        context.dispatch_ops / ops_per_block.max(1),
        side,
    );
    let mut dispatches = Vec::new();
    for pair in (0..pairs.div_ceil(height)).map(|n| n * height) {
        for block in (0..blocks.div_ceil(width)).map(|n| n * width) {
            let grid = [width.min(blocks - block), height.min(pairs - pair)];
            dispatches.push(Dispatch {
                params: params(index(block), index(pair)),
                grid: grid.map(index),
            });
        }
    }
    dispatches
}

/// Blocks and pairs of one dispatch: whole rows of blocks where `most` workgroups allow one, else parts
/// of a row.
fn cut_sizes(blocks: u64, pairs: u64, most: u64, side: u64) -> [u64; 2] {
    let width = blocks.min(side).min(most).max(1);
    let height = match width == blocks {
        true => (most / blocks).min(side).clamp(1, pairs),
        false => 1,
    };
    [width, height]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dispatches_stay_within_work_and_sides() {
        assert_eq!(cut_sizes(10, 12, u64::MAX, 65535), [10, 12], "all at once");
        assert_eq!(
            cut_sizes(10, 12, 35, 65535),
            [10, 3],
            "three rows of blocks"
        );
        assert_eq!(cut_sizes(10, 12, 4, 65535), [4, 1], "part of a row");
        assert_eq!(cut_sizes(10, 12, 0, 65535), [1, 1], "never nothing");
        assert_eq!(cut_sizes(100, 1000, u64::MAX, 64), [64, 1]);
        assert_eq!(cut_sizes(10, 1000, u64::MAX, 64), [10, 64]);
    }
}
