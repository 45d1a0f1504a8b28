//! Callers' own devices, buffers and encoders.

use crate::Test;

pub(crate) const TESTS: &[Test] = &[];
