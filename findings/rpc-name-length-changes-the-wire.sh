#!/usr/bin/env bash
# Surprise: stable-diffusion-cpp-python compiles ggml with GGML_MAX_NAME=128, and by that the
# tensor of its RPC messages has 360 bytes instead of 296. The protocol's version is that of the
# same ggml without it.
#
# Why a good guess is wrong: GGML_MAX_NAME looks like a matter of labels within one process. But
# the struct that goes over the wire ends with char name[GGML_MAX_NAME], and a graph is a count
# and that many structs.
#
# Who it hurts: RPC servers that meet this client, or any program whose ggml was compiled with
# another length: HELLO is fine, the first message with a tensor isn't. A server can tell only by
# the length of messages.
#
# Seen with: stable-diffusion-cpp-python 0.4.7 (protocol 3.6.1)
. "$(dirname "$0")/common.bash"
sources stable-diffusion-cpp-python 0.4.7
vendor=stable_diffusion_cpp_python-0.4.7/vendor/stable-diffusion.cpp
definition=$(grep -o 'DGGML_MAX_NAME=[0-9]*' "$vendor/CMakeLists.txt")
echo "its CMakeLists.txt: -$definition"
# The struct as it stands in ggml-rpc.cpp.
{
    echo '#include "ggml.h"'
    echo '#include <cstdio>'
    # From the pragma that packs it, which stands before the first struct.
    sed -n '/^#pragma pack/p; /^struct rpc_tensor {/,/^};/p' "$vendor/ggml/src/ggml-rpc/ggml-rpc.cpp"
    echo 'int main() { printf("%zu\n", sizeof(rpc_tensor)); }'
} > size.cpp
c++ -I"$vendor/ggml/include" -o size size.cpp
c++ "-$definition" -I"$vendor/ggml/include" -o its-size size.cpp
grep -h '^#define RPC_PROTO_' "$vendor/ggml/include/ggml-rpc.h"
echo "bytes of a tensor: $(./size) by ggml's own length, $(./its-size) by the package's"
[ "$(./size) $(./its-size)" = "296 360" ] || { echo "this has changed"; exit 1; }
