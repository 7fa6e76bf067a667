//! Tells the linker how to lay the program out.
//!
//! **Packed relocations**, where the C library that is built for can read them. Every start reads all relocations of a position independent program: 19,000 of them, which take 0.5 MB of each
//! process in the usual form and a fiftieth of that packed. The loader of glibc reads the packed form since 2.36, and
//! says so if an older one is given such a program.
//!
//! **The order of functions** in a release for Linux: `scripts/link-order.ld` (written by `scripts/link-order`) has those side by side that
//! a sidecar runs. The kernel maps 64 KiB around each page that is touched, so that it maps half as much of the program. The script leaves the
//! tables for unwinding out, 0.7 MB: a release has no symbols and aborts when it panics, so that nothing reads them.

use std::env;
use std::process::Command;

/// Of glibc's releases, the first that reads packed relocations (its NEWS for 2.36: `DT_RELR`).
const READS_PACKED: (u32, u32) = (2, 36);

const ORDER: &str = "scripts/link-order.ld";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={ORDER}");
    if is_release_for_linux() {
        let directory = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-T{directory}/{ORDER}");
    }
    if is_for_this_machine() && host_libc().is_some_and(|version| version >= READS_PACKED) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// The linkers there, LLVM's and GNU's, take a script besides their own (`INSERT`).
fn is_release_for_linux() -> bool {
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|is| is == value);
    is("CARGO_CFG_TARGET_OS", "linux") && is("PROFILE", "release")
}

/// Of another machine's C library nothing is known.
fn is_for_this_machine() -> bool {
    env::var("HOST").is_ok_and(|host| env::var("TARGET").is_ok_and(|target| host == target))
}

/// `None` where the C library is another one.
fn host_libc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}
