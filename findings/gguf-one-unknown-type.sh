#!/usr/bin/env bash
# Surprise: gguf's GGUFReader can't open a file in which one tensor has a type that it doesn't
# know: no metadata, no names, no other tensor. The current release lacks a type that its own
# project's programs write (Q2_0, number 42).
#
# Why a good guess is wrong: The sizes of types are needed for the data only; names, shapes and
# offsets are in the file. A reader could list all of it. And a package of the same repository,
# released after the type was added to ggml, would be expected to know it.
#
# Who it hurts: Tools that list, sort or serve GGUF files: one new file in a folder and the
# listing raises. Catch ValueError, or read the header yourself.
#
# Seen with: gguf 0.19.0; the type is in ggml.h of llama-cpp-python 0.3.36
. "$(dirname "$0")/common.bash"
install gguf==0.19.0 numpy==2.2.6

venv/bin/python - <<'PYTHON'
import struct

import gguf

Q2_0 = 42


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, length: int, kind: int, offset: int) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, length, kind, offset)


# Version 3, two tensors, one key. The second tensor's type is the new one.
header = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
header += text("general.architecture") + struct.pack("<I", 8) + text("llama")
header += tensor("norm", 8, 0, 0) + tensor("weight", 128, Q2_0, 32)
with open("model.gguf", "wb") as file:
    file.write(header + bytes(-len(header) % 32) + bytes(256))
print("gguf 0.19.0 knows types up to", max(gguf.GGMLQuantizationType))
try:
    gguf.GGUFReader("model.gguf")
except ValueError as error:
    print("GGUFReader:", error)
    assert "42) is not a valid GGMLQuantizationType" in str(error), "this has changed"
else:
    raise SystemExit("this has changed: the file was read")
PYTHON
