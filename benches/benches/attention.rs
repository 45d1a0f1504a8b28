//! `cargo bench`: the oracles, the quantizer, and every GPU backend found, on the suite `quick`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use sageattn_conformance::case::Case;
use sageattn_conformance::{backends, inputs};
use sageattn_core::reference::quantize::integer_codes;
use sageattn_core::reference::{exact, faithful};
use sageattn_core::{Backend, DeviceKind, Grouping, Recipe, Rounding, Staged};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let cases = sageattn_bench::cases("quick").expect("the suite is embedded");
    oracles(&mut criterion, &cases[0]);
    quantizer(&mut criterion);
    let (found, _) = backends::all();
    for found in found {
        if found.device.device().kind != DeviceKind::Cpu {
            cases
                .iter()
                .for_each(|case| gpu(&mut criterion, &found.label, &*found.device, case));
        }
    }
    criterion.final_summary();
}

fn oracles(criterion: &mut Criterion, case: &Case) {
    let problem = case
        .problem_on(DeviceKind::Cpu)
        .expect("the case is embedded");
    let tensors = case.tensors(problem.shape()).expect("the case is embedded");
    let [q, k, v] = tensors.map(|tensor| tensor.to_f32());
    let mut group = criterion.benchmark_group("oracle");
    group.throughput(Throughput::Elements(problem.flops()));
    group.bench_function("exact", |b| {
        b.iter(|| exact::attend(&problem, black_box([&q, &k, &v])))
    });
    for (name, recipe) in Recipe::NAMED {
        let rounding = Rounding::of(&recipe);
        group.bench_function(BenchmarkId::new("faithful", name), |b| {
            b.iter(|| faithful::attend(&problem, &recipe, &rounding, black_box([&q, &k, &v])));
        });
    }
}

fn quantizer(criterion: &mut Criterion) {
    let (len, dim) = (4096, 128);
    let rows = inputs::normal(1, 0, [1, 1, len, dim]);
    let mut group = criterion.benchmark_group("quantizer");
    group.throughput(Throughput::Bytes((rows.len() * 4) as u64));
    for (name, groups) in [
        ("per_token", Grouping::PerToken.k()),
        ("per_block", Grouping::PerBlock { q: 128, k: 64 }.k()),
        ("per_thread", Grouping::PerThread { q: 16, k: 128 }.k()),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| integer_codes(black_box(&rows), dim, groups, 127.0))
        });
    }
}

/// Kernels by the device's clock where it has one, and whole calls by the host's.
fn gpu(criterion: &mut Criterion, label: &str, backend: &dyn Backend, case: &Case) {
    let problem = case
        .problem_on(backend.device().kind)
        .expect("the case is embedded");
    let tensors = case.tensors(problem.shape()).expect("the case is embedded");
    let [q, k, v] = &tensors;
    let mut group = criterion.benchmark_group(label);
    group.throughput(Throughput::Elements(problem.flops()));
    for (name, recipe) in Recipe::NAMED {
        if backend.supports(&problem, &recipe).is_err() {
            continue;
        }
        let staged = Staged::new(backend, &problem, &recipe, [q, k, v]).expect("supported");
        let id = |part: &str| BenchmarkId::new(format!("{}/{part}", case.name), name);
        group.bench_function(id("kernels"), |b| {
            b.iter_custom(|runs| {
                (0..runs)
                    .map(|_| staged.profile().expect("it ran before").total())
                    .sum()
            });
        });
        group.bench_function(id("call"), |b| {
            b.iter(|| {
                staged.run().expect("it ran before");
                backend.synchronize().expect("it ran before");
            });
        });
    }
}
