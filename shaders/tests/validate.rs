//! Every variant through naga's parser and validator, and the host's structs against the shaders'. No
//! device is needed.

use std::mem::offset_of;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use sageattn_shaders::abi::{AttendParams, DecodeParams, MergeParams, TensorParams, View};
use sageattn_shaders::{ABI_WGSL, Kernel, Native, Source, Variant};

/// Parses and validates a variant with the capabilities that it may ask for and no others.
fn validate(variant: &Variant, native: Native) -> Result<(Kernel, naga::Module), String> {
    let kernel = variant.compose(native);
    let Source::Wgsl(source) = &kernel.source else {
        return Err(format!("{}: no WGSL", kernel.name));
    };
    let told = |error: String| format!("{}: {error}", kernel.name);
    // The one capability beyond the baseline that all have: pack2x16float, which every native backend
    // has.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if matches!(variant, Variant::Attend(attend) if attend.needs_matrices()) {
        capabilities |= Capabilities::SHADER_FLOAT16
            | Capabilities::COOPERATIVE_MATRIX
            | Capabilities::SUBGROUP
            | Capabilities::SUBGROUP_BARRIER;
    }
    if matches!(variant, Variant::Decode(decode) if decode.tile.subgroup.is_some()) {
        capabilities |= Capabilities::SUBGROUP;
    }
    let mut parser = naga::front::wgsl::Frontend::new();
    parser.set_options(naga::front::wgsl::Options {
        capabilities,
        ..naga::front::wgsl::Options::new()
    });
    let module = parser
        .parse(source)
        .map_err(|error| told(error.emit_to_string(source)))?;
    Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .validate(&module)
        .map_err(|error| told(error.emit_to_string(source)))?;
    Ok((kernel, module))
}

/// Every variant in WGSL. `tests/spirv.rs` looks at the others.
fn variants() -> impl Iterator<Item = Variant> {
    let all = Variant::all().into_iter();
    all.filter(|v| matches!(v.compose(Native::ALL).source, Source::Wgsl(_)))
}

#[test]
fn every_variant_validates_under_a_name_of_its_own() {
    let mut names = std::collections::HashMap::new();
    for variant in variants() {
        let (kernel, module) = validate(&variant, Native::ALL).unwrap();
        assert!(!module.overrides.is_empty(), "{}: no override", kernel.name);
        assert_eq!(module.entry_points.len(), 1, "{}", kernel.name);
        if let Some(other) = names.insert(kernel.name.clone(), variant) {
            assert_eq!(other, variant, "two variants are called {}", kernel.name);
        }
    }
    assert!(names.len() > 250, "{} variants", names.len());
}

#[test]
fn the_replacements_for_broken_instructions_validate() {
    let none = Native {
        dot: false,
        pack: false,
    };
    for variant in variants() {
        validate(&variant, none).unwrap();
    }
}

/// A number packed to 16 bits and unpacked at once must come back rounded. Compilers have been seen to
/// leave out both, so the packing between must be one that they do not know.
#[test]
fn no_rounding_is_left_to_a_pair_that_compilers_remove() {
    for variant in variants() {
        let kernel = variant.compose(Native::ALL);
        let Source::Wgsl(source) = kernel.source else {
            continue;
        };
        for packing in ["pack2x16float(", "pack_halves("] {
            let pair = format!("unpack2x16float({packing}");
            assert!(!source.contains(&pair), "{}: {pair}", kernel.name);
        }
    }
}

#[test]
fn workgroup_memory_is_what_the_tile_says() {
    for variant in variants() {
        let (bytes, invocations) = match variant {
            Variant::Attend(v) => (v.workgroup_bytes(), v.invocations()),
            Variant::Decode(v) => (v.workgroup_bytes(), v.tile.invocations),
            _ => continue,
        };
        let (kernel, module) = validate(&variant, Native::ALL).unwrap();
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let declared: u32 = module
            .global_variables
            .iter()
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size)
            .sum();
        assert_eq!(declared, bytes, "{}", kernel.name);
        let size = module.entry_points[0].workgroup_size;
        assert_eq!(size, [invocations, 1, 1], "{}", kernel.name);
    }
}

#[test]
fn host_structs_match_the_shaders() {
    let module = naga::front::wgsl::parse_str(ABI_WGSL).unwrap();
    let check = |name: &str, size: usize, fields: &[(&str, usize)]| {
        let (_, ty) = module
            .types
            .iter()
            .find(|(_, ty)| ty.name.as_deref() == Some(name))
            .unwrap_or_else(|| panic!("no struct {name}"));
        let naga::TypeInner::Struct { members, span } = &ty.inner else {
            panic!("{name} is not a struct");
        };
        assert_eq!(*span as usize, size, "size of {name}");
        let there: Vec<_> = members
            .iter()
            .map(|m| (m.name.as_deref().unwrap(), m.offset as usize))
            .collect();
        assert_eq!(there, fields, "{name}");
    };
    macro_rules! check {
        ($ty:ident { $($field:ident),* }) => {
            check(stringify!($ty), size_of::<$ty>(), &[$((stringify!($field), offset_of!($ty, $field))),*])
        };
    }
    check!(View {
        batch,
        head,
        row,
        offset
    });
    check!(TensorParams {
        view,
        heads,
        first_pair,
        first_block,
        len,
        padded_len,
        groups,
        splits,
        samples,
        heads_per_kv,
        data,
        scales,
        channels,
        partials,
        lse_bias,
        softmax_scale,
        unused
    });
    check!(DecodeParams {
        q,
        k,
        v,
        kv_heads,
        heads_per_kv,
        first_pair,
        first_block,
        packs,
        splits,
        q_len,
        kv_len,
        causal_shift,
        partial_o,
        partial_stats,
        score_scale
    });
    check!(MergeParams {
        out,
        heads,
        heads_per_kv,
        first_pair,
        first_block,
        packs,
        splits,
        q_len,
        pitch,
        partial_o,
        partial_stats,
        v_scales,
        lse_bias,
        lse,
        unused0,
        unused1,
        unused2
    });
    check!(AttendParams {
        out,
        heads,
        heads_per_kv,
        first_pair,
        first_tile,
        tiles,
        q_len,
        kv_len,
        q_padded,
        kv_padded,
        q_groups,
        k_groups,
        causal_shift,
        q_codes,
        k_codes,
        values,
        q_scales,
        k_scales,
        v_scales,
        lse_bias,
        lse,
        score_scale,
        splits,
        partial_o,
        partial_stats
    });
}
