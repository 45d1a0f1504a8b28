//! What is found out about a device by trying: whether a kernel is right there, and which tier is
//! fastest. Both are asked when a plan is made, answered once, and remembered by every handle to the
//! device.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sageattn_core::metrics::Metrics;
use sageattn_core::reference::faithful;
use sageattn_core::{
    Align, Backend, DType, Error, HostTensor, Layout, Mask, Outputs, Plan, Problem, Recipe, Shape,
    Staged, attend_host,
};
use sageattn_shaders::{AttendVariant, DecodeVariant, Pv, RowGroups, Variant};

use crate::device::{Context, Wgpu};
use crate::tier::{self, Forced, Request, Tier};

/// The time that measuring may take, all tiers together, without compilation.
const BUDGET: Duration = Duration::from_millis(100);

/// A tier must be this much faster than one before it in [`Tier::ALL`] to take its place: what is nearly
/// the same is decided by the order, not by chance.
const LEAD: f64 = 1.1;

/// Relative L1 from the oracle, and the difference of LSE, beyond which a kernel is wrong. A right one
/// stays below a fifth of either: codes one off at a tie, and O's element type.
const MAX_ERROR: f64 = 0.01;
const MAX_LSE_ERROR: f32 = 0.05;

/// What was found out, shared by all handles to a device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings(Arc<Mutex<Found>>);

#[derive(Debug, Default)]
struct Found {
    /// Kernels that gave the right numbers.
    right: HashSet<Variant>,
    /// How the kernel for few queries that shuffles within subgroups did not.
    no_shuffles: Option<String>,
    /// Tiers that did not, and how.
    struck: Vec<(Tier, String)>,
    /// Tiers by speed.
    ranked: HashMap<Class, Vec<Tier>>,
}

/// Calls that are taken to be alike in which tier is fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Class {
    pv: Pv,
    k_groups: RowGroups,
    head_dim: u32,
    /// As few queries as in decoding.
    few: bool,
}

impl Class {
    fn of(request: &Request) -> Self {
        Self {
            pv: request.pv,
            k_groups: request.k_groups,
            head_dim: request.head_dim,
            few: request.q_len <= 16,
        }
    }

    /// A call that stands for the class: large enough to fill a GPU, small enough to be over soon.
    fn shape(self) -> Shape {
        let head_dim = self.head_dim as usize;
        match self.few {
            false => Shape::mha(1, 16, 1024, head_dim),
            true => Shape {
                q_len: 1,
                ..Shape::mha(1, 32, 4096, head_dim)
            },
        }
    }
}

impl Findings {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a tier was found wrong.
    pub(crate) fn struck(&self, tier: Tier) -> Option<String> {
        let found = self.lock();
        let struck = found.struck.iter().find(|(struck, _)| *struck == tier);
        struck.map(|(_, how)| how.clone())
    }

    /// Whether nothing speaks against shuffles within subgroups.
    pub(crate) fn shuffles(&self) -> bool {
        self.lock().no_shuffles.is_none()
    }

    /// What was found wrong, in words.
    pub(crate) fn notes(&self) -> Vec<String> {
        let found = self.lock();
        let struck = found.struck.iter();
        let tiers = struck.map(|(tier, how)| format!("tier {tier} struck out: {how}"));
        let shuffles = found.no_shuffles.iter();
        let shuffles = shuffles.map(|how| format!("no shuffles within subgroups: {how}"));
        tiers.chain(shuffles).collect()
    }
}

impl Context {
    /// Whether a kernel gives the right numbers on this device; it is tried the first time. If it does
    /// not, its tier is struck out.
    ///
    /// # Errors
    /// [`Error::Device`] and the like when it cannot be tried. A kernel that does not compile is wrong.
    pub(crate) fn is_right(
        self: &Arc<Self>,
        variant: &AttendVariant,
        problem: &Problem,
        recipe: &Recipe,
    ) -> Result<bool, Error> {
        let tier = Tier::of(&variant.kernel);
        let forced = Forced::Kernel(variant.kernel);
        let Some(verdict) = self.fault(Variant::Attend(*variant), forced, problem, recipe)? else {
            return Ok(true);
        };
        let device = &self.info.name;
        tracing::warn!(device, %tier, verdict, "the self-test struck out a tier");
        let mut found = self.findings.lock();
        if found.struck.iter().all(|(struck, _)| *struck != tier) {
            found.struck.push((tier, verdict));
        }
        Ok(false)
    }

    /// The same of a kernel for few queries. If it is wrong, later ones do without shuffles.
    ///
    /// # Errors
    /// As [`Self::is_right`].
    pub(crate) fn decodes_right(
        self: &Arc<Self>,
        variant: &DecodeVariant,
        problem: &Problem,
    ) -> Result<bool, Error> {
        let forced = Forced::Decode(*variant);
        let kernel = Variant::Decode(*variant);
        let Some(verdict) = self.fault(kernel, forced, problem, &Recipe::HALF)? else {
            return Ok(true);
        };
        let device = &self.info.name;
        tracing::warn!(device, verdict, "the self-test struck out shuffles");
        self.findings.lock().no_shuffles = Some(verdict);
        Ok(false)
    }

    /// What is wrong with a kernel, tried by plans that are forced to take it; nothing if it was found right
    /// before.
    fn fault(
        self: &Arc<Self>,
        variant: Variant,
        forced: Forced,
        problem: &Problem,
        recipe: &Recipe,
    ) -> Result<Option<String>, Error> {
        if self.findings.lock().right.contains(&variant) {
            return Ok(None);
        }
        match compare(&self.forced(forced), problem, recipe) {
            Ok((error, lse)) if error <= MAX_ERROR && lse <= MAX_LSE_ERROR => {
                self.findings.lock().right.insert(variant);
                Ok(None)
            }
            Ok((error, lse)) => Ok(Some(format!(
                "{} is wrong: relative L1 {error:.1e} from the CPU's O, {lse:.1e} from its LSE",
                variant.name()
            ))),
            Err(Error::Compile { kernel, log }) => {
                Ok(Some(format!("{kernel} does not compile: {log}")))
            }
            Err(error) => Err(error),
        }
    }

    /// The tiers to try for a request, the fastest first: as the caller says, as was measured, or as
    /// measured now.
    ///
    /// # Errors
    /// As from running plans.
    pub(crate) fn ranked(
        self: &Arc<Self>,
        request: &Request,
        recipe: &Recipe,
    ) -> Result<Vec<Tier>, Error> {
        let order = self.order();
        let able: Vec<Tier> = order
            .iter()
            .copied()
            .filter(|tier| tier::choose(&self.facts, request, &[*tier]).is_ok())
            .collect();
        // In software there is nothing to be gained, and much time to be lost.
        if self.forced.is_some() || able.len() < 2 || self.is_software() {
            return Ok(order);
        }
        let class = Class::of(request);
        if let Some(ranked) = self.findings.lock().ranked.get(&class) {
            let there = ranked.iter().filter(|tier| order.contains(tier));
            return Ok(there.copied().collect());
        }
        let problem = Problem::new(class.shape(), DType::F16)?;
        let mut times = Vec::new();
        for &tier in &able {
            let budget = BUDGET / u32::try_from(able.len()).unwrap_or(1);
            let forced = self.forced(Forced::Tier(tier));
            // What cannot be timed is not taken.
            match time(&forced, &problem, recipe, budget) {
                Ok(time) => times.push((tier, time.as_secs_f64())),
                Err(error) => tracing::info!(%tier, %error, "not measured"),
            }
        }
        let ranked = rank(&times);
        tracing::info!(
            device = self.info.name,
            ?class,
            ?times,
            ?ranked,
            "measured tiers"
        );
        self.findings.lock().ranked.insert(class, ranked.clone());
        Ok(ranked)
    }

    fn forced(self: &Arc<Self>, forced: Forced) -> Wgpu {
        let handle = Wgpu {
            context: Arc::clone(self),
        };
        handle.with(|context| context.forced = Some(forced))
    }
}

/// Tiers by time, given in the order of preference.
fn rank(times: &[(Tier, f64)]) -> Vec<Tier> {
    let mut left = times.to_vec();
    let mut ranked = Vec::new();
    while !left.is_empty() {
        let fastest = left
            .iter()
            .map(|(_, time)| *time)
            .fold(f64::INFINITY, f64::min);
        let first = left.iter().position(|(_, time)| *time <= LEAD * fastest);
        ranked.push(left.remove(first.unwrap_or(0)).0);
    }
    ranked
}

/// Numbers that look random, between -1 and 1.
fn noise(seed: u32, count: usize) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..count).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 32768.0 - 1.0
    })
}

/// Relative L1 from the oracle's O and the largest difference from its LSE, on a small call of a
/// problem's kind: some tiles, with tails, and scores that grow along the keys so that maxima rise.
fn compare(gpu: &Wgpu, problem: &Problem, recipe: &Recipe) -> Result<(f64, f32), Error> {
    const QUERIES: usize = 40;
    const KEYS: usize = 150;
    let head_dim = problem.shape().head_dim;
    let shape = Shape {
        q_len: QUERIES,
        kv_len: KEYS,
        ..Shape::mha(1, 1, 1, head_dim)
    };
    let mask = match problem.mask() {
        Mask::None => Mask::None,
        _ => Mask::Causal(Align::BottomRight),
    };
    let small = Problem::new(shape, problem.dtype())?
        .with_mask(mask)
        .with_outputs(problem.outputs());
    let tensor = |seed, len: usize| {
        let rows = (0..len).flat_map(|row| std::iter::repeat_n(1.0 + row as f32 / 30.0, head_dim));
        let values: Vec<f32> = noise(seed, len * head_dim)
            .zip(rows)
            .map(|(x, gain)| x * gain)
            .collect();
        let layout = Layout::hnd_padded([1, 1, len, head_dim], problem.dtype());
        HostTensor::from_f32(layout, problem.dtype(), &values)
    };
    let tensors = [tensor(1, QUERIES)?, tensor(2, KEYS)?, tensor(3, KEYS)?];
    let [q, k, v] = tensors.each_ref();
    let rounding = gpu.plan_wgpu(&small, recipe)?.describe().rounding;
    let output = attend_host(gpu, &small, recipe, [q, k, v])?;
    let [q, k, v] = tensors.each_ref().map(HostTensor::to_f32);
    let right = faithful::attend(&small, recipe, &rounding, [&q, &k, &v]);
    let reference: Vec<f64> = right.out.iter().map(|&x| f64::from(x)).collect();
    let error = Metrics::compare(&output.out, &reference).rel_l1;
    let lse = match (small.outputs(), output.lse, right.lse) {
        (Outputs::OAndLse, Some(got), Some(right)) => {
            let differences = got.iter().zip(&right).map(|(a, b)| {
                // Rows without keys have the same infinity.
                if a == b { 0.0 } else { (a - b).abs() }
            });
            // A NaN must not get lost in a maximum.
            differences.fold(0.0, |most, x| if x <= most { most } else { x })
        }
        _ => 0.0,
    };
    let finite = output.out.iter().all(|x| x.is_finite());
    Ok((if finite { error } else { f64::INFINITY }, lse))
}

/// The median time of a call.
fn time(
    gpu: &Wgpu,
    problem: &Problem,
    recipe: &Recipe,
    budget: Duration,
) -> Result<Duration, Error> {
    let shape = problem.shape();
    let tensor = |seed, shape: [usize; 4]| {
        let values: Vec<f32> = noise(seed, shape.iter().product()).collect();
        HostTensor::from_f32(Layout::hnd(shape), problem.dtype(), &values)
    };
    let [q, k, v] = [
        tensor(1, shape.q())?,
        tensor(2, shape.kv())?,
        tensor(3, shape.kv())?,
    ];
    let staged = Staged::new(gpu, problem, recipe, [&q, &k, &v])?;
    // Compiles what the plan has not.
    staged.run()?;
    gpu.synchronize()?;
    let start = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || start.elapsed() < budget && times.len() < 9 {
        times.push(staged.profile()?.total());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nearly_as_fast_keeps_its_place() {
        let ranked = |matrix, dot| rank(&[(Tier::Matrix, matrix), (Tier::Dot, dot)]);
        assert_eq!(ranked(1.0, 2.0), [Tier::Matrix, Tier::Dot]);
        assert_eq!(ranked(1.05, 1.0), [Tier::Matrix, Tier::Dot]);
        assert_eq!(ranked(1.2, 1.0), [Tier::Dot, Tier::Matrix]);
        assert_eq!(rank(&[]), []);
    }
}
