#!/usr/bin/env bash
# Surprise: gguf's table says that a block of Q8_1 has 40 bytes. ggml's own struct has 36.
#
# Why a good guess is wrong: The package is ggml's own, and every other row of GGML_QUANT_SIZES is
# right, so it looks like the place to take sizes from. Q8_1's row counts its scale and sum as two
# floats; in ggml they have been two halves for long.
#
# Who it hurts: Whoever sizes buffers or checks tensors off the wire by this table: an RPC peer
# that gets a Q8_1 tensor computes another size than the client did and another address for each
# row.
#
# Seen with: gguf 0.19.0; ggml as in llama-cpp-python 0.3.36
. "$(dirname "$0")/common.bash"
install gguf==0.19.0 numpy==2.2.6 scikit-build-core==0.11.6
pip download --no-deps --no-build-isolation --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz --strip-components 4 --wildcards '*/ggml/src/ggml-common.h' \
    '*/ggml/include/*'
cat > size.cpp <<'CPP'
#define GGML_COMMON_DECL_CPP
#include "src/ggml-common.h"
#include <cstdio>
int main() { printf("%zu\n", sizeof(block_q8_1)); }
CPP
c++ -std=c++17 -Iinclude -o size size.cpp

venv/bin/python - <<'PYTHON'
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import subprocess

block, size = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_1]
print(f"gguf 0.19.0: {size} bytes for {block} values")
ours = int(subprocess.run(["./size"], capture_output=True, text=True, check=True).stdout)
print(f"ggml (llama-cpp-python 0.3.36): {ours} bytes")
assert (block, size, ours) == (32, 40, 36), "this has changed"
PYTHON
