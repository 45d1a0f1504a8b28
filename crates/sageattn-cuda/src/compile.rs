//! From a kernel variant to a cubin: NVRTC, and a cache on disk before it. The only file that knows
//! either.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;
use sageattn_core::Error;
use sageattn_kernels::SOURCES;

use crate::variant::Variant;

/// The first that has conversions to f16 and bf16 that never give infinity (PTX ISA 8.1).
const OLDEST: (i32, i32) = (12, 1);

/// The `a` is for wgmma and setmaxnreg, which exist on compute capability 9.0 only.
const OPTIONS: [&str; 4] = [
    "--gpu-architecture=sm_90a",
    "--std=c++17",
    // A generic lambda cannot be marked as device code.
    "--device-as-default-execution-space",
    // ptxas reports registers and spills in the log.
    "--ptxas-options=-v",
];

/// NVIDIA's run-time compiler, loaded from this machine.
pub struct Nvrtc {
    /// Never unloaded: it keeps threads and state that do not survive it.
    _library: ManuallyDrop<Library>,
    path: String,
    version: (i32, i32),
    functions: Functions,
}

/// What came out of a compilation.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code for one architecture.
    pub cubin: Vec<u8>,
    /// What the compiler and ptxas printed: registers, spills, warnings.
    pub log: String,
}

impl Nvrtc {
    /// Opens the first library there is: the file named by `SAGEATTN_NVRTC` and no other, or else
    /// `libnvrtc.so.13` and `libnvrtc.so.12` as the loader finds them, or those in `lib64` or `lib` of
    /// `$CUDA_HOME`, `$CUDA_PATH` and `/usr/local/cuda`.
    ///
    /// A driver cannot load machine code from a compiler of a later major version:
    /// `newest_major` passes over such. One before 12.1 lacks instructions that the kernels take.
    ///
    /// # Errors
    /// [`Error::Device`] that lists the places.
    pub fn find(newest_major: Option<i32>) -> Result<Self, Error> {
        let mut tried = Vec::new();
        for path in candidates() {
            match Self::open(&path) {
                Ok(nvrtc) => {
                    let (major, minor) = nvrtc.version;
                    let why = match newest_major {
                        Some(newest) if major > newest => "later than the driver",
                        _ if nvrtc.version < OLDEST => "older than 12.1",
                        _ => {
                            tracing::debug!(path, version = ?nvrtc.version, "found NVRTC");
                            return Ok(nvrtc);
                        }
                    };
                    tried.push(format!("{path} is {major}.{minor}, {why}"));
                }
                Err(error) => {
                    tracing::debug!(path, %error, "no NVRTC here");
                    tried.push(path);
                }
            }
        }
        Err(Error::device(
            "no NVRTC",
            format!(
                "looked at {}; install the CUDA toolkit's NVRTC, or name the library in SAGEATTN_NVRTC",
                tried.join(", ")
            ),
        ))
    }

    fn open(path: &str) -> Result<Self, libloading::Error> {
        open_builtins(Path::new(path));
        // SAFETY: NVRTC's initialisers have no preconditions; a file that is no NVRTC is the choice of
        // whoever set the environment, as with any library path.
        let library = unsafe { Library::new(path) }?;
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11.1.
        let functions = unsafe { Functions::load(&library) }?;
        let mut version = (0, 0);
        // SAFETY: two valid pointers to int.
        unsafe { (functions.version)(&mut version.0, &mut version.1) };
        Ok(Self {
            _library: ManuallyDrop::new(library),
            path: path.to_owned(),
            version,
            functions,
        })
    }

    /// The file it was loaded from, or the name the loader found it by.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles, past any cache.
    ///
    /// # Errors
    /// [`Error::Compile`] with the log.
    pub fn compile(&self, variant: &Variant) -> Result<Compiled, Error> {
        let failed = |log: String| Error::Compile {
            kernel: variant.name(),
            log,
        };
        let program = Program::new(&self.functions, variant).map_err(failed)?;
        let options = OPTIONS.map(c_string);
        let pointers = options.each_ref().map(|option| option.as_ptr());
        #[expect(clippy::cast_possible_truncation, reason = "four options")]
        // SAFETY: a live program and `pointers.len()` C strings that outlive the call.
        let result = unsafe {
            (self.functions.compile)(program.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        let log = program.text(self.functions.log_size, self.functions.log);
        let log = String::from_utf8_lossy(&log).trim_end().to_owned();
        if let Err(error) = self.functions.check(result) {
            return Err(failed(format!("{error}\n{log}")));
        }
        let cubin = program.text(self.functions.cubin_size, self.functions.cubin);
        if cubin.is_empty() {
            return Err(failed(format!("no machine code came out\n{log}")));
        }
        Ok(Compiled { cubin, log })
    }

    /// Compiles, unless the cache has it.
    ///
    /// # Errors
    /// [`Error::Compile`] with the log. A cache that cannot be read or written is only a warning.
    pub fn cubin(&self, cache: &Cache, variant: &Variant) -> Result<Vec<u8>, Error> {
        let name = variant.name();
        let file = format!("{name}-{:032x}.cubin", self.key(variant));
        if let Some(cubin) = cache.load(&file) {
            tracing::debug!(variant = name, "from the cache");
            return Ok(cubin);
        }
        tracing::info!(variant = name, nvrtc = self.path, "compiling a kernel");
        let cubin = self.compile(variant)?.cubin;
        cache.store(&file, &cubin);
        Ok(cubin)
    }

    /// Everything that the machine code depends on.
    fn key(&self, variant: &Variant) -> u128 {
        let mut hash = Fnv::default();
        hash.add(&format!("{:?}", (variant.entry_source(), self.version)));
        OPTIONS.iter().for_each(|option| hash.add(option));
        for (path, text) in SOURCES {
            hash.add(path);
            hash.add(text);
        }
        hash.0
    }
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvrtc")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVRTC {}.{}", self.version.0, self.version.1)
    }
}

fn candidates() -> Vec<String> {
    if let Ok(path) = env::var("SAGEATTN_NVRTC") {
        return vec![path];
    }
    let names = if cfg!(windows) {
        ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        ["libnvrtc.so.13", "libnvrtc.so.12"]
    };
    let mut candidates = names.map(str::to_owned).to_vec();
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| env::var(name).ok())
        .chain(["/usr/local/cuda".to_owned()]);
    for home in homes {
        for folder in ["lib64", "lib", "bin"] {
            for name in names {
                let path = Path::new(&home).join(folder).join(name);
                if path.is_file() {
                    candidates.push(path.to_string_lossy().into_owned());
                }
            }
        }
    }
    candidates
}

/// NVRTC opens its companion by name only, which fails outside the loader's folders. One that is in
/// memory already is found by that name.
fn open_builtins(nvrtc: &Path) {
    let folder = nvrtc.parent().filter(|folder| folder.is_absolute());
    let Some(files) = folder.and_then(|folder| fs::read_dir(folder).ok()) else {
        return;
    };
    for file in files.flatten() {
        let name = file.file_name();
        if name.to_string_lossy().starts_with("libnvrtc-builtins.so.") {
            // SAFETY: a library of tables, whose initialisers have no preconditions.
            match unsafe { Library::new(file.path()) } {
                Ok(library) => std::mem::forget(library),
                Err(error) => tracing::debug!(%error, "NVRTC's companion"),
            }
        }
    }
}

type Handle = *mut std::ffi::c_void;

/// The part of nvrtc.h in use. Results are `nvrtcResult`, 0 for success.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: SizeOf,
    log: Fill,
    cubin_size: SizeOf,
    cubin: Fill,
}

type SizeOf = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Fill = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

impl Functions {
    /// # Safety
    /// The library is an NVRTC.
    unsafe fn load(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: each symbol has the type of its field in nvrtc.h; function pointers stay valid as
        // long as the library, which is never unloaded.
        unsafe {
            Ok(Self {
                version: *library.get(b"nvrtcVersion\0")?,
                error: *library.get(b"nvrtcGetErrorString\0")?,
                create: *library.get(b"nvrtcCreateProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
            })
        }
    }

    fn check(&self, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: returns a static C string for any number.
        let text = unsafe { CStr::from_ptr((self.error)(result)) };
        Err(text.to_string_lossy().into_owned())
    }
}

/// One compilation, freed on drop.
struct Program<'a> {
    functions: &'a Functions,
    handle: Handle,
}

impl<'a> Program<'a> {
    fn new(functions: &'a Functions, variant: &Variant) -> Result<Self, String> {
        let source = c_string(&variant.entry_source());
        let name = c_string(variant.source());
        let (names, texts): (Vec<_>, Vec<_>) = SOURCES
            .iter()
            .map(|(path, text)| (c_string(path), c_string(text)))
            .unzip();
        let name_pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let text_pointers: Vec<_> = texts.iter().map(|text| text.as_ptr()).collect();
        let mut handle = ptr::null_mut();
        #[expect(clippy::cast_possible_truncation, reason = "a few dozen headers")]
        // SAFETY: NUL-terminated strings, as many names as texts; NVRTC copies them all.
        let result = unsafe {
            (functions.create)(
                &mut handle,
                source.as_ptr(),
                name.as_ptr(),
                SOURCES.len() as c_int,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        functions.check(result)?;
        Ok(Self { functions, handle })
    }

    /// Bytes of a size that NVRTC tells first; empty when it has none.
    fn text(&self, size_of: SizeOf, fill: Fill) -> Vec<u8> {
        let mut size = 0;
        // SAFETY: a live program and a valid pointer to size_t.
        if unsafe { size_of(self.handle, &mut size) } != 0 {
            return Vec::new();
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: `bytes` has the size that NVRTC asked for.
        if unsafe { fill(self.handle, bytes.as_mut_ptr().cast()) } != 0 {
            return Vec::new();
        }
        bytes
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { (self.functions.destroy)(&mut self.handle) };
    }
}

/// Without its NULs, which no source has.
fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// Compiled kernels on disk: one file a variant, named after everything it depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// `$SAGEATTN_CACHE`, or `sageattn` in the user's cache folder; none when `SAGEATTN_CACHE` is empty
    /// or the user has no such folder.
    pub fn from_env() -> Self {
        let var = |name| env::var_os(name).map(PathBuf::from);
        let own = || {
            let caches = var("XDG_CACHE_HOME").filter(|path| path.is_absolute());
            let caches = caches.or_else(|| var("LOCALAPPDATA"));
            let caches = caches.or_else(|| Some(var("HOME")?.join(".cache")));
            Some(caches?.join("sageattn"))
        };
        let folder = var("SAGEATTN_CACHE").or_else(own);
        Self {
            folder: folder.filter(|folder| !folder.as_os_str().is_empty()),
        }
    }

    /// A folder, created when first written to.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
        }
    }

    /// No cache.
    pub fn none() -> Self {
        Self { folder: None }
    }

    /// The folder, if any.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    fn load(&self, file: &str) -> Option<Vec<u8>> {
        let path = self.folder.as_ref()?.join(file);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read the kernel cache");
                return None;
            }
        };
        let (check, cubin) = bytes.split_first_chunk()?;
        let mut hash = Fnv::default();
        hash.add_bytes(cubin);
        if u128::from_le_bytes(*check) != hash.0 || cubin.is_empty() {
            tracing::warn!(path = %path.display(), "broken file in the kernel cache, compiling anew");
            return None;
        }
        Some(cubin.to_vec())
    }

    /// Writes beside and renames, so that no reader sees half a file.
    fn store(&self, file: &str, cubin: &[u8]) {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let Some(folder) = &self.folder else { return };
        let mut hash = Fnv::default();
        hash.add_bytes(cubin);
        let bytes = [&hash.0.to_le_bytes(), cubin].concat();
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let beside = folder.join(format!("{file}.{}-{unique}.tmp", process::id()));
        let written = fs::create_dir_all(folder)
            .and_then(|()| fs::write(&beside, bytes))
            .and_then(|()| fs::rename(&beside, folder.join(file)));
        if let Err(error) = written {
            // Best effort: the file may not be there at all.
            let _ = fs::remove_file(&beside);
            tracing::warn!(folder = %folder.display(), %error, "cannot write the kernel cache");
        }
    }
}

/// FNV-1a, 128 bits: the same in every build, unlike std's hashers.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn add_bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    }

    /// With its end, so that two strings cannot trade bytes.
    fn add(&mut self, text: &str) {
        self.add_bytes(text.as_bytes());
        self.add_bytes(&[0xff]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        let mut hash = Fnv::default();
        hash.add_bytes(b"a");
        assert_eq!(hash.0, 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn the_cache_gives_back_what_it_was_given_and_nothing_broken() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("deep").join("er"));
        assert_eq!(cache.load("x"), None);
        cache.store("x", b"machine code");
        assert_eq!(cache.load("x").as_deref(), Some(&b"machine code"[..]));
        let path = cache.folder().unwrap().join("x");
        let whole = fs::read(&path).unwrap();
        for broken in [&whole[..0], &whole[..9], &whole[..16], &whole[..20]] {
            fs::write(&path, broken).unwrap();
            assert_eq!(cache.load("x"), None, "{} bytes", broken.len());
        }
        let mut flipped = whole.clone();
        flipped[20] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(cache.load("x"), None);
        cache.store("x", b"again");
        assert_eq!(cache.load("x").as_deref(), Some(&b"again"[..]));
        assert_eq!(fs::read_dir(cache.folder().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = Cache::at(&file);
        cache.store("x", b"machine code");
        assert_eq!(cache.load("x"), None);
        Cache::none().store("x", b"machine code");
        assert_eq!(Cache::none().load("x"), None);
    }
}
