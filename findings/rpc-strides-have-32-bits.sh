#!/usr/bin/env bash
# Surprise: In ggml's RPC messages a tensor's strides have 32 bits each, while strides in ggml,
# and sizes, offsets and addresses in the same messages, have 64. A tensor whose third dimension
# is 4 GiB wide arrives with a stride of 0.
#
# Why a good guess is wrong: The struct copies ggml_tensor field by field, and the fields beside
# have ggml's own widths, but for ne (32 bits too, but counts of elements hardly get there).
#
# Who it hurts: Whoever builds an RPC peer that reads strides off the wire, as upstream's server
# does: for contiguous tensors compute them from ne and the type, and expect stacks of experts and
# long KV caches to be the first to get there.
#
# Seen with: llama-cpp-python 0.3.36 (protocol 7.0.0)
. "$(dirname "$0")/common.bash"
sources llama-cpp-python 0.3.36
ggml=llama_cpp_python-0.3.36/vendor/llama.cpp/ggml
{
    echo '#include "ggml.h"'
    echo '#include <cstdio>'
    # From the pragma that packs it, which stands before the first struct.
    sed -n '/^#pragma pack/p; /^struct rpc_tensor {/,/^};/p' "$ggml/src/ggml-rpc/ggml-rpc.cpp"
    cat <<'CPP'
int main() {
    // F32, 32768 x 32768 x 4: contiguous, 16 GiB.
    ggml_tensor tensor = {};
    const int64_t ne[4] = {32768, 32768, 4, 1};
    tensor.nb[0] = 4;
    for (int i = 0; i < 4; i++) {
        tensor.ne[i] = ne[i];
        if (i) tensor.nb[i] = tensor.nb[i - 1] * ne[i - 1];
    }
    rpc_tensor sent = {};
    for (int i = 0; i < 4; i++) {
        sent.nb[i] = tensor.nb[i];
    }
    for (int i = 0; i < 4; i++) printf("stride %d: %zu in ggml, %u sent\n", i, tensor.nb[i], sent.nb[i]);
}
CPP
} > strides.cpp
c++ -I"$ggml/include" -o strides strides.cpp
echo "How it is sent, in ggml-rpc.cpp:"
grep -h 'result.nb\[i\] = ' "$ggml/src/ggml-rpc/ggml-rpc.cpp"
./strides | tee seen
grep -q 'stride 2: 4294967296 in ggml, 0 sent' seen || { echo "this has changed"; exit 1; }
