#!/usr/bin/env bash
# Surprise: Arrays don't come out of a GGUF file as they went in. GGUFWriter leaves out a key
# whose array is empty, without a word. GGUFReader gives an array of arrays back as one flat list.
# An array of whole numbers is always INT32, and one number beyond that raises struct.error.
#
# Why a good guess is wrong: An empty array is valid GGUF (a type and a count of 0), nested ones
# are, and for single values the writer lets one choose the width (add_uint64). The errors for
# mixed types suggest that arrays are checked.
#
# Who it hurts: Tools that copy or edit metadata: keys vanish, and lists of lists lose their
# bounds. Loaders that need the key say that it is missing in a file whose maker did write it.
#
# Seen with: gguf 0.19.0
. "$(dirname "$0")/common.bash"
install gguf==0.19.0 numpy==2.2.6

venv/bin/python - <<'PYTHON'
import struct

import gguf


def through(value: list) -> object:
    """What comes back of an array, None if there is no such key."""
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_array("x.array", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    field = gguf.GGUFReader("model.gguf").fields.get("x.array")
    return field and field.contents()


print("gguf 0.19.0")
assert through([1, 2]) == [1, 2]
for value, expected in (([], None), ([[1, 2], [3, 4]], [1, 2, 3, 4])):
    got = through(value)
    print(f"{value} comes back as {got}")
    assert got == expected, "this has changed"
try:
    through([1 << 31])
except struct.error as error:
    print(f"{[1 << 31]}: struct.error: {error}")
else:
    raise SystemExit("this has changed: the large number was written")
PYTHON
