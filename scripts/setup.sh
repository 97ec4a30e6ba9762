# Sourced by scripts/demo and scripts/test: makes a virtual environment in the clone and installs the project there.
#
#   setup_environment [VENV] [CONSTRAINTS]
#
# Does nothing when the environment was made from the same pins and the same setup.cfg already, and the library of C++
# operators is newer than its sources.

setup_environment() {
    local venv="${1:-.venv}" constraints="${2:-constraints.txt}"
    install_project "$venv" "$constraints"
    build_library "$venv/bin/python"
}

install_project() {
    local venv="$1" constraints="$2" stamp="$1/.installed" key
    key="$(cat "$constraints" setup.cfg pyproject.toml scripts/setup.sh | sha256sum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && [ "$(cat "$venv/.root")" = "$PWD" ]; then
        return 0
    fi
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "setup: $python is missing or older than Python 3.10; install Python 3.10 or later, or set PYTHON" >&2
        return 3
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        if can_install; then
            apt-get install -y -q python3-venv >&2
        else
            echo "setup: $python has no venv module; install the Debian package python3-venv (as root) and run this again" >&2
            return 3
        fi
    fi
    has_compiler || { can_install && apt-get install -y -q g++ >&2; } || true
    echo "setup: installing into $venv (once; takes a minute or two)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet -c "$constraints" setuptools wheel || return 3
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --no-build-isolation \
        -c "$constraints" -e '.[verify,dev]' || return 3
    # mypy wants the package as a folder; the rooms stand at the top level.
    local types="$venv/types/kimi_vl" room
    rm -rf "$types"
    mkdir -p "$types"
    for room in modeling convert export verify; do ln -s "$PWD/$room" "$types/$room"; done
    ln -s "$PWD/kimi_vl/__init__.py" "$types/__init__.py"
    printf '%s' "$PWD" >"$venv/.root"
    printf '%s' "$key" >"$stamp"
}

# The editable install built it, and changed sources do not concern pip. setuptools compares times and takes a tenth of a
# second where nothing changed.
build_library() {
    if has_compiler; then
        "$1" setup.py -q build_ext --inplace >&2
    else
        echo "setup: no C++ compiler: models run on plain graphs, which are slower; install g++ and run this again" >&2
    fi
}

has_compiler() { command -v "${CXX:-g++}" >/dev/null || command -v c++ >/dev/null; }

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
