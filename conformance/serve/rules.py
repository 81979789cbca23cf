"""What a client has to keep, whatever the server answers; and the notes of who kept it.

Every rule has a name under which results are reported, the requirement as docs/protocol.md has it,
and what breaking it means: FAIL where a server would refuse or a result could be wrong, DIFFERS
where servers bear it but llama.cpp's own client does otherwise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from conformance.suite.results import Verdict


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement; ``broken`` is the verdict where it isn't kept."""

    name: str
    requirement: str
    broken: Verdict = Verdict.FAIL


_FAIL = (
    ("hello/first", "The first message is HELLO, of 0 bytes (up to 3.x) or 24 (from 4.x on)."),
    ("hello/once", "HELLO is sent once in a connection."),
    ("request/known", "Only commands of the version that HELLO agreed on are sent."),
    ("request/size", "A request has the size of its declaration."),
    ("request/whole", "A connection ends between two messages, not within one."),
    ("device/exists", "Devices are numbered from 0 up to what DEVICE_COUNT answered, less one."),
    ("buffer/handle", "A handle is one that ALLOC_BUFFER answered on this connection, never 0."),
    ("buffer/freed", "A buffer isn't used after FREE_BUFFER, by a graph either."),
    ("tensor/type", "A tensor has one of ggml's types and whole blocks in a row."),
    ("tensor/inside", "A tensor lies inside the buffer that it names."),
    ("tensor/alignment", "Tensors that aren't views lie on multiples of GET_ALIGNMENT's answer."),
    ("tensor/alloc-size", "A tensor has the room behind it that GET_ALLOC_SIZE answered."),
    ("set/range", "SET_TENSOR's data fit into the tensor from the offset on."),
    ("get/range", "GET_TENSOR asks for bytes of the tensor only."),
    ("memset/range", "MEMSET_TENSOR fills bytes of the tensor only."),
    ("copy/range", "COPY_TENSOR's source fits into the buffer of its destination."),
    ("hash/large", "Only data of more than 10 MiB are offered by their hash."),
    ("hash/fnv", "The hash that is offered is the FNV-1a 64 of the data that follow a miss."),
    ("hash/data", "After a miss (0) the data are sent."),
    ("graph/counts", "A graph's counts fill its message."),
    ("graph/ids", "Ids are unique; nodes, sources and viewed tensors are among the tensors."),
    ("graph/order", "A node comes after the nodes that it reads."),
    ("graph/op", "An op's number is one of the version's."),
    ("graph/recompute", "GRAPH_RECOMPUTE follows a graph of the device, no FREE_BUFFER between."),
    ("stream/answers", "A client waits for its answers: it doesn't end while one is on its way."),
)  # fmt: skip
_DIFFERS = (
    ("buffer/max-size", "No buffer is asked for that is larger than GET_MAX_SIZE answered."),
    ("buffer/all-freed", "What was allocated is freed before the connection ends."),
    ("hash/hit", "After a hit (1) the data aren't sent."),
    ("alloc-size/asked", "GET_ALLOC_SIZE is asked for quantized tensors of broken 512s."),
    ("init/sent", "INIT_TENSOR is sent for quantized tensors of broken 512s before their data."),
)  # fmt: skip

RULES: dict[str, Rule] = {
    **{name: Rule(name, text) for name, text in _FAIL},
    **{name: Rule(name, text, Verdict.DIFFERS) for name, text in _DIFFERS},
}

# Of a rule broken a thousand times the first few say it all.
_KEEP = 5


@dataclass(slots=True)
class Notes:
    """The counts of how often each rule was tested, and the places where it was broken."""

    tested: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def check(self, rule: str, kept: bool, otherwise: str) -> bool:
        """Note one test of ``rule``; ``otherwise`` says what was wrong. Whether it was kept."""
        self.tested[RULES[rule].name] += 1
        if not kept:
            self.broken[rule] += 1
            examples = self.examples.setdefault(rule, [])
            if len(examples) < _KEEP:
                examples.append(otherwise)
        return kept

    def add(self, other: Notes) -> None:
        """Take over what was noted elsewhere."""
        self.tested += other.tested
        self.broken += other.broken
        for rule, examples in other.examples.items():
            if not other.broken[rule]:
                continue
            mine = self.examples.setdefault(rule, [])
            mine.extend(examples[: _KEEP - len(mine)])

    def verdict(self, rule: str) -> tuple[Verdict, str]:
        """Return the verdict on one rule, and why."""
        if not self.tested[rule]:
            return Verdict.SKIPPED, "not seen: the client did nothing that this is about"
        if not self.broken[rule]:
            return Verdict.PASS, f"kept {self.tested[rule]} times"
        count, first = self.broken[rule], self.examples[rule][0]
        more = f" (and {count - 1} times more)" if count > 1 else ""
        return RULES[rule].broken, first + more
