#!/bin/sh
# Installs what is missing and nothing else: Debian packages (no daemon is started or enabled), uv, the Python
# environment. Debian 12 or Ubuntu with Python 3.11 or later. Run again, it only looks.
#   deploy/bootstrap.sh [demo|test|bench]...      (default: demo; each one includes those before it)
set -eu
cd "$(dirname "$0")/.."

demo='busybox-static crun docker-registry runc'
test='btrfs-progs containerd docker-compose e2fsprogs erofs-utils git make openssl procps systemd tini xfsprogs'
bench=''  # what it needs, the tests need too

say() { printf '==> %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

packages_of() {
    case $1 in
    demo) echo "$demo" ;;
    test) echo "$demo $test" ;;
    bench) echo "$demo $test $bench" ;;
    *) die "unknown group '$1': demo, test or bench" ;;
    esac
}

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Debian's own build first: it runs this code 1.2 to 2 times faster than one compiled by pyenv.
find_python() {
    for candidate in /usr/bin/python3 /usr/bin/python3.1[1-9] "$(command -v python3 || true)"; do
        if [ -x "$candidate" ] && recent "$candidate"; then echo "$candidate"; return; fi
    done
}

missing_of() {
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# apt's many lines matter only where it fails.
quietly() {
    "$@" >.cache/apt.log 2>&1 </dev/null || { cat .cache/apt.log >&2; die "failed: $*"; }
}

restore_policy() {
    if [ -e "$policy.wherry-saved" ]; then
        as_root mv "$policy.wherry-saved" "$policy"
    else
        as_root rm -f "$policy"
    fi
}

# policy-rc.d is Debian's own way to say that installing a package starts nothing (invoke-rc.d(8)).
install_packages() {
    policy=/usr/sbin/policy-rc.d
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "as root: apt-get install $*"
    say "installing $*"
    if [ -e "$policy" ] && [ ! -e "$policy.wherry-saved" ]; then as_root mv "$policy" "$policy.wherry-saved"; fi
    trap restore_policy EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    quietly as_root apt-get -q -o DPkg::Lock::Timeout=300 update
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends "$@"
    restore_policy
    trap - EXIT INT TERM
    stay_off "$@"
}

# Nor do they start with the next boot: Wherry runs the programs itself, with settings of its own.
stay_off() {
    command -v systemctl >/dev/null || return 0
    for package in "$@"; do
        for unit in $(dpkg -L "$package" | sed -n 's,^.*/systemd/system/\([^/@]*\.service\)$,\1,p'); do
            as_root systemctl disable "$unit" >/dev/null 2>&1 || say "could not disable $unit"
        done
    done
}

ensure_packages() {
    wanted=$(for group in "$@"; do packages_of "$group"; done)
    python=$(find_python)
    case $python in
    '') wanted="$wanted python3 python3-venv" ;;
    /usr/bin/*) "$python" -c 'import ensurepip' 2>/dev/null || wanted="$wanted $(basename "$python")-venv" ;;
    esac
    # shellcheck disable=SC2086  # a list of words
    missing=$(missing_of $wanted | sort -u)
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $missing
    [ -n "$python" ] || python=$(find_python)
    [ -n "$python" ] || die "Python 3.11 or later is needed, and this system's packages have none"
}

# Everything that decides what the environment holds: the projects' metadata and the interpreter.
fingerprint() {
    { cat pyproject.toml ./*/pyproject.toml ./services/*/pyproject.toml; "$python" -V; echo "$python"; pwd; } | cksum
}

ensure_environment() {
    stamp=.venv/wherry-synced
    now=$(fingerprint)
    [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$now" ] && return 0
    if [ ! -x .tools/bin/uv ]; then
        say 'installing uv into .tools'
        rm -rf .tools
        "$python" -m venv .tools
        .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
    fi
    say "installing Python packages into .venv ($("$python" -V))"
    # Compiled now and not at every start, also where the environment keeps Python from writing bytecode.
    UV_PYTHON_DOWNLOADS=never .tools/bin/uv sync --quiet --compile-bytecode --all-packages --all-extras \
        --python "$python" >&2
    .venv/bin/python -m compileall -q shared client services >&2
    echo "$now" >$stamp
}

[ $# -gt 0 ] || set -- demo
if ! command -v apt-get >/dev/null; then die 'this script knows apt only (Debian, Ubuntu)'; fi
mkdir -p .cache
exec 9>.cache/bootstrap.lock
flock 9
ensure_packages "$@"
ensure_environment
