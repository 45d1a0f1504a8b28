//! The command as its users see it: exit codes, one line of reasons, the keys of its JSON.

mod bad_input;
mod fixture;
mod main_job;
