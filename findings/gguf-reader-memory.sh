#!/usr/bin/env bash
# Surprise: To open a GGUF file with GGUFReader takes about eighty times the memory of its
# metadata: each string of a vocabulary becomes two NumPy arrays, each score one, all made when
# the file is opened, whether one asks for them or not.
#
# Why a good guess is wrong: The reader maps the file into memory, which sounds as if nothing was
# read until it is used. Of the tensors that is true.
#
# Who it hurts: Whoever lists models, or reads one key: with the 150,000 or 250,000 tokens of
# today's models it takes seconds and some hundred MiB before the first key can be looked at.
#
# Seen with: gguf 0.19.0, numpy 2.2.6
. "$(dirname "$0")/common.bash"
install gguf==0.19.0 numpy==2.2.6

venv/bin/python - <<'PYTHON'
import os
import tracemalloc

import gguf

N = 20_000
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_token_list([f"token {i}" for i in range(N)])
writer.add_token_scores([float(i) for i in range(N)])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tracemalloc.start()
reader = gguf.GGUFReader("model.gguf")
held, _ = tracemalloc.get_traced_memory()
size = os.path.getsize("model.gguf")
arrays = {key: len(field.parts) for key, field in reader.fields.items() if len(field.parts) > N}
print(f"gguf 0.19.0: a file of {size >> 10} KiB, {N} tokens")
print(f"held once it is open: {held >> 20} MiB, {held // size} times the file; arrays: {arrays}")
assert list(arrays.values()) == [2 * N + 5, N + 5], "this has changed"
assert held > 30 * size, "this has changed"
PYTHON
