//! The program: arguments, logs, runtime, exit code.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use lictor::config::{self, Config, Invocation};
use lictor::{app, cli, telemetry};
use tracing::{info, warn};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(exit) = cli::run(&arguments) {
        return exit;
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The causes may hold what an agent said, and a terminal is not to be written to by it.
            let line = format!("==> {}\n", telemetry::escape(&format!("{error:#}")));
            let _ = io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Vec<OsString>) -> anyhow::Result<()> {
    match config::read(arguments, |name| std::env::var_os(name))? {
        Invocation::Help => {
            print(&config::help(&cli::list()));
            Ok(())
        }
        Invocation::Print(text) => {
            print(&text);
            Ok(())
        }
        Invocation::Run(config) => serve(*config),
    }
}

fn serve(config: Config) -> anyhow::Result<()> {
    let level = telemetry::init(config.log)?;
    let json = config.log.json;
    announce(&config);
    for warning in &config.warnings {
        warn!(target: "proxy", "{warning}");
    }
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(app::run(config, level));
    // A name that is still being looked up in a thread of its own shall not keep the process.
    runtime.shutdown_background();
    if json {
        info!(target: "proxy", "Consul Connect proxy shutdown");
    } else {
        print("==> Consul Connect proxy shutdown\n");
    }
    result
}

/// Prints what Consul's proxy prints, in text. Consul prints the same between lines of JSON; we log it as an event
/// then, so that each line of the output is an object.
fn announce(config: &Config) {
    let facts = config.facts();
    if config.log.json {
        let facts = facts.iter().map(|(label, value)| format!("{label}: {value}")).collect::<Vec<_>>().join(", ");
        return info!(target: "proxy", configuration = facts, "Consul Connect proxy starting");
    }
    let mut text = String::from("==> Consul Connect proxy starting...\n");
    for (label, value) in facts {
        text.push_str(&format!("{label:>22}: {}\n", telemetry::escape(&value)));
    }
    text.push_str("\n==> Log data will now stream in as it occurs:\n\n");
    print(&text);
}

/// Each connection takes two descriptors, and the usual soft limit of 1,024 is soon used up.
fn raise_file_limit() {
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        warn!(target: "proxy", error = %error, "Cannot raise the limit of open files");
    }
}

/// Nobody may be reading any more, which is no reason to stop; `println!` would panic.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
