//! What can go wrong, who caused it, and who can mend it.

/// The error of every fallible call in `sageattn`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is wrong in itself: a shape that does not fit, an unaligned stride, a scale that
    /// is NaN. The caller mends it; the text names the argument.
    #[error("{argument}: {reason}")]
    Invalid {
        /// The argument at fault: a tensor (`k`), a parameter (`softmax scale`), a file.
        argument: String,
        /// What is wrong with it, with the values seen.
        reason: String,
    },
    /// The backend is sound and the request is too, but the two do not fit. Choose another backend or
    /// recipe, or a device with what is missing.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// No backend of a list takes the request; holds every refusal, in the order of the list.
    #[error("no backend takes this request: {}", join(refusals))]
    NoBackend {
        /// One refusal per backend asked.
        refusals: Vec<Unsupported>,
    },
    /// A tensor lies in memory of another backend or device. Upload it to the device of the plan.
    #[error("{tensor}: the buffer does not belong to backend {backend}")]
    ForeignBuffer {
        /// Which tensor it is.
        tensor: &'static str,
        /// The backend that was asked to use it.
        backend: String,
    },
    /// The device has no room for a buffer. Free memory, or split the batch.
    #[error("out of memory: the device could not give {bytes} bytes")]
    OutOfMemory {
        /// The size that was asked for.
        bytes: u64,
    },
    /// A kernel did not compile on this driver. A defect of this library or of the driver: report it
    /// with the log.
    #[error("kernel {kernel} did not compile: {log}")]
    Compile {
        /// The variant's name.
        kernel: String,
        /// What the compiler printed.
        log: String,
    },
    /// The device or its driver failed. Often a lost device, an outdated driver or a watchdog.
    #[error("{context}: {source}")]
    Device {
        /// What was being done.
        context: String,
        /// What the driver said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// An [`Error::Invalid`] from its two parts.
    pub fn invalid(argument: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            argument: argument.into(),
            reason: reason.into(),
        }
    }

    /// An [`Error::Device`] from what was being done and the driver's error.
    pub fn device(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Device {
            context: context.into(),
            source: source.into(),
        }
    }
}

/// A refusal: every need of a request that a backend cannot meet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{backend} does not support this: {}", missing.join("; "))]
pub struct Unsupported {
    /// The backend and device that refuse.
    pub backend: String,
    /// Each unmet need, in words, never empty.
    pub missing: Vec<String>,
}

impl Unsupported {
    /// `Ok` when nothing is missing, else the refusal.
    pub fn unless_empty(backend: impl Into<String>, missing: Vec<String>) -> Result<(), Self> {
        if missing.is_empty() {
            return Ok(());
        }
        Err(Self {
            backend: backend.into(),
            missing,
        })
    }
}

fn join(refusals: &[Unsupported]) -> String {
    if refusals.is_empty() {
        return "none was given".to_owned();
    }
    let texts: Vec<String> = refusals.iter().map(Unsupported::to_string).collect();
    texts.join(" | ")
}
