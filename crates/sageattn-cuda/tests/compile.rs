//! Every kernel that a plan can choose compiles without a GPU, and ptxas has nothing to complain of.
//!
//! Needs NVRTC; without it the tests are ignored, or fail when `SAGEATTN_REQUIRE` names `nvrtc`. What
//! the machine code holds is checked where `nvdisasm` is found, beside NVRTC or on the path.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sageattn_core::Error;
use sageattn_cuda::compile::{Cache, Nvrtc};
use sageattn_cuda::{PvCodes, Variant, variants};

type Test = Box<dyn Fn(&Nvrtc) -> Result<(), Failed> + Send>;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let nvrtc = Nvrtc::find(None).map(Arc::new).map_err(|e| e.to_string());
    let required =
        env::var("SAGEATTN_REQUIRE").is_ok_and(|list| list.split(',').any(|x| x == "nvrtc"));

    let mut trials = Vec::new();
    let mut add = |name: String, test: Test| {
        let nvrtc = nvrtc.clone();
        trials.push(Trial::ignorable_test(name, move || match nvrtc {
            Ok(nvrtc) => test(&nvrtc).map(|()| Completion::Completed),
            Err(reason) if required => Err(reason.into()),
            Err(reason) => Ok(Completion::ignored_with(reason)),
        }));
    };
    for variant in variants() {
        let check = move |nvrtc: &Nvrtc| check_variant(nvrtc, variant);
        add(format!("compile::{}", variant.name()), Box::new(check));
    }
    add(
        "names_are_distinct".to_owned(),
        Box::new(names_are_distinct),
    );
    add(
        "a_broken_kernel_gives_its_log".to_owned(),
        Box::new(a_broken_kernel_gives_its_log),
    );
    add(
        "the_cache_saves_compiling".to_owned(),
        Box::new(the_cache_saves_compiling),
    );
    add(
        "an_unwritable_cache_is_no_error".to_owned(),
        Box::new(an_unwritable_cache_is_no_error),
    );
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn check_variant(nvrtc: &Nvrtc, variant: Variant) -> Result<(), Failed> {
    let compiled = nvrtc.compile(&variant)?;
    check_report(&variant, &compiled.log)
        .map_err(|complaint| format!("{complaint}\n{}", compiled.log))?;
    if let Some(disassembler) = disassembler(nvrtc) {
        let sass = disassemble(&disassembler, &variant.name(), &compiled.cubin)?;
        check_instructions(&variant, &sass)?;
    }
    Ok(())
}

/// What ptxas printed: registers and spills of the kernel, and what it had to give up.
fn check_report(variant: &Variant, log: &str) -> Result<(), String> {
    // C7508: setmaxnreg ignored. C7510 to C7515: wgmma serialized.
    for code in [
        "C7508", "C7510", "C7511", "C7512", "C7513", "C7514", "C7515",
    ] {
        if log.contains(code) {
            return Err(format!("ptxas reports {code}"));
        }
    }
    if log.contains("warning") {
        return Err("a warning".to_owned());
    }
    let spills = log.lines().find(|line| line.contains("bytes spill stores"));
    let spills = spills.ok_or("no report of spills: the option that asks for it is lost")?;
    let bytes = spills
        .split(", ")
        .find_map(|part| part.strip_suffix(" bytes spill stores"));
    let bytes: u32 = bytes
        .and_then(|bytes| bytes.trim().parse().ok())
        .ok_or(spills)?;
    if bytes > spills_allowed(variant) {
        return Err(format!("spills: {spills}"));
    }
    Ok(())
}

/// Bytes of registers that a kernel may keep in local memory.
fn spills_allowed(variant: &Variant) -> u32 {
    match variant {
        // What lives across works, and round the rare path that moves a reference; what the GEMMs meet
        // is checked in the machine code.
        Variant::Attend(attend) if attend.width == 64 => 96,
        Variant::Attend(attend) if attend.lse => 352,
        Variant::Attend(_) => 320,
        // The producers have 24 registers; the consumers' code is checked for what they keep.
        Variant::Half(_) => 64,
        // Eight loads in flight, each with the bounds of its cut octet.
        Variant::Statistics(prepare) if prepare.cut => 32,
        Variant::Statistics(_) | Variant::Encode(_) | Variant::PrepareOnce(_) => 0,
    }
}

fn check_instructions(variant: &Variant, sass: &str) -> Result<(), String> {
    let lines = |test: &dyn Fn(&str) -> bool| sass.lines().filter(|line| test(line)).count();
    let count = |name: &str| lines(&|line| line.contains(name));
    match variant {
        Variant::Attend(attend) => {
            // INT8 Q K^T, and P V in e4m3 or unsigned integers, on the tensor cores; tiles by the copy engine.
            let pv = match attend.pv {
                PvCodes::E4m3 => "QGMMA",
                PvCodes::Int8 => ".U8.U8",
            };
            for name in ["IGMMA", pv, "UBLKCP"] {
                if count(name) == 0 {
                    return Err(format!("no {name} in the machine code"));
                }
            }
            if attend.pv == PvCodes::Int8 {
                check_integers(sass)?;
            }
        }
        Variant::Half(half) => {
            // 16-bit products on the tensor cores, V read across its rows, boxes by the copy engine.
            for name in ["HGMMA", "tnspB", "UTMALDG"] {
                if count(name) == 0 {
                    return Err(format!("no {name} in the machine code"));
                }
            }
            let beside = exponentials_beside_pv(sass);
            if beside.is_none_or(|count| count < half.tile.keys as usize / 2) {
                return Err(format!(
                    "{beside:?} of {} exponentials a thread run beside P V",
                    half.tile.keys / 2
                ));
            }
        }
        Variant::PrepareOnce(_) => {
            // Copies that no thread waits for, and stores into other blocks that report themselves; a
            // fence of the whole device would wait for the codes.
            for name in ["LDGSTS", "STAS"] {
                if count(name) == 0 {
                    return Err(format!("no {name} in the machine code"));
                }
            }
            if count("MEMBAR") + count("LDL") + count("STL") > 0 {
                return Err("a fence of the device, or local memory".to_owned());
            }
        }
        Variant::Statistics(_) | Variant::Encode(_) => {
            // Whole octets of 16-bit elements in one load.
            if lines(&|line| line.contains("LDG.E") && line.contains(".128")) == 0 {
                return Err("no 16-byte load in the machine code".to_owned());
            }
        }
    }
    // Labels and branches end a block; one value reloaded beside the GEMMs is nothing. A running maximum
    // keeps four values more alive than there are registers, and LSE a fifth sum: short calls only.
    let allowed = match variant {
        Variant::Attend(attend) if attend.running_max && attend.lse => 10,
        Variant::Attend(attend) if attend.running_max => 8,
        // At 128 channels the path that computes scores again presses a counter or two out.
        Variant::Half(half) if half.width != 128 => 0,
        _ => 4,
    };
    let (mut multiplies, mut local) = (0, 0);
    for line in sass.lines() {
        multiplies += usize::from(line.contains("GMMA"));
        local += usize::from(line.contains("LDL") || line.contains("STL"));
        if line.trim_start().starts_with(".L_") || line.contains(" BRA ") || line.contains(" EXIT ")
        {
            if multiplies > 0 && local > allowed {
                return Err(format!("{local} accesses to local memory among GEMMs"));
            }
            (multiplies, local) = (0, 0);
        }
    }
    Ok(())
}

/// Where T is not read as floats, it is converted beside the 64 scores and two maxima of a tile; and a multiply-add
/// that took subnormals as zero would lose it.
fn check_integers(sass: &str) -> Result<(), String> {
    // With a mask and without, in a loop and last of a work, each for small and for large logits.
    let tiles = 8;
    let conversions = sass.lines().filter(|line| line.contains("I2FP")).count();
    if conversions > tiles * 68 {
        return Err(format!("{conversions} conversions of integers"));
    }
    match sass.lines().find(|line| line.contains("FFMA.FTZ")) {
        None => Ok(()),
        Some(line) => Err(format!("subnormals are taken as zero: {line}")),
    }
}

/// Exponentials between the wait for the scores, with P V in flight, and the wait for P V.
fn exponentials_beside_pv(sass: &str) -> Option<usize> {
    let lines: Vec<&str> = sass.lines().collect();
    let waits = |from: usize, pending: &str| {
        let wait = format!("DEPBAR.LE gsb0, {pending}");
        let found = lines[from..].iter().position(|line| line.contains(&wait));
        found.map(|at| from + at)
    };
    let start = waits(0, "0x1")?;
    let end = waits(start, "0x0")?;
    let between = lines[start..end].iter();
    Some(between.filter(|line| line.contains("MUFU.EX2")).count())
}

/// `nvdisasm` of the toolkit or wheel that NVRTC came from, or of the path.
fn disassembler(nvrtc: &Nvrtc) -> Option<PathBuf> {
    let name = if cfg!(windows) {
        "nvdisasm.exe"
    } else {
        "nvdisasm"
    };
    let library = Path::new(nvrtc.path());
    let root = library.parent().and_then(Path::parent);
    let beside = root.map(|root| root.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = beside.into_iter().chain(env::split_paths(&path));
    folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn disassemble(disassembler: &Path, name: &str, cubin: &[u8]) -> Result<String, Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join(name);
    fs::write(&file, cubin)?;
    let output = Command::new(disassembler).arg("-c").arg(&file).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn names_are_distinct(_: &Nvrtc) -> Result<(), Failed> {
    let mut names: Vec<String> = variants().iter().map(Variant::name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two variants are called {}", pair[0]).into()),
        None => Ok(()),
    }
}

fn a_broken_kernel_gives_its_log(nvrtc: &Nvrtc) -> Result<(), Failed> {
    let attend = variants().into_iter().find_map(|variant| match variant {
        Variant::Attend(attend) => Some(attend),
        _ => None,
    });
    let mut attend = attend.ok_or("no attention kernel")?;
    attend.width = 96;
    let error = nvrtc.compile(&Variant::Attend(attend)).unwrap_err();
    let Error::Compile { kernel, log } = &error else {
        return Err(format!("not a compile error: {error}").into());
    };
    assert!(kernel.contains("d96"), "{kernel}");
    assert!(
        log.contains("sm90/attn_i8_f8.cu(") && log.contains("error"),
        "{log}"
    );
    Ok(())
}

fn the_cache_saves_compiling(nvrtc: &Nvrtc) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let cache = Cache::at(folder.path());
    let variant = variants()[0];
    let cubin = nvrtc.cubin(&cache, &variant)?;
    let files: Vec<PathBuf> = fs::read_dir(folder.path())?
        .map(|file| file.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1);
    assert!(
        files[0]
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with(&variant.name())
    );
    let stored = fs::read(&files[0])?;
    assert_eq!(nvrtc.cubin(&cache, &variant)?, cubin);

    fs::write(&files[0], &stored[..stored.len() / 2])?;
    assert_eq!(nvrtc.cubin(&cache, &variant)?, cubin, "compiled anew");
    assert_eq!(fs::read(&files[0])?, stored, "and mended");
    Ok(())
}

fn an_unwritable_cache_is_no_error(nvrtc: &Nvrtc) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("not a folder");
    fs::write(&file, "")?;
    let cubin = nvrtc.cubin(&Cache::at(file), &variants()[0])?;
    assert!(cubin.starts_with(b"\x7fELF"));
    Ok(())
}
