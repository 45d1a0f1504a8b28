//! What is known about backends: which recipes they claim, how many trials must run, and which cases
//! fail for a known reason.

use serde::Deserialize;

use sageattn_core::{DType, Recipe};

/// `expectations.toml`, embedded.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectations {
    /// One per backend.
    backend: Vec<Claims>,
    /// What claimed recipes do not cover.
    #[serde(default)]
    refusal: Vec<KnownRefusal>,
    /// Failures that are known.
    #[serde(default)]
    known_failure: Vec<KnownFailure>,
}

/// What a backend claims.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// Its name.
    pub name: String,
    /// The names of the recipes it computes on every device: refusing one of these is a failure.
    pub recipes: Vec<String>,
    /// The least number of trials that must have run when none are filtered out.
    pub at_least: usize,
}

/// An element type for which a backend refuses a recipe that it claims. A trial of it that is not refused
/// fails.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownRefusal {
    /// The backend.
    pub backend: String,
    /// The recipe's name.
    pub recipe: String,
    /// The element type's name.
    pub dtype: String,
    /// Why.
    pub reason: String,
}

/// A trial that fails for a known reason. It still runs, and fails the suite when it passes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownFailure {
    /// The backend, with every tier of it; or one tier, as `wgpu:dot`.
    pub backend: String,
    /// A part of the device's name; without it, every device.
    pub device: Option<String>,
    /// The beginning of the case's name.
    pub case: String,
    /// The recipe, smoothing included; without it, every recipe.
    pub recipe: Option<String>,
    /// Why, and where that is being dealt with.
    pub reason: String,
}

impl Expectations {
    /// The embedded file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn embedded() -> Result<Self, String> {
        Self::parse(include_str!("../expectations.toml"))
    }

    /// Reads a file of expectations.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed: Self = toml::from_str(text).map_err(|e| format!("expectations: {e}"))?;
        let claimed = parsed.backend.iter().flat_map(|claims| {
            let recipes = claims.recipes.iter();
            recipes.map(|recipe| (&claims.name, recipe))
        });
        let refused = parsed.refusal.iter().map(|r| (&r.backend, &r.recipe));
        for (backend, recipe) in claimed.chain(refused) {
            recipe
                .parse::<Recipe>()
                .map_err(|e| format!("expectations: {backend}: {e}"))?;
        }
        for refusal in &parsed.refusal {
            if DType::ALL.iter().all(|dtype| dtype.name() != refusal.dtype) {
                let KnownRefusal { backend, dtype, .. } = refusal;
                return Err(format!(
                    "expectations: {backend}: no element type {dtype:?}"
                ));
            }
        }
        Ok(parsed)
    }

    /// What a backend, or one tier of it, claims; one that is not named claims every recipe.
    pub fn claims(&self, backend: &str) -> Claims {
        let named = self.backend.iter().find(|claims| claims.name == backend);
        named.cloned().unwrap_or_else(|| Claims {
            name: backend.to_owned(),
            recipes: Recipe::NAMED.map(|(name, _)| name.to_owned()).to_vec(),
            at_least: 1,
        })
    }

    /// The known refusal that covers a trial.
    pub fn refusal(&self, backend: &str, recipe: &Recipe, dtype: DType) -> Option<&KnownRefusal> {
        self.refusal.iter().find(|known| {
            known.backend == backend
                && recipe.name() == Some(&known.recipe)
                && known.dtype == dtype.name()
        })
    }

    /// The known failure that covers a trial.
    pub fn known_failure(
        &self,
        backend: &str,
        device: &str,
        case: &str,
        recipe: &str,
    ) -> Option<&KnownFailure> {
        self.known_failure.iter().find(|known| {
            let of_any_tier = backend.split(':').next() == Some(known.backend.as_str());
            (known.backend == backend || of_any_tier)
                && known
                    .device
                    .as_deref()
                    .is_none_or(|part| device.contains(part))
                && case.starts_with(&known.case)
                && known.recipe.as_deref().is_none_or(|name| name == recipe)
        })
    }
}

impl Claims {
    /// Whether a refusal of this recipe is a failure.
    pub fn recipe(&self, recipe: &Recipe) -> bool {
        recipe
            .name()
            .is_some_and(|name| self.recipes.iter().any(|known| known == name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_failure_covers_what_it_names() {
        let text = r#"
            [[backend]]
            name = "wgpu"
            recipes = ["sage1-b"]
            at_least = 3
            [[known_failure]]
            backend = "wgpu"
            device = "llvmpipe"
            case = "shapes/tail"
            recipe = "sage1-b"
            reason = "because"
        "#;
        let parsed = Expectations::parse(text).unwrap();
        let covered =
            |device, case, recipe| parsed.known_failure("wgpu", device, case, recipe).is_some();
        assert!(covered("llvmpipe (LLVM 15)", "shapes/tail_n1", "sage1-b"));
        let in_tier = |tier| parsed.known_failure(tier, "llvmpipe", "shapes/tail_n1", "sage1-b");
        assert!(in_tier("wgpu:dot").is_some());
        assert!(in_tier("wgpux").is_none());
        assert!(!covered("H100", "shapes/tail_n1", "sage1-b"));
        assert!(!covered("llvmpipe", "shapes/long", "sage1-b"));
        assert!(!covered("llvmpipe", "shapes/tail_n1", "sage1-b+unsmoothed"));
        assert!(parsed.claims("wgpu").recipe(&Recipe::SAGE1_B));
        assert!(!parsed.claims("wgpu").recipe(&Recipe::SAGE1_T));
        assert!(parsed.claims("another").recipe(&Recipe::SAGE1_T));
    }

    #[test]
    fn a_refusal_covers_a_type_of_a_recipe() {
        let text = |dtype| {
            format!(
                r#"
                [[backend]]
                name = "cuda"
                recipes = ["half"]
                at_least = 3
                [[refusal]]
                backend = "cuda"
                recipe = "half"
                dtype = "{dtype}"
                reason = "because"
                "#
            )
        };
        let parsed = Expectations::parse(&text("f32")).unwrap();
        let covered = |backend, recipe, dtype| parsed.refusal(backend, &recipe, dtype).is_some();
        assert!(covered("cuda", Recipe::HALF, DType::F32));
        assert!(!covered("cuda", Recipe::HALF, DType::F16));
        assert!(!covered("cuda", Recipe::EXACT, DType::F32));
        assert!(!covered("wgpu", Recipe::HALF, DType::F32));
        let error = Expectations::parse(&text("f64")).unwrap_err();
        assert!(error.contains("f64"), "{error}");
    }

    #[test]
    fn the_embedded_file_parses() {
        assert!(Expectations::embedded().unwrap().claims("cpu").at_least > 100);
    }
}
