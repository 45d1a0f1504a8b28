//! The CPU backend: the oracles as a device, so that every recipe runs on every machine.

use std::time::Instant;

use crate::host::{read_dense, write_dense};
use crate::reference::faithful::Prepared;
use crate::{
    Backend, Buffer, Clock, Description, DeviceInfo, DeviceKind, Error, HostBuffer, HostOutput, Io,
    Plan, Problem, Profile, Recipe, Rounding, TensorView, Unsupported,
};

const NAME: &str = "cpu";

/// Computes with [`reference`](crate::reference) on all cores. Takes every problem and every recipe;
/// speed is not its aim. Unlike a device, it has computed when [`Plan::run`] returns, and it takes its
/// scratch from the heap instead of the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    rounding: Option<Rounding>,
}

impl Cpu {
    /// The CPU with each recipe's own tiles.
    pub fn new() -> Self {
        Self::default()
    }

    /// The CPU with another kernel's tile, order and threshold.
    pub fn with_rounding(rounding: Rounding) -> Self {
        Self {
            rounding: Some(rounding),
        }
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            name: format!("CPU, {} threads", rayon::current_num_threads()),
            driver: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
            kind: DeviceKind::Cpu,
        }
    }

    fn supports(&self, _: &Problem, _: &Recipe) -> Result<(), Unsupported> {
        Ok(())
    }

    /// The portable tier's recipe: there is no speed to win here, so results match across machines.
    fn preferred(&self, _: &Problem) -> Recipe {
        Recipe::SAGE1_B
    }

    fn plan(&self, problem: &Problem, recipe: &Recipe) -> Result<Box<dyn Plan>, Error> {
        let plan = CpuPlan {
            problem: *problem,
            recipe: *recipe,
            rounding: self.rounding.unwrap_or(Rounding::of(recipe)),
        };
        tracing::debug!(plan = %plan.describe(), "planned");
        Ok(Box::new(plan))
    }

    fn alloc(&self, bytes: u64) -> Result<Box<dyn Buffer>, Error> {
        let out_of_memory = Error::OutOfMemory { bytes };
        let Ok(len) = usize::try_from(bytes) else {
            return Err(out_of_memory);
        };
        let mut memory = Vec::new();
        if memory.try_reserve_exact(len).is_err() {
            return Err(out_of_memory);
        }
        memory.resize(len, 0);
        Ok(Box::new(HostBuffer::new(memory)))
    }

    fn upload(&self, buffer: &dyn Buffer, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let range = byte_range(buffer, offset, bytes.len())?;
        host_buffer("buffer", buffer)?.write(|memory| memory[range].copy_from_slice(bytes));
        Ok(())
    }

    fn download(&self, buffer: &dyn Buffer, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let range = byte_range(buffer, offset, bytes.len())?;
        host_buffer("buffer", buffer)?.read(|memory| bytes.copy_from_slice(&memory[range]));
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[derive(Debug)]
struct CpuPlan {
    problem: Problem,
    recipe: Recipe,
    rounding: Rounding,
}

impl Plan for CpuPlan {
    fn describe(&self) -> Description {
        Description {
            variant: format!("{NAME}_k{}", self.rounding.key_tile),
            recipe: self.recipe,
            rounding: self.rounding,
            scratch: Vec::new(),
        }
    }

    fn workspace_bytes(&self) -> u64 {
        0
    }

    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error> {
        self.profile(io, workspace).map(|_| ())
    }

    fn profile(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<Profile, Error> {
        io.check_run(&self.problem, workspace, self.workspace_bytes())?;
        let (q, k, v) = (read("q", io.q())?, read("k", io.k())?, read("v", io.v())?);

        let start = Instant::now();
        let prepared = Prepared::new(&self.problem, &self.recipe, [&q, &k, &v]);
        let quantized = Instant::now();
        let result = prepared.attend(&self.rounding);
        let attended = Instant::now();

        write(io, &result)?;
        Ok(Profile {
            stages: vec![
                ("quantize", quantized - start),
                ("attend", attended - quantized),
            ],
            clock: Clock::Host,
        })
    }
}

fn read(tensor: &'static str, view: &TensorView<'_>) -> Result<Vec<f32>, Error> {
    let buffer = host_buffer(tensor, view.buffer)?;
    Ok(buffer.read(|bytes| read_dense(bytes, &view.layout, view.dtype)))
}

fn write(io: &Io<'_>, result: &HostOutput) -> Result<(), Error> {
    let view = io.out();
    let out = host_buffer("out", view.buffer)?;
    out.write(|bytes| write_dense(bytes, &view.layout, view.dtype, &result.out));
    if let (Some(view), Some(lse)) = (io.lse(), &result.lse) {
        let buffer = host_buffer("lse", view.buffer)?;
        let bytes = lse.iter().flat_map(|x| x.to_le_bytes());
        buffer.write(|memory| {
            let slots = memory[4 * view.offset..].iter_mut();
            slots.zip(bytes).for_each(|(slot, byte)| *slot = byte);
        });
    }
    Ok(())
}

fn host_buffer<'a>(tensor: &'static str, buffer: &'a dyn Buffer) -> Result<&'a HostBuffer, Error> {
    let foreign = || Error::ForeignBuffer {
        tensor,
        backend: NAME.to_owned(),
    };
    buffer.as_any().downcast_ref().ok_or_else(foreign)
}

fn byte_range(
    buffer: &dyn Buffer,
    offset: u64,
    len: usize,
) -> Result<std::ops::Range<usize>, Error> {
    let end = offset.checked_add(len as u64);
    if end.is_none_or(|end| end > buffer.bytes()) {
        let reason = format!("{len} bytes at {offset} of a buffer of {}", buffer.bytes());
        return Err(Error::invalid("buffer", reason));
    }
    // The buffer lies in memory, so its indices fit.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "offset + len is below a Vec's length"
    )]
    let start = offset as usize;
    Ok(start..start + len)
}
