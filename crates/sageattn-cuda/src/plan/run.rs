//! The plan that runs what was chosen.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaStream, sys};
use sageattn_core::scratch::Scratch;
use sageattn_core::{Buffer, Clock, Description, Error, Io, Plan, Problem, Profile, Recipe};
use sageattn_kernels::abi::{AttnParams, HalfParams, PrepareParams};

use super::half::HalfChoice;
use super::{Choice, Ranges};
use crate::buffer::{Tensor, in_context};
use crate::launch::Kernel;
use crate::variant::{Prepare, PrepareOnce, Variant};
use crate::{attend_half, attend_sm90, quantize};

/// The loaded kernels of a [`Preparation`].
#[derive(Debug)]
pub(crate) enum Prepared {
    Twice {
        variant: Prepare,
        statistics: Arc<Kernel<PrepareParams>>,
        encode: Arc<Kernel<PrepareParams>>,
    },
    Once {
        variant: PrepareOnce,
        clusters: u32,
        kernel: Arc<Kernel<PrepareParams>>,
    },
}

/// Loaded kernels for one problem, on one stream.
#[derive(Debug)]
pub(crate) struct CudaPlan {
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) problem: Problem,
    pub(crate) recipe: Recipe,
    pub(crate) scratch: Scratch,
    pub(crate) stages: Stages,
}

/// What a plan launches.
#[derive(Debug)]
pub(crate) enum Stages {
    /// K and V to codes, then attention over them.
    Quantized {
        choice: Choice,
        ranges: Ranges,
        prepared: Prepared,
        attend: Arc<Kernel<AttnParams>>,
    },
    /// Attention on the tensors as they are.
    Half {
        choice: HalfChoice,
        attend: Arc<Kernel<HalfParams>>,
    },
}

impl Prepared {
    /// K and V to codes; `after` is called after each launch.
    fn enqueue(
        &self,
        stream: &CudaStream,
        choice: &Choice,
        params: PrepareParams,
        after: &mut impl FnMut(&'static str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Self::Twice {
                variant,
                statistics,
                encode,
            } => {
                statistics.enqueue(stream, &quantize::statistics(choice, params))?;
                after("statistics")?;
                encode.enqueue(stream, &quantize::encode(choice, variant, params))?;
                after("encode")
            }
            Self::Once {
                variant,
                clusters,
                kernel,
            } => {
                kernel.enqueue(stream, &quantize::once(choice, variant, *clusters, params))?;
                after("prepare")
            }
        }
    }
}

impl CudaPlan {
    /// The stages in order; `after` is called after each.
    fn enqueue(
        &self,
        io: &Io<'_>,
        workspace: &dyn Buffer,
        mut after: impl FnMut(&'static str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        io.check_run(&self.problem, workspace, self.workspace_bytes())?;
        let context = self.stream.context();
        let q = Tensor::resolve(context, "q", io.q())?;
        let k = Tensor::resolve(context, "k", io.k())?;
        let v = Tensor::resolve(context, "v", io.v())?;
        let o = Tensor::resolve(context, "out", io.out())?;
        let scratch = in_context(context, "workspace", workspace)?.address();
        let lse = match io.lse() {
            None => None,
            Some(lse) => {
                Some(in_context(context, "lse", lse.buffer)?.address() + 4 * lse.offset as u64)
            }
        };
        context
            .bind_to_thread()
            .map_err(|error| Error::device("making the context current", error))?;

        let stream = &*self.stream;
        match &self.stages {
            Stages::Quantized {
                choice,
                ranges,
                prepared,
                attend,
            } => {
                let params = quantize::params(choice, ranges, scratch, k, v);
                prepared.enqueue(stream, choice, params, &mut after)?;
                let launch = attend_sm90::attend(choice, ranges, scratch, q, o, lse);
                attend.enqueue(stream, &launch)?;
            }
            Stages::Half { choice, attend } => {
                let launch = attend_half::attend(choice, [q, k, v], o, lse)?;
                attend.enqueue(stream, &launch)?;
            }
        }
        after("attend")
    }

    fn record(&self) -> Result<CudaEvent, Error> {
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream
            .record_event(Some(timed))
            .map_err(|error| Error::device("recording an event", error))
    }
}

impl Plan for CudaPlan {
    fn describe(&self) -> Description {
        let (variant, rounding) = match &self.stages {
            Stages::Quantized { choice, .. } => (
                Variant::Attend(choice.attend),
                attend_sm90::rounding(&choice.attend),
            ),
            Stages::Half { choice, .. } => (
                Variant::Half(choice.variant),
                attend_half::rounding(&choice.variant),
            ),
        };
        Description {
            variant: variant.name(),
            recipe: self.recipe,
            rounding,
            scratch: self.scratch.ranges().to_vec(),
        }
    }

    fn workspace_bytes(&self) -> u64 {
        self.scratch.bytes()
    }

    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error> {
        self.enqueue(io, workspace, |_| Ok(()))
    }

    fn profile(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<Profile, Error> {
        let mut marks = vec![("start", self.record()?)];
        self.enqueue(io, workspace, |stage| {
            marks.push((stage, self.record()?));
            Ok(())
        })?;
        let failed = |error| Error::device("timing a run", error);
        self.stream.synchronize().map_err(failed)?;
        let mut stages = Vec::new();
        for pair in marks.windows(2) {
            let [(_, start), (stage, end)] = pair else {
                continue;
            };
            let time = start.elapsed_ms(end).map_err(failed)?;
            stages.push((*stage, Duration::from_secs_f32(time.max(0.0) / 1e3)));
        }
        Ok(Profile {
            stages,
            clock: Clock::Device,
        })
    }
}
