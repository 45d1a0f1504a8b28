//! Which devices there are, and which one to take.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use sageattn_core::{Backend, Cpu, DeviceKind, Error, Problem, Recipe};

/// A device that computes attention: one opened [`Backend`], cheap to clone.
///
/// It derefs to `dyn Backend`, so `device.plan(..)` works, and `&*device` goes wherever a
/// `&dyn Backend` is asked for.
///
/// ```
/// use sageattn::Device;
///
/// let device = Device::best();
/// println!("{device}");
/// assert!(Device::BACKENDS.contains(&device.name()));
/// ```
#[derive(Clone, Debug)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// The names of the backends in this build, in order of preference.
    pub const BACKENDS: &'static [&'static str] = &{
        let mut names = [""; TIERS.len()];
        let mut index = 0;
        while index < names.len() {
            names[index] = TIERS[index].name;
            index += 1;
        }
        names
    };

    /// The best device of this machine: the first backend in order of preference that has one, and the
    /// CPU when no other has. GPU interfaces in software are passed over: the CPU backend is faster.
    ///
    /// What was chosen, and why the others were not, goes to the log (`tracing`, level info).
    pub fn best() -> Self {
        let device = Self::candidates()
            .next()
            .unwrap_or_else(|| Self::new(Cpu::new()));
        tracing::info!(%device, "chosen");
        device
    }

    /// As [`best`](Self::best), for one call: the first device that takes the problem with the recipe,
    /// or with its own [preferred](Backend::preferred) recipe when none is given.
    ///
    /// ```
    /// use sageattn::{DType, Device, Problem, Recipe, Shape};
    ///
    /// let problem = Problem::new(Shape::mha(1, 8, 300, 80), DType::F16)?;
    /// let (device, recipe) = Device::best_for(&problem, Some(Recipe::SAGE1_VB))?;
    /// assert_eq!(recipe, Recipe::SAGE1_VB);
    /// device.supports(&problem, &recipe)?;
    /// # Ok::<(), sageattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NoBackend`] with every refusal.
    pub fn best_for(problem: &Problem, recipe: Option<Recipe>) -> Result<(Self, Recipe), Error> {
        let mut refusals = Vec::new();
        for device in Self::candidates() {
            let recipe = recipe.unwrap_or_else(|| device.preferred(problem));
            match device.supports(problem, &recipe) {
                Ok(()) => {
                    tracing::info!(%device, %recipe, "chosen");
                    return Ok((device, recipe));
                }
                Err(refusal) => {
                    tracing::info!(%refusal, "passed over");
                    refusals.push(refusal);
                }
            }
        }
        Err(Error::NoBackend { refusals })
    }

    /// The best device of one backend, software or not. `wgpu:matrix` is its device `wgpu` [with the
    /// tier](Self::with_tier) `matrix`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that is not in [`BACKENDS`](Self::BACKENDS), the backend's own
    /// error when it finds no device, and as from [`with_tier`](Self::with_tier).
    pub fn open(backend: &str) -> Result<Self, Error> {
        let (name, way) = split_name(backend);
        let device = (tier(name)?.best)()?;
        match way {
            Some(way) => device.with_tier(way),
            None => Ok(device),
        }
    }

    /// The same device, on which every plan goes one way of those that [`Backend::tiers`] lists.
    ///
    /// # Errors
    /// As [`Backend::with_tier`].
    pub fn with_tier(&self, tier: &str) -> Result<Self, Error> {
        Ok(Self(self.0.with_tier(tier)?))
    }

    /// The entry of [`BACKENDS`](Self::BACKENDS) with this name, without a tier that follows: checks a
    /// name without opening a device.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none; the text names those there are.
    pub fn backend_name(backend: &str) -> Result<&'static str, Error> {
        Ok(tier(split_name(backend).0)?.name)
    }

    /// Every device of every backend, and why others are not there: for listings and test suites.
    ///
    /// ```
    /// let survey = sageattn::Device::all();
    /// assert!(survey.devices.iter().any(|device| device.name() == "cpu"));
    /// for refusal in &survey.refusals {
    ///     println!("no {refusal}");
    /// }
    /// ```
    pub fn all() -> Survey {
        let mut survey = Survey::default();
        for tier in TIERS {
            for found in (tier.all)() {
                match found {
                    Ok(device) => survey.devices.push(device),
                    Err(error) => survey.refusals.push(Refusal {
                        backend: tier.name,
                        error,
                    }),
                }
            }
        }
        survey
    }

    /// A device over a backend of one's own making.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend))
    }

    /// Whether [`best`](Self::best) may take this device: anything but a GPU interface in software.
    pub fn is_candidate(&self) -> bool {
        self.device().kind != DeviceKind::SoftwareGpu
    }

    /// The best device of each backend that has one, in order of preference, opened one at a time.
    fn candidates() -> impl Iterator<Item = Self> {
        TIERS.iter().filter_map(|tier| match (tier.best)() {
            Ok(device) if device.is_candidate() => Some(device),
            Ok(device) => {
                tracing::info!(%device, "passed over: a GPU interface in software");
                None
            }
            Err(error) => {
                tracing::info!(backend = tier.name, %error, "passed over: no device");
                None
            }
        })
    }
}

impl Deref for Device {
    type Target = dyn Backend;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.device();
        write!(f, "{}: {} ({})", self.name(), info.name, info.driver)
    }
}

/// What [`Device::all`] found.
#[derive(Debug, Default)]
pub struct Survey {
    /// Every device, backends in order of preference.
    pub devices: Vec<Device>,
    /// Backends without any, and devices that do not open.
    pub refusals: Vec<Refusal>,
}

/// Why a device, or all of a backend's, cannot be used.
#[derive(Debug)]
pub struct Refusal {
    /// The backend's name.
    pub backend: &'static str,
    /// What stood in the way.
    pub error: Error,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.backend, self.error)
    }
}

/// One backend: how to get its best device, and all of them.
struct Tier {
    name: &'static str,
    best: fn() -> Result<Device, Error>,
    /// Each device, or why it does not open; one error when there is none. Never empty.
    all: fn() -> Vec<Result<Device, Error>>,
}

/// In order of preference.
const TIERS: &[Tier] = &[
    #[cfg(feature = "cuda")]
    Tier {
        name: "cuda",
        best: || {
            let mut devices = sageattn_cuda::Cuda::all()?.into_iter();
            // `all` is an error when there is none.
            let first = devices.next().map(Device::new);
            first.ok_or_else(|| Error::invalid("backend", "no CUDA device"))
        },
        all: every_cuda_device,
    },
    #[cfg(feature = "wgpu")]
    Tier {
        name: "wgpu",
        best: || sageattn_wgpu::Wgpu::best().map(Device::new),
        all: every_adapter,
    },
    Tier {
        name: "cpu",
        best: || Ok(Device::new(Cpu::new())),
        all: || vec![Ok(Device::new(Cpu::new()))],
    },
];

#[cfg(feature = "cuda")]
fn every_cuda_device() -> Vec<Result<Device, Error>> {
    match sageattn_cuda::Cuda::devices() {
        Ok(devices) => devices
            .into_iter()
            .map(|cuda| cuda.map(Device::new))
            .collect(),
        Err(error) => vec![Err(error)],
    }
}

#[cfg(feature = "wgpu")]
fn every_adapter() -> Vec<Result<Device, Error>> {
    use sageattn_wgpu::Wgpu;

    let adapters = Wgpu::adapters();
    if adapters.is_empty() {
        // Its error says what was tried.
        return vec![Wgpu::best().map(Device::new)];
    }
    let open = |adapter| Wgpu::open(adapter).map(Device::new);
    adapters.iter().map(open).collect()
}

/// A backend's name and the tier behind its colon.
fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.split_once(':') {
        Some((name, way)) => (name, Some(way)),
        None => (name, None),
    }
}

fn tier(backend: &str) -> Result<&'static Tier, Error> {
    let found = TIERS.iter().find(|tier| tier.name == backend);
    found.ok_or_else(|| {
        let known = Device::BACKENDS.join(", ");
        let reason = format!("unknown name {backend:?}; this version has {known}");
        Error::invalid("backend", reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sageattn_core::{DType, Shape};

    #[test]
    fn the_best_device_is_never_software() {
        assert!(Device::best().is_candidate());
    }

    #[test]
    fn every_recipe_runs_somewhere() {
        let problem = Problem::new(Shape::mha(1, 2, 5, 256), DType::BF16).unwrap();
        for (_, recipe) in Recipe::NAMED {
            let (device, chosen) = Device::best_for(&problem, Some(recipe)).unwrap();
            assert_eq!(chosen, recipe);
            assert!(device.is_candidate());
        }
        Device::best_for(&problem, None).unwrap();
    }

    #[test]
    fn names_that_are_not_there_say_what_is() {
        let error = Device::open("wgqu").unwrap_err().to_string();
        assert!(
            error.contains("\"wgqu\"") && error.contains("cpu"),
            "{error}"
        );
    }

    #[test]
    fn a_tier_follows_a_colon() {
        assert_eq!(Device::backend_name("cpu:fast").unwrap(), "cpu");
        let error = Device::open("cpu:fast").unwrap_err().to_string();
        assert!(error.contains("\"fast\""), "{error}");
    }

    #[test]
    fn every_backend_is_found_or_refused() {
        let survey = Device::all();
        for name in Device::BACKENDS {
            let found = survey.devices.iter().any(|device| device.name() == *name);
            let refused = survey
                .refusals
                .iter()
                .any(|refusal| refusal.backend == *name);
            assert!(found || refused, "{name}");
        }
    }
}
