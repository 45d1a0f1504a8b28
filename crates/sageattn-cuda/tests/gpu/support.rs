//! One call's tensors, on the host and on the device, and the oracles' verdict on it.

use libtest_mimic::Failed;
use sageattn_core::metrics::Metrics;
use sageattn_core::reference::{exact, faithful};
use sageattn_core::{
    Backend, Buffer, DType, Error, HostOutput, HostTensor, Io, Layout, Outputs, Plan, Problem,
    PvQuant, Recipe, Shape, TensorView, attend_host, round_to,
};
use sageattn_cuda::{Cuda, CudaBuffer};

/// A test's name and body.
pub(crate) type Test = (&'static str, fn(&Cuda) -> Result<(), Failed>);

/// Tensors of one call, dense on the host.
pub(crate) struct Call {
    pub(crate) problem: Problem,
    pub(crate) recipe: Recipe,
    pub(crate) tensors: [HostTensor; 3],
}

impl Call {
    pub(crate) fn new(shape: Shape, dtype: DType) -> Self {
        let problem = Problem::new(shape, dtype).unwrap();
        let tensor = |seed, dims: [usize; 4]| {
            let values = normal(seed, dims.iter().product());
            HostTensor::from_f32(Layout::hnd_padded(dims, dtype), dtype, &values).unwrap()
        };
        Self {
            problem,
            recipe: Recipe::SAGE2_I8_F8,
            tensors: [
                tensor(1, shape.q()),
                tensor(2, shape.kv()),
                tensor(3, shape.kv()),
            ],
        }
    }

    pub(crate) fn by(self, recipe: Recipe) -> Self {
        Self { recipe, ..self }
    }

    pub(crate) fn with(self, change: impl FnOnce(Problem) -> Problem) -> Self {
        Self {
            problem: change(self.problem),
            ..self
        }
    }

    pub(crate) fn tensors(&self) -> [&HostTensor; 3] {
        self.tensors.each_ref()
    }

    pub(crate) fn run(&self, cuda: &Cuda) -> Result<HostOutput, Error> {
        attend_host(cuda, &self.problem, &self.recipe, self.tensors())
    }

    pub(crate) fn without_lse(&self) -> Self {
        Self {
            problem: self.problem.with_outputs(Outputs::O),
            recipe: self.recipe,
            tensors: self.tensors.clone(),
        }
    }

    /// Runs by each recipe that quantizes, and compares with both oracles.
    pub(crate) fn check_quantized(mut self, cuda: &Cuda) -> Result<(), Failed> {
        let smooth = self.recipe.smooth;
        for recipe in QUANTIZED {
            self.recipe = recipe.with_smooth(smooth);
            self.check(cuda)?;
        }
        Ok(())
    }

    /// Runs, and compares with both oracles.
    pub(crate) fn check(&self, cuda: &Cuda) -> Result<(), Failed> {
        let what = format!("{:?} {}", self.problem, self.recipe);
        let got = self.run(cuda).map_err(|error| format!("{what}: {error}"))?;
        let [q, k, v] = self.tensors().map(HostTensor::to_f32);
        let tensors = [&q[..], &k[..], &v[..]];
        let rounding = cuda.plan(&self.problem, &self.recipe)?.describe().rounding;
        let mut want = faithful::attend(&self.problem, &self.recipe, &rounding, tensors);
        round_to(self.problem.dtype(), &mut want.out);

        let half = self.recipe == Recipe::HALF;
        let integers = self.recipe.pv == PvQuant::Int8Dynamic;
        // The tensor core sums e4m3 products in fewer bits than f32; bf16 adds a rounding of its own.
        let bound = match self.problem.dtype() {
            DType::F16 if half || integers => 1e-3,
            DType::F32 if integers => 5e-4,
            DType::F16 | DType::F32 => 2e-3,
            DType::BF16 => 3e-3,
        };
        let (row_bound, exact_bound) = match (half, integers) {
            (true, _) => (0.01, 5e-3),
            (_, true) => (0.05, 0.03),
            _ => (0.05, 0.06),
        };
        let expected: Vec<f64> = want.out.iter().copied().map(f64::from).collect();
        let metrics = Metrics::compare(&got.out, &expected);
        let head_dim = self.problem.shape().head_dim;
        let row = Metrics::worst_row(&got.out, &expected, head_dim, 0.1);
        if !(metrics.rel_l1 <= bound && row <= row_bound && metrics.not_finite == 0) {
            return Err(format!("{what}: faithful: {metrics:?}, worst row {row}").into());
        }
        let exact = exact::attend(&self.problem, tensors);
        let metrics = Metrics::compare(&got.out, &exact.out);
        if !(metrics.rel_l1 <= exact_bound && metrics.not_finite == 0) {
            return Err(format!("{what}: exact: {metrics:?}").into());
        }
        let (got, want) = (got.lse.unwrap_or_default(), want.lse.unwrap_or_default());
        assert_eq!(got.len(), want.len(), "{what}");
        for (row, (got, want)) in got.iter().zip(want).enumerate() {
            let near = (got - want).abs() <= 1e-4 * want.abs().max(1.0);
            if !(near || *got == want) {
                return Err(format!("{what}: LSE of row {row} is {got}, not {want}").into());
            }
        }
        Ok(())
    }
}

/// What the tier computes.
pub(crate) const RECIPES: [Recipe; 3] = [Recipe::SAGE2_I8_F8, Recipe::I8_I8_DYN, Recipe::HALF];
const QUANTIZED: [Recipe; 2] = [Recipe::SAGE2_I8_F8, Recipe::I8_I8_DYN];

/// Bell-shaped values: sums of twelve uniform ones.
pub(crate) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut sum = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    (0..len).map(|_| sum()).collect()
}

pub(crate) fn gqa(q_len: usize, kv_len: usize, head_dim: usize) -> Shape {
    Shape {
        batch: 2,
        q_heads: 4,
        kv_heads: 2,
        q_len,
        kv_len,
        head_dim,
    }
}

/// One call's memory, all of it the caller's own slices.
pub(crate) struct OnDevice<'a> {
    pub(crate) cuda: &'a Cuda,
    pub(crate) plan: Box<dyn Plan>,
    pub(crate) q: CudaBuffer,
    pub(crate) k: CudaBuffer,
    pub(crate) v: CudaBuffer,
    pub(crate) out: CudaBuffer,
    pub(crate) workspace: CudaBuffer,
}

impl<'a> OnDevice<'a> {
    pub(crate) fn new(cuda: &'a Cuda, call: &Call) -> Self {
        let plan = cuda.plan(&call.problem, &call.recipe).unwrap();
        let slice = |bytes: &[u8]| CudaBuffer::from_slice(cuda.stream().clone_htod(bytes).unwrap());
        let [q, k, v] = call.tensors().map(|tensor| slice(tensor.bytes()));
        // None may be wanted, but a slice must have a byte.
        let workspace = vec![0xa5; usize::try_from(plan.workspace_bytes()).unwrap().max(1)];
        Self {
            cuda,
            out: slice(&vec![0xa5; call.tensors[0].bytes().len()]),
            workspace: slice(&workspace),
            plan,
            q,
            k,
            v,
        }
    }

    pub(crate) fn io(&self, call: &Call) -> Io<'_> {
        let view =
            |buffer, like: &HostTensor| TensorView::new(buffer, *like.layout(), like.dtype());
        let [q, k, v] = call.tensors();
        Io::bind(
            &call.problem,
            view(&self.q, q),
            view(&self.k, k),
            view(&self.v, v),
            view(&self.out, q),
            None,
        )
        .unwrap()
    }

    pub(crate) fn read(&self, buffer: &CudaBuffer) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(Buffer::bytes(buffer)).unwrap()];
        self.cuda.download(buffer, 0, &mut bytes).unwrap();
        bytes
    }

    /// O as the convenience functions give it.
    pub(crate) fn output(&self, call: &Call) -> Vec<f32> {
        let q = &call.tensors[0];
        let bytes = self.read(&self.out);
        HostTensor::from_bytes(*q.layout(), q.dtype(), bytes)
            .unwrap()
            .to_f32()
    }
}
