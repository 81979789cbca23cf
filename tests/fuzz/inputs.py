"""Inputs of a target as files: the kept ones are one archive, what a search finds is a folder."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

SUFFIX = ".tar.gz"


def read(path: Path) -> dict[str, bytes]:
    """Return inputs by name, in order of their names: of an archive, of a folder, or one file.

    Raises OSError, tarfile.TarError.
    """
    if path.is_dir():
        return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}
    if not path.name.endswith(SUFFIX):
        return {path.name: path.read_bytes()}
    inputs = {}
    with tarfile.open(path) as archive:
        for member in sorted(archive, key=lambda m: m.name):
            file = archive.extractfile(member)
            assert file is not None, f"{path}: {member.name} is no file"
            inputs[member.name] = file.read()
    return inputs


def write(path: Path, inputs: Mapping[str, bytes]) -> None:
    """Write inputs as an archive; the same inputs give the same bytes, whoever writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # gzip notes name and time of what it packs.
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(inputs):
            member = tarfile.TarInfo(name)
            member.size = len(inputs[name])
            archive.addfile(member, io.BytesIO(inputs[name]))


def unpack(path: Path, folder: Path) -> None:
    """Write the inputs of an archive into a folder, a file each."""
    folder.mkdir(parents=True)
    for name, data in read(path).items():
        (folder / name).write_bytes(data)
