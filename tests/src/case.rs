//! One conformance case: a problem, where its tensors lie, what they hold, and why it is worth a
//! test. Cases are data (`cases/*.toml`); benchmarks use the same type.

use serde::Deserialize;

use sageattn_core::{
    Align, DType, DeviceKind, Error, HostTensor, Layout, Mask, Outputs, Problem, Recipe, Shape,
};

use crate::data;
use crate::inputs::{self, Input};

/// One case. Which recipes it runs with stands beside it, since a result belongs to both.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// `group/name`, and what was swept.
    pub name: String,
    /// What it is for, and which defect it would catch.
    pub why: String,
    /// The sizes.
    pub shape: Shape,
    /// The sizes on software devices, where the shape of a real system would take minutes.
    pub software_shape: Option<Shape>,
    /// The element type.
    pub dtype: DType,
    /// The mask.
    pub mask: Mask,
    /// The softmax scale; `None` for the default.
    pub scale: Option<f32>,
    /// Where the tensors lie.
    pub arrangement: Arrangement,
    /// Whether LSE is asked for.
    pub lse: bool,
    /// The recipes to run it with.
    pub recipes: Vec<Recipe>,
    /// What the tensors hold.
    pub input: Input,
    /// The seed of the generator.
    pub seed: u64,
    /// What is compared.
    pub check: Check,
    /// Which column of the bound table the exact comparison uses, and a factor on it.
    pub bound: Bound,
}

/// How a case arranges its four tensors in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arrangement {
    /// Heads outside tokens, dense where head_dim allows.
    Hnd,
    /// Tokens outside heads, dense where head_dim allows.
    Nhd,
    /// Gaps between rows, heads and batches, all different, and an offset into every buffer.
    Strided,
    /// Tokens outside heads, Q, K and V interleaved per token as a fused projection writes them.
    FusedQkv,
}

/// What a case compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// One call, with both oracles.
    #[default]
    Call,
    /// Two calls on halves of the keys, merged by LSE, with one call on all keys.
    SplitKeys,
}

/// The exact comparison's bound: a column of [`crate::bounds`] and a factor on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The column.
    pub class: BoundClass,
    /// The factor: 1 except where a case's `why` argues for another.
    pub factor: f64,
}

/// A column of the table of exact bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BoundClass {
    /// Independent N(0, 1).
    Normal,
    /// The activations of the Kokoro encoder.
    Kokoro,
    /// The activations of the MiniLM layers.
    Minilm,
    /// None: an input whose quantization error has no bound worth stating.
    None,
}

impl Case {
    /// The shape it has on a kind of device.
    pub fn shape_on(&self, kind: DeviceKind) -> Shape {
        match (kind, self.software_shape) {
            (DeviceKind::Cpu | DeviceKind::SoftwareGpu, Some(small)) => small,
            _ => self.shape,
        }
    }

    /// The problem it poses on a kind of device.
    ///
    /// # Errors
    /// As [`Problem::new`]; the embedded cases never err.
    pub fn problem_on(&self, kind: DeviceKind) -> Result<Problem, Error> {
        let mut problem = Problem::new(self.shape_on(kind), self.dtype)?
            .with_mask(self.mask)
            .with_outputs(if self.lse {
                Outputs::OAndLse
            } else {
                Outputs::O
            });
        if let Input::File { name } = &self.input {
            problem = problem.with_softmax_scale(data::load(name)?.problem.softmax_scale())?;
        }
        match self.scale {
            Some(scale) => problem.with_softmax_scale(scale),
            None => Ok(problem),
        }
    }

    /// Q, K and V in dense order, holding only values that the case's element type can.
    ///
    /// # Errors
    /// When an embedded file does not fit the case.
    pub fn tensors(&self, shape: &Shape) -> Result<[HostTensor; 3], Error> {
        if let Input::File { name } = &self.input {
            return Ok(data::load(name)?.tensors);
        }
        let [q, k, v] = inputs::generate(&self.input, shape, self.seed);
        let dense =
            |shape, values: &[f32]| HostTensor::from_f32(Layout::hnd(shape), self.dtype, values);
        Ok([
            dense(shape.q(), &q)?,
            dense(shape.kv(), &k)?,
            dense(shape.kv(), &v)?,
        ])
    }

    /// The layout of one tensor of the case.
    pub fn layout(&self, shape: [usize; 4]) -> Layout {
        let unit = 16 / self.dtype.size();
        let [_, heads, len, dim] = shape;
        let row = dim.next_multiple_of(unit);
        match self.arrangement {
            Arrangement::Hnd => Layout::hnd_padded(shape, self.dtype),
            Arrangement::Nhd => Layout::nhd_padded(shape, self.dtype),
            Arrangement::Strided => {
                let row = row + unit;
                let head = len * row + 3 * unit;
                Layout::strided(shape, [heads * head + 5 * unit, head, row], 7 * unit)
            }
            Arrangement::FusedQkv => {
                let token = 3 * heads * row;
                Layout::strided(shape, [len * token, row, token], heads * row)
            }
        }
    }
}

/// Every embedded case.
///
/// # Errors
/// What is wrong with which file.
pub fn embedded() -> Result<Vec<Case>, String> {
    let files = [
        ("shapes", include_str!("../cases/shapes.toml")),
        ("values", include_str!("../cases/values.toml")),
        ("memory", include_str!("../cases/memory.toml")),
        ("field", include_str!("../cases/field.toml")),
        ("data", include_str!("../cases/data.toml")),
    ];
    let mut cases = Vec::new();
    for (group, text) in files {
        cases.extend(parse(group, text)?);
    }
    Ok(cases)
}

/// The cases of one TOML file. Every field that may be a list is swept: the case stands for each
/// combination.
///
/// # Errors
/// What is wrong with the file, with its group and the case's name.
pub fn parse(group: &str, text: &str) -> Result<Vec<Case>, String> {
    let file: File = toml::from_str(text).map_err(|error| format!("{group}: {error}"))?;
    let mut cases = Vec::new();
    for entry in file.case {
        let name = entry.name.clone();
        let expanded = entry.expand(group);
        cases.extend(expanded.map_err(|error| format!("{group}/{name}: {error}"))?);
    }
    Ok(cases)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    case: Vec<Entry>,
}

/// A case as TOML writes it.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    why: String,
    batch: Option<usize>,
    q_heads: Option<usize>,
    #[serde(default)]
    kv_heads: Sweep<usize>,
    /// Both lengths.
    #[serde(default)]
    len: Sweep<usize>,
    #[serde(default)]
    q_len: Sweep<usize>,
    #[serde(default)]
    kv_len: Sweep<usize>,
    #[serde(default)]
    head_dim: Sweep<usize>,
    #[serde(default)]
    dtype: Sweep<String>,
    #[serde(default)]
    mask: Sweep<String>,
    #[serde(default)]
    arrangement: Sweep<Arrangement>,
    #[serde(default)]
    scale: Sweep<f32>,
    #[serde(default)]
    lse: Sweep<bool>,
    recipes: Option<Vec<String>>,
    input: Option<Input>,
    seed: Option<u64>,
    #[serde(default)]
    check: Check,
    bound: Option<BoundClass>,
    bound_factor: Option<f64>,
    software: Option<Software>,
}

/// The sizes that shrink on software devices.
#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Software {
    batch: Option<usize>,
    q_heads: Option<usize>,
    kv_heads: Option<usize>,
    q_len: Option<usize>,
    kv_len: Option<usize>,
}

/// One value or several to sweep; none means the default.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Sweep<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> Default for Sweep<T> {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl<T: Clone> Sweep<T> {
    /// The values, each with the text it adds to the name; `default` when none was given.
    fn values(&self, label: impl Fn(&T) -> String) -> Vec<(Option<T>, String)> {
        match self {
            Self::One(value) => vec![(Some(value.clone()), String::new())],
            Self::Many(values) if values.is_empty() => vec![(None, String::new())],
            Self::Many(values) => values
                .iter()
                .map(|value| (Some(value.clone()), format!("_{}", label(value))))
                .collect(),
        }
    }
}

impl Entry {
    fn expand(self, group: &str) -> Result<Vec<Case>, String> {
        if self.why.trim().is_empty() {
            return Err("says not why it is there".to_owned());
        }
        let mut cases = vec![self.defaults(group)?];
        let file = match &self.input {
            Some(Input::File { name }) => Some(data::load(name).map_err(|e| e.to_string())?),
            _ => None,
        };
        if let Some(file) = file {
            cases[0].shape = *file.problem.shape();
            cases[0].mask = file.problem.mask();
        }
        sweep(
            &mut cases,
            self.len.values(|x| format!("n{x}")),
            |case, len| {
                (case.shape.q_len, case.shape.kv_len) = (len, len);
                Ok(())
            },
        )?;
        sweep(
            &mut cases,
            self.q_len.values(|x| format!("q{x}")),
            |case, len| {
                case.shape.q_len = len;
                Ok(())
            },
        )?;
        sweep(
            &mut cases,
            self.kv_len.values(|x| format!("k{x}")),
            |case, len| {
                case.shape.kv_len = len;
                Ok(())
            },
        )?;
        sweep(
            &mut cases,
            self.head_dim.values(|x| format!("d{x}")),
            |case, dim| {
                case.shape.head_dim = dim;
                Ok(())
            },
        )?;
        let kv_heads = self.kv_heads.values(|x| format!("kv{x}"));
        sweep(&mut cases, kv_heads, |case, heads| {
            case.shape.kv_heads = heads;
            Ok(())
        })?;
        sweep(
            &mut cases,
            self.dtype.values(String::clone),
            |case, name| {
                let dtype = DType::ALL.into_iter().find(|dtype| dtype.name() == name);
                case.dtype = dtype.ok_or_else(|| format!("unknown dtype {name:?}"))?;
                Ok(())
            },
        )?;
        sweep(&mut cases, self.mask.values(String::clone), |case, name| {
            case.mask = mask(&name)?;
            Ok(())
        })?;
        let arrangement = self.arrangement.values(|x| format!("{x:?}").to_lowercase());
        sweep(&mut cases, arrangement, |case, arrangement| {
            case.arrangement = arrangement;
            Ok(())
        })?;
        sweep(
            &mut cases,
            self.scale.values(|x| format!("scale{x}")),
            |case, scale| {
                case.scale = Some(scale);
                Ok(())
            },
        )?;
        let lse = self
            .lse
            .values(|lse| if *lse { "lse" } else { "o" }.to_owned());
        sweep(&mut cases, lse, |case, lse| {
            case.lse = lse;
            Ok(())
        })?;
        for case in &mut cases {
            case.software_shape = self.software.map(|small| small.apply(case.shape));
            for kind in [DeviceKind::Gpu, DeviceKind::Cpu] {
                case.problem_on(kind).map_err(|e| e.to_string())?;
            }
        }
        Ok(cases)
    }

    /// The case before any sweep.
    fn defaults(&self, group: &str) -> Result<Case, String> {
        let q_heads = self.q_heads.unwrap_or(2);
        let recipes = match &self.recipes {
            None => Recipe::NAMED.iter().map(|&(_, recipe)| recipe).collect(),
            Some(names) => names
                .iter()
                .map(|name| name.parse().map_err(|e: Error| e.to_string()))
                .collect::<Result<_, _>>()?,
        };
        Ok(Case {
            name: format!("{group}/{}", self.name),
            why: self.why.clone(),
            shape: Shape {
                batch: self.batch.unwrap_or(1),
                ..Shape::mha(1, q_heads, 64, 64)
            },
            software_shape: None,
            dtype: DType::F16,
            mask: Mask::None,
            scale: None,
            arrangement: Arrangement::Hnd,
            lse: true,
            recipes,
            input: self.input.clone().unwrap_or(Input::Normal),
            seed: self.seed.unwrap_or(1),
            check: self.check,
            bound: Bound {
                class: self.bound.unwrap_or(BoundClass::Normal),
                factor: self.bound_factor.unwrap_or(1.0),
            },
        })
    }
}

impl Software {
    fn apply(self, full: Shape) -> Shape {
        let q_heads = self.q_heads.unwrap_or(full.q_heads);
        // Heads that were not grouped stay so.
        let grouped = full.kv_heads != full.q_heads;
        let kv_heads = if grouped { full.kv_heads } else { q_heads };
        Shape {
            batch: self.batch.unwrap_or(full.batch),
            q_heads,
            kv_heads: self.kv_heads.unwrap_or(kv_heads),
            q_len: self.q_len.unwrap_or(full.q_len),
            kv_len: self.kv_len.unwrap_or(full.kv_len),
            head_dim: full.head_dim,
        }
    }
}

/// Multiplies the cases by the values of one field.
fn sweep<T: Clone>(
    cases: &mut Vec<Case>,
    values: Vec<(Option<T>, String)>,
    set: impl Fn(&mut Case, T) -> Result<(), String>,
) -> Result<(), String> {
    let mut swept = Vec::with_capacity(cases.len() * values.len());
    for case in cases.iter() {
        for (value, label) in &values {
            let mut case = case.clone();
            case.name.push_str(label);
            if let Some(value) = value {
                set(&mut case, value.clone())?;
            }
            swept.push(case);
        }
    }
    *cases = swept;
    Ok(())
}

fn mask(name: &str) -> Result<Mask, String> {
    match name {
        "none" => Ok(Mask::None),
        "causal-top-left" => Ok(Mask::Causal(Align::TopLeft)),
        "causal-bottom-right" => Ok(Mask::Causal(Align::BottomRight)),
        _ => Err(format!("unknown mask {name:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_swept_and_named() {
        let text = r#"
            [[case]]
            name = "tail"
            why = "tails"
            len = [1, 65]
            mask = ["none", "causal-top-left"]
            recipes = ["sage1-b"]
        "#;
        let cases = parse("shapes", text).unwrap();
        let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "shapes/tail_n1_none",
                "shapes/tail_n1_causal-top-left",
                "shapes/tail_n65_none",
                "shapes/tail_n65_causal-top-left",
            ]
        );
        assert_eq!(cases[3].shape.kv_len, 65);
    }

    #[test]
    fn mistakes_name_the_case() {
        for line in [
            "mask = \"causal\"",
            "head_dim = 300",
            "recipes = [\"x\"]",
            "lenn = 3",
        ] {
            let text = format!("[[case]]\nname = \"c\"\nwhy = \"w\"\n{line}\n");
            let error = parse("group", &text).unwrap_err();
            assert!(error.starts_with("group"), "{error}");
        }
    }

    #[test]
    fn the_embedded_cases_parse_and_their_names_are_unique() {
        let cases = embedded().unwrap();
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        assert!(cases.len() > 100, "{}", cases.len());
    }

    #[test]
    fn every_arrangement_keeps_rows_apart() {
        for case in embedded().unwrap() {
            for shape in [case.shape.q(), case.shape.kv()] {
                assert!(!case.layout(shape).overlaps_itself(), "{}", case.name);
            }
        }
    }
}
