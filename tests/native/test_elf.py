"""From object files to images: what is not known is refused, never guessed."""

from __future__ import annotations

import platform
import struct
import sys
from pathlib import Path

import pytest
from llvmlite import binding

from rpc_server.native import elf
from rpc_server.native.compiler import content
from rpc_server.native.image import ENTRY, load, unpack
from tests.native import arm_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="object files are others there")


def object_file(text: str, triple: str = "x86_64-unknown-linux-gnu", **how: str) -> bytes:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = binding.parse_assembly(f'target triple = "{triple}"\n{text}')
    target = binding.Target.from_triple(triple)
    options = {"reloc": "pic", "codemodel": "small", **how}
    code: bytes = target.create_target_machine(**options).emit_object(module)
    return code


NOTHING = f"define i64 @{ENTRY}() {{ ret i64 7 }}"
USES_V = f"define i64 @{ENTRY}() {{ %a = load volatile i64, ptr @v\n ret i64 %a }}"


X86_64, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CALLS = f"""
    declare double @cos(double)
    declare double @pow(double, double)
    define i64 @{ENTRY}() {{
        %a = call double @cos(double 1.0)
        %b = call double @pow(double %a, double %a)
        %c = call double @cos(double %b)
        %i = fptosi double %c to i64
        ret i64 %i
    }}
    """
# A switch made a table of offsets, read-only data and a call: each kind of reference.
_CASES = "\n".join(f"i64 {i}, label %c{i}" for i in range(8))
_BLOCKS = "\n".join(
    f"c{i}:\n %r{i} = call i64 @value(i64 {3 * i})\n ret i64 %r{i}" for i in range(8)
)
REFERENCES = f"""
    @squares = internal constant [32 x i64] [{", ".join(f"i64 {i * i}" for i in range(32))}]
    define internal i64 @value(i64 %i) noinline {{
        %p = getelementptr [32 x i64], ptr @squares, i64 0, i64 %i
        %v = load volatile i64, ptr %p
        ret i64 %v
    }}
    define i64 @{ENTRY}(i64 %i) {{
        switch i64 %i, label %other [ {_CASES} ]
        {_BLOCKS}
        other: ret i64 -1
    }}
    """
SWITCHED = [*((3 * i) ** 2 for i in range(8)), -1]


@pytest.mark.parametrize("triple", [X86_64, ARM])
def test_imports_have_slots_of_their_own(triple: str) -> None:
    image, entry, imports = elf.link(object_file(CALLS, triple))
    assert set(imports) == {"cos", "pow"}
    assert all(slot % 8 == 0 and not any(image[slot : slot + 8]) for slot in imports.values())
    assert len(set(imports.values())) == 2
    assert 0 <= entry < len(image)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a 64-bit"),
        (b"MZ" + bytes(100), "not a 64-bit"),
        (b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xf3" + bytes(50), "machine 243"),
        (object_file("define i64 @other() { ret i64 7 }"), f"no symbol '{ENTRY}'"),
        (object_file(f"@v = internal constant ptr @{ENTRY}\n{USES_V}"), r"section \.data\.rel\.ro"),
        (object_file(f"@v = internal global i64 0\n{USES_V}"), r"section \.bss"),
        (object_file(f"@v = global i64 0\n{USES_V}"), r"section \.bss"),
        (
            object_file(f"@v = external dso_local global i64\n{USES_V}", reloc="static"),
            "relocation [0-9]+ against v",
        ),
    ],
    ids=[
        "empty",
        "windows",
        "risc-v",
        "no entry",
        "a pointer",
        "a variable",
        "exported",
        "absolute",
    ],
)
def test_what_is_not_known_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(elf.UnsupportedError, match=message):
        elf.link(data)


def test_what_is_refused_is_kept_as_an_object() -> None:
    assert unpack(content(object_file(NOTHING)))[0]["kind"] == "image"
    variable = object_file(f"@v = internal global i64 0\n{USES_V}")
    header, code = unpack(content(variable))
    assert header == {"kind": "object"}
    assert code[:4] == b"\x7fELF"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86-64 is run")
def test_jumps_and_tables_land_where_they_should() -> None:
    import ctypes

    loaded = load(content(object_file(REFERENCES)))
    run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(loaded.address)
    assert [run(i) for i in range(9)] == SWITCHED
    assert struct.calcsize("P") == 8


@arm_program.needs_qemu
def test_they_do_on_arm(tmp_path: Path) -> None:
    image, entry, imports = elf.link(object_file(REFERENCES, ARM))
    assert not imports
    for i, value in enumerate(SWITCHED):
        assert arm_program.run(tmp_path, image, entry, [i])[0] == value & 0xFF


@arm_program.needs_qemu
def test_a_call_on_arm_goes_where_its_slot_says(tmp_path: Path) -> None:
    calls = f"""
        declare i64 @imported(i64)
        define i64 @{ENTRY}(i64 %i) {{
            %a = call i64 @imported(i64 %i)
            %b = call i64 @imported(i64 %a)
            ret i64 %b
        }}
        """
    image, entry, imports = elf.link(object_file(calls, ARM))
    # Behind the image, a function of ours: add x0, x0, #5; ret.
    at = len(image) + -len(image) % 16
    linked = bytearray(image.ljust(at, b"\0") + struct.pack("<2I", 0x91001400, 0xD65F03C0))
    slot = imports["imported"]
    linked[slot : slot + 8] = (arm_program.IMAGE + at).to_bytes(8, "little")
    assert arm_program.run(tmp_path, bytes(linked), entry, [20])[0] == 30


def test_operands_on_arm_are_aligned() -> None:
    """What is loaded lies where the instruction can say so."""
    image = bytearray(4)
    with pytest.raises(elf.UnsupportedError, match="not aligned"):
        elf._within_page(3)(image, 0, 12)
