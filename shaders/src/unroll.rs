//! Loops and choices that a kernel must have written out.
//!
//! WGSL has no way to ask for unrolling, and a cooperative matrix is only fast under a name of its own,
//! not as an element of an array. A kernel that needs this writes
//!
//! ```text
//! //# for m in ROW_MATS
//! var o$m = Sums();
//! //# end
//! //# if Q_RESIDENT
//! ..
//! //# else
//! ..
//! //# end
//! ```
//!
//! where the names are constants of its prelude: a number counts, zero is false. `$m` is replaced by
//! the loop's index. Loop variables are single letters.
//!
//! A function cannot take or return matrices that stay in registers, so lines that are needed twice are
//! named by `//# block NAME` .. `//# end`, which writes nothing, and written by `//# use NAME`.

use std::collections::HashMap;
use std::fmt::Write as _;

/// The constants that directives may name.
pub(crate) type Constants = HashMap<String, u32>;

/// Writes out every directive of a text.
///
/// The texts are this crate's own files, so a mistake in one is not the user's: it is left standing as
/// a line that no WGSL parser takes, and the validation test of its variants fails on it.
pub(crate) fn unroll(text: &str, constants: &Constants) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::with_capacity(4 * text.len());
    let mut state = State {
        constants,
        blocks: HashMap::new(),
        indices: Vec::new(),
    };
    write_block(&lines, &mut state, &mut out);
    out
}

struct State<'a> {
    constants: &'a Constants,
    /// Lines that have a name.
    blocks: HashMap<&'a str, Vec<&'a str>>,
    /// The loops round the current line, and where each is.
    indices: Vec<(char, u32)>,
}

fn write_block<'a>(lines: &[&'a str], state: &mut State<'a>, out: &mut String) {
    let constants = state.constants;
    let mut at = 0;
    while at < lines.len() {
        let Some(directive) = directive(lines[at]) else {
            write_line(lines[at], &state.indices, out);
            at += 1;
            continue;
        };
        if let Some(name) = directive.strip_prefix("use ") {
            match state.blocks.get(name) {
                Some(block) => write_block(&block.clone(), state, out),
                None => out.push_str(&format!("# not understood: {directive}\n")),
            }
            at += 1;
            continue;
        }
        let (otherwise, end) = block_end(lines, at);
        let body = &lines[at + 1..otherwise.unwrap_or(end)];
        match directive.split_whitespace().collect::<Vec<_>>()[..] {
            ["for", name, "in", count] if name.len() == 1 && constants.contains_key(count) => {
                for index in 0..constants[count] {
                    state.indices.extend(name.chars().map(|name| (name, index)));
                    write_block(body, state, out);
                    state.indices.pop();
                }
            }
            ["if", flag] if constants.contains_key(flag) => {
                if constants[flag] != 0 {
                    write_block(body, state, out);
                } else if let Some(otherwise) = otherwise {
                    write_block(&lines[otherwise + 1..end], state, out);
                }
            }
            ["block", name] => {
                state.blocks.insert(name, body.to_vec());
            }
            _ => out.push_str(&format!("# not understood: {directive}\n")),
        }
        at = end + 1;
    }
}

fn directive(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("//#").map(str::trim)
}

/// The lines of a block's `else`, if it has one, and of its `end`.
fn block_end(lines: &[&str], start: usize) -> (Option<usize>, usize) {
    let (mut depth, mut otherwise) = (0, None);
    for (at, line) in lines.iter().enumerate().skip(start) {
        match directive(line).map(|text| text.split(' ').next().unwrap_or_default()) {
            Some("for" | "if" | "block") => depth += 1,
            Some("else") if depth == 1 => otherwise = Some(at),
            Some("end") if depth == 1 => return (otherwise, at),
            Some("end") => depth -= 1,
            _ => {}
        }
    }
    (otherwise, lines.len())
}

fn write_line(line: &str, indices: &[(char, u32)], out: &mut String) {
    let mut rest = line;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let name = rest[at + 1..].chars().next();
        let known = indices.iter().rev().find(|(known, _)| Some(*known) == name);
        match known {
            Some((name, index)) => {
                // Writing to a string cannot fail.
                let _ = write!(out, "{index}");
                rest = &rest[at + 1 + name.len_utf8()..];
            }
            None => {
                out.push('$');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn constants() -> Constants {
        [("TWO", 2), ("ONE", 1), ("NONE", 0)]
            .map(|(name, n)| (name.to_owned(), n))
            .into()
    }

    #[test]
    fn loops_nest_and_choices_choose() {
        let text = "\
//# for i in TWO
//# for j in TWO
a$i_$j
//# end
//# end
//# if NONE
no
//# if ONE
no
//# else
no
//# end
//# else
//# if ONE
yes
//# else
no
//# end
//# end
//# for i in NONE
no
//# end";
        assert_eq!(unroll(text, &constants()), "a0_0\na0_1\na1_0\na1_1\nyes\n");
    }

    #[test]
    fn a_block_is_written_where_it_is_used() {
        let text = "\
//# block B
//# for i in TWO
b$i$o
//# end
//# end
a
//# for o in TWO
//# use B
//# end";
        assert_eq!(unroll(text, &constants()), "a\nb00\nb10\nb01\nb11\n");
    }

    #[test]
    fn mistakes_stay_visible() {
        assert!(unroll("//# use NOTHING", &constants()).contains("# not understood"));
        assert!(unroll("//# for i in MANY\n//# end", &constants()).contains("# not understood"));
        assert_eq!(unroll("a$x", &constants()), "a$x\n");
    }
}
