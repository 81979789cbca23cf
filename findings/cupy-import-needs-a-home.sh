#!/usr/bin/env bash
# Surprise: import cupy raises OSError where the home folder can't be written, before anything was
# computed or asked for: it makes its cache folder while it is imported.
#
# Why a good guess is wrong: Caches are made when they are needed, and other libraries go on
# without one (numba has a list of places to try). CUPY_CACHE_DIR helps, but isn't in the message,
# and CUPY_CACHE_IN_MEMORY, which says that no files are used, doesn't help.
#
# Who it hurts: Services: systemd's DynamicUser or ProtectHome, containers that run as a number
# without a home. A program that tries "except ImportError" to do without a GPU ends.
#
# Seen with: cupy-cuda12x 14.2.0
. "$(dirname "$0")/common.bash"
install cupy-cuda12x==14.2.0 numpy==2.2.6
touch home # a file, so that no folder can be made in it, whoever runs this
result() {
    env "$@" venv/bin/python -c 'import cupy; print("imported", cupy.__version__)' 2>&1 | tail -1 || true
}
mkdir cache
with=$(result "CUPY_CACHE_DIR=$folder/cache" "HOME=$folder/home")
memory=$(result CUPY_CACHE_IN_MEMORY=1 "HOME=$folder/home")
without=$(result "HOME=$folder/home")
echo "with CUPY_CACHE_DIR:       $with"
echo "with CUPY_CACHE_IN_MEMORY: $memory"
echo "with neither:              $without"
case "$with|$memory|$without" in
    "imported 14.2.0|NotADirectoryError"*"|NotADirectoryError"*) ;;
    *) echo "this has changed"; exit 1 ;;
esac
