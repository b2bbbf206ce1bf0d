# Sourced by demo and test: makes .venv with the pinned versions where it is missing or older than what it is made from.
wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
    python=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "zoo needs Python 3.11 or newer with its venv module (python3-venv on Debian); none was found" >&2
        exit 1
    fi
    echo "making the environment in .venv (some minutes, about 6 GB)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[test]'
    echo "$wanted" > .venv/made-from
fi
