#!/usr/bin/env bash
# Surprise: Three packages speak version 2.0.0 of the ggml RPC protocol, and each numbers the
# operations of a graph differently: what one calls ROPE is another operation for the next.
#
# Why a good guess is wrong: A peer announces major, minor and patch, and a version number is
# there to say whether two can talk. Graphs hold the number of each operation as it was in the
# enum when the program was compiled; the enum grew in its middle while the version stayed. Since
# then the patch is to be raised with it, but clients compare major and minor only.
#
# Who it hurts: Whoever builds an RPC server, or runs packages of different age against one:
# graphs of a version that was accepted mean something else. A peer has to find out by other means
# what numbers it gets.
#
# Seen with: llama-cpp-python 0.3.9 and 0.3.16, stable-diffusion-cpp-python 0.3.1, llama-cpp-
# python 0.3.36
. "$(dirname "$0")/common.bash"
cat > numbers.c <<'C'
#include "ggml.h"
#include <stdio.h>
int main(void) {
    printf("%d operations, SOFT_MAX %d, ROPE %d, FLASH_ATTN_EXT %d\n", GGML_OP_COUNT,
           GGML_OP_SOFT_MAX, GGML_OP_ROPE, GGML_OP_FLASH_ATTN_EXT);
}
C
version() { # of the protocol, as a header has it
    sed -n 's/^#define RPC_PROTO_\(MAJOR\|MINOR\|PATCH\)_VERSION *\([0-9]*\).*/\2/p' "$1" | paste -sd.
}
for package in llama-cpp-python=0.3.9 llama-cpp-python=0.3.16 stable-diffusion-cpp-python=0.3.1; do
    sources "${package%=*}" "${package#*=}"
    name=${package%=*}
    include=$(dirname "$(find "${name//-/_}-${package#*=}" -name ggml-rpc.h | head -1)")
    cc -I"$include" -o numbers numbers.c
    printf '%s: protocol %s, ' "$package" "$(version "$include/ggml-rpc.h")"
    ./numbers
done | tee seen

echo "What a client compares, in llama-cpp-python 0.3.36:"
sources llama-cpp-python 0.3.36
grep -h 'response.major != ' llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-rpc/ggml-rpc.cpp \
    | tee compared

changed() { echo "this has changed"; exit 1; }
[ "$(grep -c 'protocol 2.0.0,' seen)" = 3 ] || changed
[ "$(sed 's/.*, \(.* operations\)/\1/' seen | sort -u | wc -l)" = 3 ] || changed
grep -q 'response.minor > RPC_PROTO_MINOR_VERSION) {' compared || changed
