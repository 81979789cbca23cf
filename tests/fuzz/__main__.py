"""Fuzzes one target, with coverage of what it runs to guide the search.

    python -m tests.fuzz TARGET [--minutes N] [--corpus DIR]
    python -m tests.fuzz TARGET --replay PATH
    python -m tests.fuzz TARGET --minimise DIR
    python -m tests.fuzz --list

Needs atheris (pip install -e '.[fuzz]'), but for --replay and --list. New inputs go to --corpus,
the kept ones in tests/fuzz/corpus, an archive a target, are read too. An input that fails is
written to --corpus as crash-*, timeout-* or oom-*: replay it, repair the fault, name it
regression-* and let --minimise take it in.

Exit codes: 0 nothing found, 1 a finding (its trace is printed), 2 wrong options or no atheris.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import inputs
from tools.arguments import command_line

# Hangs and blow-ups count as findings.
_TIMEOUT_SECONDS = 5
_MEMORY_MIB = 1500
_SEEDS = 600
_PACKAGES = ["protocol", "rpc_server"]


def _parser() -> argparse.ArgumentParser:
    parser = command_line("tests.fuzz", __doc__)
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="what to fuzz (--list names them)")
    add("--list", action="store_true", help="print the targets")
    add("--minutes", type=float, default=1.0, help="how long (%(default)s)")
    add("--corpus", type=Path, metavar="DIR", help="where new inputs go (a new temporary folder)")
    add("--seed", type=int, default=0, help="of the search (%(default)s: by the clock)")
    add("--replay", type=Path, metavar="PATH", help="run an input, or all of a folder or archive")
    add("--minimise", type=Path, metavar="DIR", help="keep of DIR what covers all that DIR covers")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _replay(name: str, path: Path) -> int:
    from tests.fuzz.targets import TARGETS

    faulthandler.enable()
    for file, data in inputs.read(path).items():
        # Before it runs: a fault in compiled code ends the process.
        print(file, flush=True)
        TARGETS[name].run(data)
    return 0


def _modules(packages: Sequence[str]) -> list[str]:
    """The names of all modules in packages of the project."""
    project = Path(__file__).parents[2]
    files = [f for name in packages for f in (project / name.replace(".", "/")).rglob("*.py")]
    return [".".join(f.relative_to(project).with_suffix("").parts) for f in files]


def _fuzz_here(name: str, seed: int, arguments: Sequence[str], unseen: Sequence[str]) -> None:
    """In a process of its own: atheris doesn't return."""
    import atheris

    with atheris.instrument_imports(
        include=_PACKAGES, exclude=_modules(unseen), enable_loader_override=False
    ):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    valid = [data for data in target.seeds(_SEEDS, seed) if len(data) <= target.largest]

    def one(data: bytes) -> int:
        return 0 if target.run(data) else -1

    def mutated(data: bytes, largest: int, number: int) -> bytes:
        changed = target.damage(data, largest, random.Random(number), atheris.Mutate, valid)
        return changed[:largest]

    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=mutated)
    atheris.Fuzz()


def _fuzz(name: str, minutes: float, corpus: Path | None, seed: int) -> int:
    from tests.fuzz.targets import TARGETS

    if importlib.util.find_spec("atheris") is None:
        print("error: fuzzing needs atheris: pip install -e '.[fuzz]'", file=sys.stderr)
        return 2
    target = TARGETS[name]
    seed = seed or int(time.time()) % (1 << 31)
    folder = corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    for i, data in enumerate(target.seeds(_SEEDS, seed)):
        if len(data) <= target.largest:
            (folder / f"seed-{i}").write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzz", name, "--child", "--seed", str(seed)]
    known = tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-known-")
    for archive in (target.corpus, *([TARGETS[target.also].corpus] if target.also else [])):
        if archive.exists():
            inputs.unpack(archive, Path(known.name) / archive.name)
    options = [
        str(folder),
        *map(str, Path(known.name).iterdir()),
        f"-max_total_time={max(round(minutes * 60), 1)}",
        f"-max_len={target.largest}",
        f"-timeout={_TIMEOUT_SECONDS}",
        f"-rss_limit_mb={_MEMORY_MIB}",
        f"-artifact_prefix={folder}/",
        f"-seed={seed}",
        "-print_final_stats=1",
    ]
    print(f"{name}: seed {seed}, new inputs in {folder}", flush=True)
    environment = {
        **os.environ,
        "FUZZ_OPTIONS": "\n".join(options),
        "FUZZ_UNSEEN": " ".join(target.unseen),
    }
    lines: list[str] = []
    with (
        known,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if not re.match(r"#\d+\s+(NEW|REDUCE)\b", line):
                print(line, end="", flush=True)
    findings = [
        p
        for p in sorted(folder.iterdir())
        if p not in before and re.match("(crash|timeout|oom)-", p.name)
    ]
    print(f"{name}: {_summary(lines)}; {len(findings)} findings")
    for finding in findings:
        print(f"  {finding}")
    return 1 if findings or child.returncode else 0


def _summary(lines: Sequence[str]) -> str:
    text = "".join(lines)
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
    rate = re.findall(r"stat::average_exec_per_sec:\s+(\d+)", text)
    peak = re.findall(r"stat::peak_rss_mb:\s+(\d+)", text)
    state = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", text)
    if not runs or not state:
        return "no statistics"
    edges, features, inputs = state[-1]
    return (
        f"{runs[-1]} executions, {rate[-1]}/s, {edges} edges, {features} features, "
        f"{inputs} inputs, {peak[-1]} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.child:
        arguments, unseen = (
            os.environ["FUZZ_OPTIONS"].split("\n"),
            os.environ["FUZZ_UNSEEN"].split(),
        )
        _fuzz_here(options.target, options.seed, arguments, unseen)
        return 0
    from tests.fuzz.targets import TARGETS

    if options.list:
        for target in TARGETS.values():
            print(f"{target.name:10} {target.about}")
        return 0
    if options.target not in TARGETS:
        parser.error(f"a target is one of {', '.join(TARGETS)}")
    if options.replay:
        return _replay(options.target, options.replay)
    if options.minimise:
        from tests.fuzz.minimise import minimise

        minimise(TARGETS[options.target], options.minimise)
        return 0
    return _fuzz(options.target, options.minutes, options.corpus, options.seed)


if __name__ == "__main__":
    sys.exit(main())
