//! What every backend owes its callers beside numbers: refusals in the right words, plans that may be
//! shared, 64-bit offsets.

use std::any::Any;

use sageattn_core::{
    Align, Backend, Buffer, DType, DeviceKind, Error, Io, Layout, LseView, Mask, Outputs, Plan,
    Problem, Recipe, Shape, TensorView,
};

use crate::inputs;
use crate::{far, fuzz};

/// The outcome of a check that found nothing wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The backend keeps to the contract.
    Held,
    /// The check does not apply here, and why.
    NotHere(String),
}

/// One check of a backend.
pub type Check = fn(&dyn Backend) -> Result<Outcome, String>;

/// Every check, by name.
pub const ALL: [(&str, Check); 10] = [
    ("supports_and_plan_agree", supports_and_plan_agree),
    ("scratch_ranges_fit", scratch_ranges_fit),
    ("foreign_buffers_are_refused", foreign_buffers_are_refused),
    (
        "another_problems_io_is_refused",
        another_problems_io_is_refused,
    ),
    ("a_bad_workspace_is_refused", a_bad_workspace_is_refused),
    ("copies_stay_in_bounds", copies_stay_in_bounds),
    ("a_plan_is_shared_by_threads", a_plan_is_shared_by_threads),
    ("profile_computes_and_times", profile_computes_and_times),
    ("random_problems_agree", fuzz::random_problems_agree),
    ("offsets_are_64_bit", far::offsets_are_64_bit),
];

/// A buffer of no backend.
#[derive(Debug)]
struct Foreign;

impl Buffer for Foreign {
    fn bytes(&self) -> u64 {
        1 << 30
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn distance_to(&self, _: &dyn Buffer) -> Option<i64> {
        None
    }
}

/// One small call: a plan, its tensors and its scratch.
struct Call {
    problem: Problem,
    plan: Box<dyn Plan>,
    /// Q, K, V and O.
    tensors: Vec<Box<dyn Buffer>>,
    lse: Box<dyn Buffer>,
    workspace: Box<dyn Buffer>,
}

const SHAPE: Shape = Shape::mha(1, 2, 70, 64);

impl Call {
    fn new(backend: &dyn Backend) -> Result<Self, Error> {
        let problem = Problem::new(SHAPE, DType::F32)?.with_outputs(Outputs::OAndLse);
        let plan = backend.plan(&problem, &backend.preferred(&problem))?;
        let mut tensors = Vec::new();
        for stream in 0..4 {
            let values = inputs::normal(5, stream, SHAPE.q());
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let buffer = backend.alloc(bytes.len() as u64)?;
            backend.upload(buffer.as_ref(), 0, &bytes)?;
            tensors.push(buffer);
        }
        Ok(Self {
            lse: backend.alloc(4 * 2 * 70)?,
            workspace: backend.alloc(plan.workspace_bytes().max(4))?,
            problem,
            plan,
            tensors,
        })
    }

    /// Binds the call's tensors, but `replaced.1` for tensor `replaced.0`.
    fn io<'a>(&'a self, replaced: Option<(usize, &'a dyn Buffer)>) -> Result<Io<'a>, Error> {
        let view = |index: usize| {
            let buffer = match replaced {
                Some((at, buffer)) if at == index => buffer,
                _ => self.tensors[index].as_ref(),
            };
            TensorView::new(buffer, Layout::hnd(SHAPE.q()), DType::F32)
        };
        let lse = LseView {
            buffer: self.lse.as_ref(),
            offset: 0,
        };
        Io::bind(&self.problem, view(0), view(1), view(2), view(3), Some(lse))
    }

    fn output(&self, backend: &dyn Backend) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; SHAPE.q().iter().product::<usize>() * 4];
        backend.download(self.tensors[3].as_ref(), 0, &mut bytes)?;
        Ok(bytes)
    }
}

fn supports_and_plan_agree(backend: &dyn Backend) -> Result<Outcome, String> {
    let shapes = [
        SHAPE,
        Shape::mha(1, 1, 1, 1),
        Shape {
            kv_heads: 2,
            kv_len: 200,
            ..Shape::mha(2, 8, 3, 256)
        },
    ];
    let mut taken = 0;
    for shape in shapes {
        for dtype in DType::ALL {
            let problem = Problem::new(shape, dtype).map_err(text)?;
            let problem = problem.with_mask(Mask::Causal(Align::BottomRight));
            let preferred = backend.preferred(&problem);
            backend
                .supports(&problem, &preferred)
                .map_err(|e| format!("refuses its own preference {preferred}: {e}"))?;
            for (name, recipe) in Recipe::NAMED {
                let plan = backend.plan(&problem, &recipe);
                match (backend.supports(&problem, &recipe), plan) {
                    (Ok(()), Ok(plan)) => {
                        let description = plan.describe();
                        if description.variant.is_empty() || description.recipe != recipe {
                            return Err(format!("{name}: planned {description:?}"));
                        }
                        taken += 1;
                    }
                    (Err(refusal), Err(Error::Unsupported(again))) => {
                        if refusal != again || refusal.missing.is_empty() {
                            return Err(format!("{name}: {refusal:?}, then {again:?}"));
                        }
                    }
                    (supports, plan) => {
                        return Err(format!("{name}: supports said {supports:?}, plan {plan:?}"));
                    }
                }
            }
        }
    }
    if taken == 0 {
        return Err("takes no named recipe".to_owned());
    }
    Ok(Outcome::Held)
}

fn scratch_ranges_fit(backend: &dyn Backend) -> Result<Outcome, String> {
    let problem = Problem::new(SHAPE, DType::F16).map_err(text)?;
    for (_, recipe) in Recipe::NAMED {
        if backend.supports(&problem, &recipe).is_err() {
            continue;
        }
        let plan = backend.plan(&problem, &recipe).map_err(text)?;
        for range in plan.describe().scratch {
            let end = range.offset + range.bytes;
            if end > plan.workspace_bytes() || !range.offset.is_multiple_of(256) {
                let bytes = plan.workspace_bytes();
                return Err(format!("{range:?} in a workspace of {bytes} bytes"));
            }
        }
    }
    Ok(Outcome::Held)
}

fn foreign_buffers_are_refused(backend: &dyn Backend) -> Result<Outcome, String> {
    let call = Call::new(backend).map_err(text)?;
    for (index, name) in ["q", "k", "v", "out"].into_iter().enumerate() {
        let io = call.io(Some((index, &Foreign))).map_err(text)?;
        let result = call.plan.run(&io, call.workspace.as_ref());
        if !matches!(&result, Err(Error::ForeignBuffer { .. })) {
            return Err(format!("{name} in foreign memory gave {result:?}"));
        }
    }
    let copies = [
        backend.upload(&Foreign, 0, &[0; 4]),
        backend.download(&Foreign, 0, &mut [0; 4]),
    ];
    for result in copies {
        if !matches!(&result, Err(Error::ForeignBuffer { .. })) {
            return Err(format!("a copy to or from foreign memory gave {result:?}"));
        }
    }
    Ok(Outcome::Held)
}

fn another_problems_io_is_refused(backend: &dyn Backend) -> Result<Outcome, String> {
    let call = Call::new(backend).map_err(text)?;
    let other = call.problem.with_mask(Mask::Causal(Align::TopLeft));
    let plan = backend
        .plan(&other, &backend.preferred(&other))
        .map_err(text)?;
    let workspace = backend.alloc(plan.workspace_bytes().max(4)).map_err(text)?;
    let io = call.io(None).map_err(text)?;
    refused_for("io", &plan.run(&io, workspace.as_ref()))
}

fn a_bad_workspace_is_refused(backend: &dyn Backend) -> Result<Outcome, String> {
    let call = Call::new(backend).map_err(text)?;
    let bytes = call.plan.workspace_bytes();
    if bytes == 0 {
        return Ok(Outcome::NotHere("the plan needs no workspace".to_owned()));
    }
    let io = call.io(None).map_err(text)?;
    let small = backend.alloc((bytes - 1) / 4 * 4).map_err(text)?;
    refused_for("workspace", &call.plan.run(&io, small.as_ref()))?;

    // One buffer as O and as workspace.
    let both = backend.alloc(bytes.max(SHAPE.q().iter().product::<usize>() as u64 * 4));
    let both = both.map_err(text)?;
    let io = call.io(Some((3, both.as_ref()))).map_err(text)?;
    refused_for("workspace", &call.plan.run(&io, both.as_ref()))
}

fn copies_stay_in_bounds(backend: &dyn Backend) -> Result<Outcome, String> {
    let buffer = backend.alloc(64).map_err(text)?;
    let size = buffer.bytes();
    refused(&backend.upload(buffer.as_ref(), size - 4, &[0; 8]))?;
    refused(&backend.download(buffer.as_ref(), size, &mut [0; 4]))?;
    refused(&backend.upload(buffer.as_ref(), u64::MAX - 3, &[0; 8]))?;
    backend
        .upload(buffer.as_ref(), 4, &[1, 2, 3, 4, 5, 6, 7, 8])
        .map_err(text)?;
    let mut back = [0; 8];
    backend
        .download(buffer.as_ref(), 4, &mut back)
        .map_err(text)?;
    if back != [1, 2, 3, 4, 5, 6, 7, 8] {
        return Err(format!("a copy came back as {back:?}"));
    }
    Ok(Outcome::Held)
}

fn a_plan_is_shared_by_threads(backend: &dyn Backend) -> Result<Outcome, String> {
    let calls: Result<Vec<Call>, Error> = (0..3).map(|_| Call::new(backend)).collect();
    let calls = calls.map_err(text)?;
    let plan = calls[0].plan.as_ref();
    let run = |call: &Call| -> Result<Vec<u8>, Error> {
        plan.run(&call.io(None)?, call.workspace.as_ref())?;
        call.output(backend)
    };
    let expected = run(&calls[0]).map_err(text)?;
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = calls.iter().map(|call| scope.spawn(|| run(call))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    for output in outputs {
        let output = output.map_err(|_| "a thread panicked".to_owned())?;
        if output.map_err(text)? != expected {
            return Err("three threads with one plan did not compute the same".to_owned());
        }
    }
    Ok(Outcome::Held)
}

fn profile_computes_and_times(backend: &dyn Backend) -> Result<Outcome, String> {
    let call = Call::new(backend).map_err(text)?;
    let io = call.io(None).map_err(text)?;
    call.plan.run(&io, call.workspace.as_ref()).map_err(text)?;
    let expected = call.output(backend).map_err(text)?;
    let zeros = vec![0; expected.len()];
    backend
        .upload(call.tensors[3].as_ref(), 0, &zeros)
        .map_err(text)?;
    let profile = call
        .plan
        .profile(&io, call.workspace.as_ref())
        .map_err(text)?;
    if call.output(backend).map_err(text)? != expected {
        return Err("profile does not compute what run does".to_owned());
    }
    if profile.stages.is_empty() || profile.total().is_zero() {
        return Err(format!("{profile:?} holds no time"));
    }
    Ok(Outcome::Held)
}

fn refused_for(argument: &str, result: &Result<(), Error>) -> Result<Outcome, String> {
    match result {
        Err(Error::Invalid { argument: got, .. }) if got == argument => Ok(Outcome::Held),
        other => Err(format!("{other:?} where a refusal of {argument} was due")),
    }
}

fn refused(result: &Result<(), Error>) -> Result<Outcome, String> {
    match result {
        Err(Error::Invalid { .. }) => Ok(Outcome::Held),
        other => Err(format!("{other:?} where a refusal was due")),
    }
}

fn text(error: Error) -> String {
    error.to_string()
}

/// Whether a device is fast and large enough for what software devices leave out.
pub(crate) fn is_hardware(backend: &dyn Backend) -> bool {
    backend.device().kind == DeviceKind::Gpu
}
