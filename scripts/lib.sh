# shellcheck shell=bash
# What the scripts share: where things are, and getting what is missing. To be sourced.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$top/.cache
mkdir -p "$cache"

say() { printf '%s\n' "$*" >&2; }

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Installs Debian packages when root and apt are there; otherwise says in one sentence what is missing.
# install_packages WHY PACKAGE...
install_packages() {
    local why=$1 log=$cache/apt.log
    shift
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "$why is missing: install it (Debian's packages: $*), then run this again."
    fi
    say "Installing $* ($why) ..."
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >"$log" 2>&1; then
        apt-get update >>"$log" 2>&1 || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1 ||
            die "$why could not be installed by apt (packages: $*; apt's own words are in $log): install it, then run this again."
    fi
}

# Servers of others, which say what they understood of a request. Where they can't be had, the scenarios say so.
want_servers() {
    local -a missing=()
    [ -x /usr/sbin/nginx ] || missing+=(nginx)
    [ -x /usr/sbin/apache2 ] || missing+=(apache2-bin)
    [ -x /usr/sbin/lighttpd ] || missing+=(lighttpd)
    if [ "${#missing[@]}" = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        return 0
    fi
    (
        # Packages of servers start them, unless this says no (Debian's policy-rc.d).
        if ! [ -e /usr/sbin/policy-rc.d ]; then
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
            chmod 755 /usr/sbin/policy-rc.d
        fi
        install_packages "servers that scenarios compare at" "${missing[@]}"
    ) || say "Without ${missing[*]}, what these servers understand is NOT TESTED."
}

# cargo, and the C compiler that the cryptography library is built with.
need_rust() {
    command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    command -v cargo >/dev/null ||
        die "Rust is missing: install Rust $(rust_version) or newer with rustup, so that cargo is on the PATH, then run this again."
    local have
    have=$(rustc --version | cut -d' ' -f2 | cut -d- -f1)
    if [ "$(printf '%s\n' "$(rust_version)" "$have" | sort -V | head -n 1)" != "$(rust_version)" ]; then
        die "Rust $have is too old: install Rust $(rust_version) or newer with rustup (rustup update), then run this again."
    fi
    if ! printf '#include <stdio.h>\n' | cc -E - >/dev/null 2>&1; then
        install_packages "a C compiler" gcc libc6-dev
    fi
    need_certificates
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$top/Cargo.toml"; }

# The authorities that cargo and pip check the package registries by.
need_certificates() {
    [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || [ -n "${SSL_CERT_FILE:-}" ] ||
        install_packages "a set of certificate authorities" ca-certificates
}

# Prints the path of the release binary: LICTOR_BIN when it is set, else what cargo builds now.
lictor_binary() {
    if [ -n "${LICTOR_BIN:-}" ]; then
        program "$LICTOR_BIN" LICTOR_BIN
        return
    fi
    (cd "$top" && cargo build --release --locked) >&2
    printf '%s\n' "$(cd "$top" && cd "${CARGO_TARGET_DIR:-target}" && pwd)/release/lictor"
}

# Prints the path of a Consul binary: CONSUL_BIN, the PATH's, or Debian 11's, fetched once.
consul_binary() {
    if [ -n "${CONSUL_BIN:-}" ]; then
        program "$CONSUL_BIN" CONSUL_BIN
        return
    fi
    if command -v consul; then
        return
    fi
    [ -x "$cache/consul/usr/bin/consul" ] || fetch_package consul bullseye ||
        die "No Consul was found: install the package \"consul\" of Debian 11 (main), or Consul 1.8.7 or newer from HashiCorp, so that it is on the PATH, or name its binary in CONSUL_BIN."
    printf '%s\n' "$cache/consul/usr/bin/consul"
}

# Prints the path of h2spec, built once. The newest version that Go's module proxy can give is 2.2.1.
h2spec_binary() {
    local built=$cache/go/h2spec
    if ! [ -x "$built" ]; then
        command -v go >/dev/null || return 1
        say "Building h2spec ..."
        GOBIN=$cache/go go install github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible >"$cache/go.log" 2>&1 || return 1
    fi
    printf '%s\n' "$built"
}

# program PATH VARIABLE: prints the absolute path of an executable that a variable names.
program() {
    if ! [ -f "$1" ] || ! [ -x "$1" ]; then
        die "$2 names $1, which is not a program: set it to the path of one, or unset it."
    fi
    printf '%s\n' "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

# Prints the path of a program of Prometheus (prometheus, promtool): the variable's, the PATH's, or Debian 12's, fetched once.
# prometheus_program NAME VARIABLE
prometheus_program() {
    local name=$1 variable=$2 fetched=$cache/prometheus/usr/bin/$1
    if [ -n "${!variable:-}" ]; then
        program "${!variable}" "$variable"
        return
    fi
    if command -v "$name"; then
        return
    fi
    [ -x "$fetched" ] || fetch_package prometheus bookworm || return 1
    printf '%s\n' "$fetched"
}

# Prints the path of axe-core's script, which finds what people without a mouse or a screen can't use; fetched once.
axe_script() {
    local work=$cache/axe
    if ! [ -e "$work/package/axe.min.js" ]; then
        command -v npm >/dev/null || return 1
        mkdir -p "$work"
        (cd "$work" && npm pack axe-core@4 --silent && tar -xzf axe-core-*.tgz) >"$cache/npm.log" 2>&1 || return 1
    fi
    printf '%s\n' "$work/package/axe.min.js"
}

# Takes a package from the mirror that apt is set up with, with lists of our own, so that the system's sources and package
# lists stay as they are; it is unpacked in the cache and not installed. (Debian 12 has no Consul, Debian 11 has.)
# fetch_package PACKAGE RELEASE
fetch_package() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    local package=$1 release=$2 keyring=/usr/share/keyrings/debian-archive-keyring.gpg work=$cache/apt mirror
    [ -e "$keyring" ] || return 1
    say "Fetching $package (Debian's package in $release, through apt's mirror) ..."
    rm -rf "$work" "${cache:?}/$package"
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    local -a own
    own=(
        -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
        -o "Dir::Cache=$work" -o "Dir::Cache::archives=$work/archives" -o APT::Sandbox::User= -o Acquire::Languages=none
    )
    # shellcheck disable=SC2016 # apt fills that in
    while read -r mirror; do
        printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$release" >"$work/sources.list"
        if apt-get "${own[@]}" update >"$work/log" 2>&1 &&
            (cd "$work" && apt-get "${own[@]}" download "$package") >>"$work/log" 2>&1 &&
            dpkg -x "$work/${package}"_*.deb "$cache/$package"; then
            return 0
        fi
    done < <(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -v security | sort -u)
    return 1
}

# Prints the path of the virtualenv's python, which has what a requirements file names.
# python_with FILE
python_with() {
    local wanted=$1 venv=$cache/venv stamp
    stamp=$venv/.has-$(basename "$wanted")
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        install_packages "Python 3 with venv" python3 python3-venv
    fi
    need_certificates
    "$venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$venv" >&2
    if ! cmp -s "$wanted" "$stamp"; then
        say "Installing Python packages into ${venv#"$top/"} ..."
        "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$wanted" >&2 ||
            die "Python packages could not be installed: make PyPI reachable for pip, then run this again."
        cp "$wanted" "$stamp"
    fi
    printf '%s\n' "$venv/bin/python"
}
