# SPDX-License-Identifier: Apache-2.0
# What the scripts share: where the virtual environment lies, how it is made, who the ordinary user is. POSIX sh.

top=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
if [ "$(id -u)" = 0 ]; then
    root=yes
    # Ordinary users must be able to read it: the tests and the demo run as one, also when root started them.
    venv=${PYSINGULARITY_VENV:-/var/cache/pysingularity/venv}
else
    root=
    venv=${PYSINGULARITY_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/pysingularity/venv}
fi

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# An interpreter that every user of the machine can read: the distribution's before one in somebody's home.
find_python() {
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "CPython 3.11 or later is needed (PYTHON=... names one)"
}

# apt_install PACKAGE...: as root on Debian or Ubuntu, install what is missing; otherwise leave things as they are.
apt_install() {
    [ -n "$root" ] && command -v apt-get >/dev/null || return 0
    missing=
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    say "installing with apt:$missing"
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

# make_venv LOCK EXTRAS: the virtual environment with the locked packages of LOCK and this checkout in it.
make_venv() {
    lock=$1 extras=${2:-}
    python=$(find_python)
    umask 022
    if [ ! -x "$venv/bin/python" ]; then
        mkdir -p "$venv"
        "$python" -m venv "$venv" 2>/dev/null || {
            rm -rf "$venv"
            "$python" -m venv --without-pip "$venv"
        }
    fi
    if [ -x "$venv/bin/pip" ]; then
        pip() { "$venv/bin/python" -m pip "$@"; }
    else
        pip() { "$python" -m pip --python "$venv/bin/python" "$@"; }
    fi
    stamp=$venv/.locked
    if ! cmp -s "$lock" "$stamp"; then
        say "installing the packages of $(basename "$lock") into $venv"
        pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r "$lock"
        cp "$lock" "$stamp"
    fi
    say "installing this checkout"
    # A copy of the source: building leaves nothing behind in the checkout, which may be read-only.
    copy=$(mktemp -d)
    (cd "$top" && tar -cf - pyproject.toml README.md LICENSE src scripts) | tar -xf - -C "$copy"
    pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall "$copy$extras"
    rm -rf "$copy"
}

# make_user NAME: an ordinary user with a home; ranges of subordinate ids are given where the machine's tools do so.
make_user() {
    id "$1" >/dev/null 2>&1 || useradd --create-home --shell /bin/sh "$1"
}

open_fuse() {
    # Most distributions ship these open to everybody; bare machines and containers may not.
    for device in /dev/fuse /dev/net/tun; do
        [ ! -c "$device" ] || [ -n "$(find "$device" -perm -006)" ] || chmod 666 "$device"
    done
}
