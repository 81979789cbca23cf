# What the scripts have in common; read by each, not run. It makes a temporary folder with Python's
# packages in it, goes there, and removes it in the end.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv

pip() {
    venv/bin/python -m pip "$1" --quiet --disable-pip-version-check "${@:2}"
}

install() { # packages with their versions
    pip install "$@"
}

sources() { # name, version: the folder of a source package, unpacked but for large files
    install scikit-build-core==0.11.6
    pip download --no-deps --no-build-isolation --no-binary "$1" "$1==$2"
    tar xzf "${1//-/_}-$2.tar.gz" --exclude '*/models/*' --exclude '*/media/*' --exclude '*/docs/*'
}
