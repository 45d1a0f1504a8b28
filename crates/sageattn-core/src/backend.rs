//! The contract between callers and backends.
//!
//! A call goes `supports -> plan -> workspace_bytes -> run`. [`Problem::new`] and [`Io::bind`] check
//! everything that does not depend on a device; a backend checks what does, in `supports` and `plan`,
//! and nothing twice. A plan is immutable and may be shared between threads; the scratch it needs is
//! one buffer of the caller's, which two runs at the same time must not share.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::scratch::ScratchRange;
use crate::{Buffer, DType, Error, LseView, Outputs, Problem, Recipe, TensorView, Unsupported};

/// A device that computes attention.
///
/// Object-safe on purpose: a call through `dyn` costs far less than a kernel launch, and a list of
/// backends makes run-time choice and one conformance suite trivial.
pub trait Backend: fmt::Debug + Send + Sync {
    /// The backend's short name: `cpu`, `wgpu`.
    fn name(&self) -> &'static str;

    /// The device behind it.
    fn device(&self) -> DeviceInfo;

    /// Whether [`plan`](Self::plan) would take this request.
    ///
    /// # Errors
    /// Every unmet need, not only the first.
    fn supports(&self, problem: &Problem, recipe: &Recipe) -> Result<(), Unsupported>;

    /// The recipe this device computes fastest at SageAttention's accuracy.
    fn preferred(&self, problem: &Problem) -> Recipe;

    /// The ways this device has to compute one recipe, where it has several: the names that
    /// [`with_tier`](Self::with_tier) takes, in order of preference.
    fn tiers(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// The same device, on which every plan goes one way: for comparisons, for tests, and for results
    /// that stay the same whatever a measurement says.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown name, [`Error::Unsupported`] with what the device lacks.
    fn with_tier(&self, tier: &str) -> Result<Arc<dyn Backend>, Error> {
        let reason = format!("{} has one way only, not {tier:?}", self.name());
        Err(Error::invalid("tier", reason))
    }

    /// What a user should know of this device: what its self-tests found wrong, and what is done
    /// instead.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Chooses kernels, compiles what is not cached, and lays out the scratch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] as from [`supports`](Self::supports), or [`Error::Compile`].
    fn plan(&self, problem: &Problem, recipe: &Recipe) -> Result<Box<dyn Plan>, Error>;

    /// A buffer of at least `bytes` bytes, for callers that have none of their own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Unsupported`] above the device's limit for one buffer.
    fn alloc(&self, bytes: u64) -> Result<Box<dyn Buffer>, Error>;

    /// Copies `bytes` into a buffer at a byte offset; both are multiples of 4.
    ///
    /// # Errors
    /// [`Error::ForeignBuffer`], [`Error::Invalid`] out of bounds, [`Error::Device`].
    fn upload(&self, buffer: &dyn Buffer, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Waits for all work on the buffer and copies from it; offset and length are multiples of 4.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    fn download(&self, buffer: &dyn Buffer, offset: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Waits until everything enqueued so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] when the device was lost on the way.
    fn synchronize(&self) -> Result<(), Error>;
}

/// A chosen kernel sequence for one problem and recipe. Immutable and shareable.
pub trait Plan: fmt::Debug + Send + Sync {
    /// What was chosen.
    fn describe(&self) -> Description;

    /// The scratch that [`run`](Self::run) needs, in bytes; may be zero.
    fn workspace_bytes(&self) -> u64;

    /// Enqueues the whole call: K mean, quantization, attention. Allocates nothing on the device and
    /// waits for nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `io` was bound to another problem or the workspace is too small or
    /// overlaps a tensor, [`Error::ForeignBuffer`], [`Error::Device`].
    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error>;

    /// Runs once, waits, and tells how long each stage took. For benchmarks: unlike
    /// [`run`](Self::run) it may allocate and it synchronizes.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn profile(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<Profile, Error>;
}

/// What kind of hardware a backend drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The processor this program runs on.
    Cpu,
    /// A GPU interface in software, such as lavapipe: for tests, never chosen automatically.
    SoftwareGpu,
    /// A GPU.
    Gpu,
}

/// What a backend says about its device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceInfo {
    /// The device's name as its driver gives it.
    pub name: String,
    /// Driver and interface, as far as known.
    pub driver: String,
    /// The kind of hardware.
    pub kind: DeviceKind,
}

/// What a plan chose. Its `Display` is the line that goes to logs.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// The kernel variant's name: cache key, test id, bench id.
    pub variant: String,
    /// The recipe it computes.
    pub recipe: Recipe,
    /// The free choices of the online softmax, which the faithful oracle repeats.
    pub rounding: Rounding,
    /// What lies where in the workspace.
    pub scratch: Vec<ScratchRange>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.variant, self.recipe)
    }
}

/// In which order a kernel visits the key tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum KeyOrder {
    /// From the first key.
    #[default]
    Ascending,
    /// From the last visible tile.
    Descending,
}

/// The choices that a recipe leaves to a kernel and that still show in the last bits of P: online
/// softmax rounds P against a reference that only the end of the row knows best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// Keys per step of the online softmax.
    pub key_tile: usize,
    /// The order of the tiles.
    pub key_order: KeyOrder,
    /// What P is relative to. Exact either way; only P's rounding sees it.
    pub reference: Reference,
    /// What O is divided by.
    pub divisor: Divisor,
}

impl Rounding {
    /// The recipe's own tile, ascending, the maximum never stale, O divided by the rounded P.
    pub const fn of(recipe: &Recipe) -> Self {
        Self {
            key_tile: recipe.key_tile(),
            key_order: KeyOrder::Ascending,
            reference: Reference::Maximum { stale: 0.0 },
            divisor: Divisor::RoundedP,
        }
    }
}

/// The score, in log2 units, that a row's P are relative to, and when it moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reference {
    /// The running maximum.
    Maximum {
        /// How far a row's scores may rise above the maximum in use before it is raised. Zero: it
        /// follows at once.
        stale: f32,
    },
    /// For P of a floating type, whose relative precision does not depend on its size: `P = 2^(s - reference)`,
    /// the reference first `start` below the maximum of the row's first tile. It stays while within
    /// each tile the P of keys with equal `(key % 8) / 2`, which one thread of a tensor-core kernel
    /// holds, sum to at most `limit`: no P exceeds it then. Otherwise it moves to `start` below the
    /// maximum of the tile, or by 2 where that is no higher.
    ///
    /// [`faithful`](crate::reference::faithful) scales the integers of other recipes itself, so it
    /// takes this for none of them.
    Sum {
        /// log2 of the largest P when the reference is set.
        start: f32,
        /// The largest sum of P.
        limit: f32,
    },
}

/// The sum of P that O is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Divisor {
    /// Of P as it is multiplied, so that the weights of a row sum to one.
    #[default]
    RoundedP,
    /// Of P before rounding, as FlashAttention-style kernels that keep the sum beside the
    /// exponentials have it.
    UnroundedP,
}

/// How long the stages of one run took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Stage names and times, in order.
    pub stages: Vec<(&'static str, Duration)>,
    /// What measured them.
    pub clock: Clock,
}

impl Profile {
    /// The sum of the stages.
    pub fn total(&self) -> Duration {
        self.stages.iter().map(|(_, time)| *time).sum()
    }
}

/// The clock behind a [`Profile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clock {
    /// Timestamps of the device itself: kernel time.
    Device,
    /// The host's clock round submit and wait: includes launch and driver time.
    Host,
}

/// The tensors of one call, checked against their problem.
#[derive(Clone, Copy, Debug)]
pub struct Io<'a> {
    problem: Problem,
    q: TensorView<'a>,
    k: TensorView<'a>,
    v: TensorView<'a>,
    out: TensorView<'a>,
    lse: Option<LseView<'a>>,
}

impl<'a> Io<'a> {
    /// Binds tensors to a problem.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor when a shape or element type differs from the problem's, a
    /// stride or offset is not a multiple of 16 bytes, a tensor reaches past its buffer, `out` maps
    /// two elements to one address or shares bytes with another tensor, or `lse` is missing, not asked
    /// for, or does not fit.
    pub fn bind(
        problem: &Problem,
        q: TensorView<'a>,
        k: TensorView<'a>,
        v: TensorView<'a>,
        out: TensorView<'a>,
        lse: Option<LseView<'a>>,
    ) -> Result<Self, Error> {
        let shape = problem.shape();
        let named = [
            ("q", &q, shape.q()),
            ("k", &k, shape.kv()),
            ("v", &v, shape.kv()),
            ("out", &out, shape.q()),
        ];
        for (name, view, expected) in named {
            if view.layout.shape() != expected {
                let reason = format!(
                    "shape {:?} where the problem has {expected:?} (batch, heads, length, head_dim)",
                    view.layout.shape()
                );
                return Err(Error::invalid(name, reason));
            }
            if view.dtype != problem.dtype() {
                let reason = format!("{} where the problem has {}", view.dtype, problem.dtype());
                return Err(Error::invalid(name, reason));
            }
            view.layout.check(name, view.dtype, view.buffer.bytes())?;
        }
        if out.layout.overlaps_itself() {
            let reason = format!(
                "strides {:?} map two elements to one address",
                out.layout.strides()
            );
            return Err(Error::invalid("out", reason));
        }
        for (name, view, _) in &named[..3] {
            if shares_bytes(out.buffer, out.byte_range(), view.buffer, view.byte_range()) {
                return Err(Error::invalid("out", format!("overlaps {name}")));
            }
        }
        match (problem.outputs(), &lse) {
            (Outputs::O, None) => {}
            (Outputs::O, Some(_)) => {
                return Err(Error::invalid(
                    "lse",
                    "given, but the problem asks for O only",
                ));
            }
            (Outputs::OAndLse, None) => {
                return Err(Error::invalid(
                    "lse",
                    "the problem asks for it, but none was given",
                ));
            }
            (Outputs::OAndLse, Some(lse)) => check_lse(problem, lse, &named)?,
        }
        Ok(Self {
            problem: *problem,
            q,
            k,
            v,
            out,
            lse,
        })
    }

    /// The problem the tensors were bound to.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The queries, `[batch, q_heads, q_len, head_dim]`.
    pub fn q(&self) -> &TensorView<'a> {
        &self.q
    }

    /// The keys, `[batch, kv_heads, kv_len, head_dim]`.
    pub fn k(&self) -> &TensorView<'a> {
        &self.k
    }

    /// The values, `[batch, kv_heads, kv_len, head_dim]`.
    pub fn v(&self) -> &TensorView<'a> {
        &self.v
    }

    /// The output, `[batch, q_heads, q_len, head_dim]`.
    pub fn out(&self) -> &TensorView<'a> {
        &self.out
    }

    /// The log-sum-exp output, when the problem asks for it.
    pub fn lse(&self) -> Option<&LseView<'a>> {
        self.lse.as_ref()
    }

    /// What every [`Plan::run`] checks first: that these tensors belong to its problem, and that the
    /// workspace holds `bytes` bytes and shares none with a tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `io` or `workspace`.
    pub fn check_run(
        &self,
        problem: &Problem,
        workspace: &dyn Buffer,
        bytes: u64,
    ) -> Result<(), Error> {
        if self.problem != *problem {
            let reason = format!("bound to {:?}, the plan is for {problem:?}", self.problem);
            return Err(Error::invalid("io", reason));
        }
        if workspace.bytes() < bytes {
            let reason = format!("{} bytes where the plan needs {bytes}", workspace.bytes());
            return Err(Error::invalid("workspace", reason));
        }
        let tensors = [
            ("q", self.q),
            ("k", self.k),
            ("v", self.v),
            ("out", self.out),
        ];
        for (name, view) in tensors {
            if shares_bytes(workspace, (0, bytes), view.buffer, view.byte_range()) {
                return Err(Error::invalid("workspace", format!("overlaps {name}")));
            }
        }
        if let Some(lse) = &self.lse {
            let range = lse_range(problem, lse);
            if shares_bytes(workspace, (0, bytes), lse.buffer, range) {
                return Err(Error::invalid("workspace", "overlaps lse"));
            }
        }
        Ok(())
    }
}

/// The first backend of the list that takes the request.
///
/// # Errors
/// [`Error::NoBackend`] with every refusal.
pub fn choose<'a>(
    backends: &[&'a dyn Backend],
    problem: &Problem,
    recipe: &Recipe,
) -> Result<&'a dyn Backend, Error> {
    let mut refusals = Vec::new();
    for &backend in backends {
        match backend.supports(problem, recipe) {
            Ok(()) => {
                tracing::debug!(backend = backend.name(), %recipe, "chose a backend");
                return Ok(backend);
            }
            Err(refusal) => {
                tracing::debug!(backend = backend.name(), %refusal, "passed over a backend");
                refusals.push(refusal);
            }
        }
    }
    Err(Error::NoBackend { refusals })
}

fn lse_range(problem: &Problem, lse: &LseView<'_>) -> (u64, u64) {
    let shape = problem.shape();
    let rows = (shape.batch * shape.q_heads * shape.q_len) as u64;
    let start = (lse.offset as u64).saturating_mul(4);
    (start, start.saturating_add(4 * rows))
}

fn check_lse(
    problem: &Problem,
    lse: &LseView<'_>,
    tensors: &[(&'static str, &TensorView<'_>, [usize; 4])],
) -> Result<(), Error> {
    let size = DType::F32.size();
    if !lse.offset.is_multiple_of(crate::tensor::ROW_ALIGN / size) {
        let reason = format!("offset of {} f32 is not a multiple of 16 bytes", lse.offset);
        return Err(Error::invalid("lse", reason));
    }
    let range = lse_range(problem, lse);
    if range.1 > lse.buffer.bytes() {
        let reason = format!(
            "ends at byte {} of a buffer of {}",
            range.1,
            lse.buffer.bytes()
        );
        return Err(Error::invalid("lse", reason));
    }
    for (name, view, _) in tensors {
        if shares_bytes(lse.buffer, range, view.buffer, view.byte_range()) {
            return Err(Error::invalid("lse", format!("overlaps {name}")));
        }
    }
    Ok(())
}

fn shares_bytes(a: &dyn Buffer, at: (u64, u64), b: &dyn Buffer, bt: (u64, u64)) -> bool {
    let Some(distance) = a.distance_to(b) else {
        return false;
    };
    let start = i128::from(distance) + i128::from(bt.0);
    let end = i128::from(distance) + i128::from(bt.1);
    start < i128::from(at.1) && i128::from(at.0) < end
}
