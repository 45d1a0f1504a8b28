//! The 8-bit float e4m3 (the `E4M3` of the OCP 8-bit floating point specification): sign, 4 exponent
//! bits with bias 7, 3 mantissa bits, no infinity, NaN at `0x7f`, largest value 448.

/// The largest finite magnitude.
pub const MAX: f32 = 448.0;

/// Rounds to nearest even, saturating at +-448, as `cvt.rn.satfinite.e4m3x2.f32` does. NaN stays NaN.
///
/// ```
/// use sageattn_core::reference::e4m3::{decode, encode};
/// assert_eq!(decode(encode(17.0)), 16.0);
/// assert_eq!(decode(encode(-1e9)), -448.0);
/// ```
pub fn encode(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(MAX);
    // One unit in the last place is 2^(exponent - 3), and never below the subnormals' 2^-9.
    let exponent = (magnitude.to_bits() >> 23) as i32 - 127;
    let exponent = exponent.max(-6);
    let ulp = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    // A power of two divides exactly, so the only rounding is the one intended.
    // `steps` counts 8 to 15 in a normal binade; 16 carries into the next exponent by itself.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most 16 steps, 15 exponents"
    )]
    {
        let steps = (magnitude / ulp).round_ties_even() as i32;
        sign | (((exponent + 6) * 8 + steps) as u8)
    }
}

/// The value of a code.
pub fn decode(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from((code >> 3) & 0xf), f32::from(code & 7));
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let (significand, exponent) = match exponent {
        0 => (mantissa / 8.0, -6),
        _ => (1.0 + mantissa / 8.0, exponent - 7),
    };
    sign * significand * (exponent as f32).exp2()
}

/// The e4m3 value nearest to `value`.
pub fn round(value: f32) -> f32 {
    decode(encode(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn codes_survive_a_round_trip_and_grow() {
        for code in 0..0x7f {
            assert_eq!(encode(decode(code)), code);
            assert_eq!(encode(-decode(code)), code | 0x80);
            assert!(code == 0 || decode(code) > decode(code - 1));
        }
        assert_eq!(decode(0x7e), MAX);
        assert!(decode(encode(f32::NAN)).is_nan());
        assert_eq!(decode(encode(f32::INFINITY)), MAX);
    }

    /// The definition of round to nearest even, by looking at every code.
    fn nearest(value: f32) -> u8 {
        let value = value.min(MAX);
        let distance = |code: u8| (f64::from(decode(code)) - f64::from(value)).abs();
        (0..0x7f)
            .min_by(|&a, &b| {
                let nearer = distance(a).total_cmp(&distance(b));
                nearer.then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn ties_go_to_the_even_code() {
        for code in 0..0x7e {
            let tie = (decode(code) + decode(code + 1)) / 2.0;
            assert_eq!(encode(tie), nearest(tie), "between {code} and the next");
        }
    }

    proptest! {
        #[test]
        fn encode_finds_the_nearest(bits in 0u32..0x7f80_0000) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(encode(value), nearest(value));
        }

        #[test]
        fn encode_finds_the_nearest_in_range(value in 0.0f32..500.0) {
            prop_assert_eq!(encode(value), nearest(value));
        }
    }
}
