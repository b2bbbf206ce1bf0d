# Sourced in the repository's root, by demo and test too: builds .venv with the pinned versions if it is missing or older
# than pyproject.toml and constraints.txt.
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
        return 1
    fi
    echo "Building the environment in .venv: about 6 GB and some minutes, the first time only." >&2
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[test]' || {
        echo "The environment in .venv is incomplete; run the same command again to finish it." >&2
        return 1
    }
    echo "$wanted" > .venv/made-from
fi
