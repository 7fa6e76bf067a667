"""Whatever is wrong with a command line, the program says it in one line and exits with 1."""

import os
import subprocess

import pytest

WRONG = {
    "": "no command given",
    "connect proxy": "-service or -proxy-id must be specified",
    "connect proxy -sidecarfor web": "-sidecarfor (did you mean -sidecar-for?)",
    "connect proxy -sidecar-for": "flag needs an argument: -sidecar-for",
    "connect proxy -service web -http-addr ftp://x": "Error connecting to Consul agent: -http-addr: Unknown protocol scheme: ftp",
    "connect proxy -service web -ca-file /none": "cannot read the CA file /none of -ca-file",
    "proxy -service web extra": "Should have no non-flag arguments.",
}


def run(binaries, line, **how):
    environment = {"RUST_BACKTRACE": "1", "PATH": os.environ["PATH"]}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run([binaries["lictor"], *line.split()], env=environment, text=True, timeout=30, **how)


@pytest.mark.parametrize("line", WRONG)
def test_the_sentence_is_on_stderr(binaries, line):
    ended = run(binaries, line)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert WRONG[line] in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_nobody_needs_to_read_the_output(binaries):
    for line in ("connect proxy -help", "--version", "nonsense"):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as closed:
            ended = run(binaries, line, stdout=closed, stderr=closed)
        assert ended.returncode == (line == "nonsense"), line


def test_help_and_version_go_to_stdout(binaries):
    for line, start in {"--version": "lictor ", "-h": "Usage: lictor", "proxy -help": "Usage: lictor connect"}.items():
        ended = run(binaries, line)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith(start)
