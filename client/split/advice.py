"""Says before any upload what servers would make of a model, by the formula of docs/split.md.

    shape = ModelShape.read("model.gguf")
    for p in advise(shape, boxes, context=4096):
        print(p.arrangement, p.fits, p.tokens_per_second)

A *box* is a server with what was measured of it (``client/split/survey.py``). Arrangements are each
box alone, whole layers over several, and a coordinator that splits (``row``, ``tensor``) over the
fastest of the others, with a share of its own or without. Between two boxes nobody has measured:
the longer of the round trips from here is taken for theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from client.model_header import ModelShape
from client.split.balance import alike, balanced, usable
from client.split.partition import attention_multiple, partition

Kind = Literal["alone", "layers", "row", "tensor"]

# Of a box's time for a token, what is no product of a weight, where that was not measured.
ALONE_PART = 0.05
# What an exchange costs both ends beside the network's round trip, seconds.
EXCHANGE_SECONDS = 30e-6
# Of a prompt's bytes in row mode, and of its products, how much overlaps with the other at most.
_OVERLAPPED_WIRE, _OVERLAPPED_PRODUCTS = 1 / 3, 1 / 2
# What one with a card costs besides: inputs are copied to it, kernels are launched and waited for,
# results are copied back. Some 40 us are the host's; the rest is on paper, no card was measured.
CARD_SECONDS = 60e-6
# Requests of llama.cpp with a graph's inputs: embeddings, positions, places in the cache, a mask.
_INPUTS = 7
# Tokens of a prompt that llama.cpp computes at once.
BATCH = 512
# The most servers that one coordinator is advised to use.
_MOST_PARTS = 8
# A smaller share isn't worth a machine.
_LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Box:
    """A server: bytes free, and what was measured.

    ``decode`` bytes of weights a second with one column, ``prompt`` the same times columns, with
    many of them; ``round_trip`` seconds and ``link`` bytes a second from here, ``handling`` the
    seconds of a request among many, which the programs at both ends take of a round trip.
    ``splits``: whether it can coordinate, which this project's servers can. ``rest`` and
    ``rest_prompt`` are seconds of a token that are no product of a weight, ``graph`` those of the
    least graph and its answer after a pause, the round trip among them; None if not measured.
    ``beside`` says of others on the same machine, by endpoint, how much longer this one takes for
    one column while they compute: 1 is twice as long; ``beside_prompt`` the same for many columns,
    which share cores but hardly the memory's bandwidth. ``links``: whether it can add up sums with
    other parts, without the coordinator. ``cold``: seconds that products take longer after a pause.
    ``card`` is what a coordinator there calls the GPU that was measured as a part of its own, '' if
    processors were.
    """

    endpoint: str
    free: int
    decode: float
    prompt: float
    round_trip: float
    link: float
    splits: bool = True
    rest: float | None = None
    rest_prompt: float | None = None
    graph: float | None = None
    handling: float = 0.0
    beside: Mapping[str, float] = field(default_factory=dict)
    beside_prompt: Mapping[str, float] = field(default_factory=dict)
    links: bool = False
    cold: float = 0.0
    card: str = ""

    @property
    def own_part(self) -> str:
        """Return what its own share is called in --split of a coordinator there."""
        return self.card or "local"

    def slowed(self, others: Iterable[Box], *, prompt: bool = False) -> float:
        """Return how many times as long it takes while others compute."""
        beside = self.beside_prompt if prompt else self.beside
        return 1 + sum(beside.get(other.endpoint, 0.0) for other in others)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The boxes that compute, by number. ``coordinator`` None where llama.cpp talks to all itself.

    A coordinator that is among ``parts`` has a share of its own.
    """

    kind: Kind
    parts: tuple[int, ...]
    coordinator: int | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The expected speed and memory of an arrangement; ``shares`` are those of its parts.

    ``terms`` are the seconds of a token by what takes them; ``limit`` is the largest of them, or
    'memory' where the model doesn't fit by ``missing`` bytes.
    """

    arrangement: Arrangement
    shares: tuple[float, ...]
    missing: int
    seconds_per_token: float
    seconds_per_prompt_token: float
    load_seconds: float
    terms: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.missing <= 0

    @property
    def limit(self) -> str:
        return max(self.terms, key=lambda term: self.terms[term]) if self.fits else "memory"

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds_per_token

    @property
    def prompt_tokens_per_second(self) -> float:
        return 1 / self.seconds_per_prompt_token


def advise(
    shape: ModelShape, boxes: Sequence[Box], *, context: int = 4096, at: int | None = None
) -> list[Prediction]:
    """Return what each sensible arrangement would do, the best first; those that fit come first.

    ``context`` is how many positions the KV cache has in all slots together. ``at`` asks for what
    that box can do as a coordinator or alone, no other.
    """
    made = [
        predict(shape, boxes, arrangement, context=context)
        for arrangement in arrangements(boxes)
        if at is None or at == _speaks_to_client(arrangement)
    ]
    # Of two that take about as long the one with fewer machines is the better.
    return sorted(
        made, key=lambda p: (max(p.missing, 0), p.seconds_per_token, len(p.arrangement.parts))
    )


def _speaks_to_client(arrangement: Arrangement) -> int | None:
    if arrangement.kind == "alone":
        return arrangement.parts[0]
    return arrangement.coordinator


def arrangements(boxes: Sequence[Box]) -> Iterator[Arrangement]:
    """Return all that make sense: of several machines always the fastest."""
    by_speed = sorted(range(len(boxes)), key=lambda i: -boxes[i].decode)
    for i in by_speed:
        yield Arrangement("alone", (i,))
    for n in range(2, min(len(boxes), _MOST_PARTS) + 1):
        yield Arrangement("layers", tuple(by_speed[:n]))
    for home in (i for i in by_speed if boxes[i].splits):
        others = [i for i in by_speed if i != home]
        for n in range(1, min(len(others), _MOST_PARTS) + 1):
            workers = tuple(others[:n])
            for kind in ("row", "tensor"):
                yield Arrangement(kind, (home, *workers), home)
                yield Arrangement(kind, workers, home)


def predict(
    shape: ModelShape,
    boxes: Sequence[Box],
    arrangement: Arrangement,
    *,
    context: int,
    batch: int = BATCH,
    shares: Sequence[float] | None = None,
    one_cable: bool = True,
) -> Prediction:
    """Return what one arrangement would do, ``shares`` given or the best.

    ``batch`` is how many tokens of a prompt are computed at once; ``one_cable`` says that all
    workers' bytes go through the coordinator's one, and not by ways of their own.
    """
    if arrangement.coordinator is None:
        return _whole_layers(shape, boxes, arrangement, context, batch)
    if shares is not None:
        return _split(shape, boxes, arrangement, shares, context, batch, one_cable)
    candidates = [
        _split(shape, boxes, arrangement, shares, context, batch, one_cable)
        for shares in _shares(shape, boxes, arrangement)
    ]
    return min(candidates, key=lambda p: (max(p.missing, 0), p.seconds_per_token))


def _overhead(shape: ModelShape, context: int) -> int:
    """Bytes beside weights: the KV cache, and activations of a batch (logits of one token each)."""
    wide = 4 * shape.width + 2 * shape.ffn_width + shape.vocabulary
    activations = 4 * BATCH * wide
    return context * shape.cache_bytes + activations


def _whole_layers(
    shape: ModelShape, boxes: Sequence[Box], arrangement: Arrangement, context: int, batch: int
) -> Prediction:
    """Each box computes its layers while the others wait."""
    used = [boxes[i] for i in arrangement.parts]
    room = [usable(b.free) for b in used]
    total = sum(room)
    shares = [r / total if total else 1 / len(used) for r in room]
    needed = shape.weight_bytes + len(used) * _overhead(shape, 0) + context * shape.cache_bytes
    weights = sum(s * shape.token_bytes / b.decode for s, b in zip(shares, used, strict=True))
    read = shape.token_bytes - shape.output_bytes
    prompt = sum(s * read / b.prompt for s, b in zip(shares, used, strict=True))
    rest = sum(s * _rest(shape, b) for s, b in zip(shares, used, strict=True))
    prompt_rest = sum(s * _prompt_rest(shape, b) for s, b in zip(shares, used, strict=True))
    # A graph and what is read of it; of the last box that is a row of logits.
    trips = sum(map(_least, used))
    if len(used) > 1:
        # Each has waited for all others when its turn comes.
        trips += sum(b.cold for b in used)
    wire = 4 * shape.vocabulary / used[-1].link
    terms = {
        "bandwidth": weights, "no products": rest, "round trips": trips, "network": wire
    }  # fmt: skip
    activations = (len(used) - 1) * 4 * shape.width * sum(1 / b.link for b in used) / len(used)
    return Prediction(
        arrangement,
        tuple(shares),
        needed - total,
        sum(terms.values()),
        prompt + prompt_rest + activations + trips / batch,
        sum(s * shape.weight_bytes / b.link for s, b in zip(shares, used, strict=True)),
        terms,
    )


def _rest(shape: ModelShape, box: Box) -> float:
    """Seconds of a token on a box that are no product of a weight."""
    return ALONE_PART * shape.token_bytes / box.decode if box.rest is None else box.rest


def _prompt_rest(shape: ModelShape, box: Box) -> float:
    """The same of a token among many."""
    if box.rest_prompt is None:
        return ALONE_PART * shape.token_bytes / box.prompt
    return box.rest_prompt


def _least(box: Box) -> float:
    """Seconds of the least graph with llama.cpp's inputs, and of its answer."""
    graph = box.round_trip if box.graph is None else box.graph
    return graph + _INPUTS * box.handling


def _distance(a: Box, b: Box) -> float:
    """The network's round trip between two boxes, as far as can be told from here.

    Exchanges don't pass through the programs that handle requests.
    """
    return max(max(box.round_trip - 2 * box.handling, 0.0) for box in (a, b))


def _trip(home: Box, box: Box, used: Sequence[Box] = ()) -> float:
    """Seconds that an exchange of a coordinator and a part takes beside computing.

    Of what both ends spend on it, those that share a core wait for one another.
    """
    at_ends = EXCHANGE_SECONDS * box.slowed(used, prompt=True)
    on_card = CARD_SECONDS if box.card else 0.0
    if box is home:
        # Processors of its own take part without an exchange.
        return at_ends + on_card if box.card else 0.0
    return _distance(home, box) + at_ends + on_card


def _shares(shape: ModelShape, boxes: Sequence[Box], arrangement: Arrangement) -> list[list[float]]:
    """Shares worth looking at: by time, the same in whole heads, and all alike."""
    assert arrangement.coordinator is not None
    home = boxes[arrangement.coordinator]
    used = [boxes[i] for i in arrangement.parts]
    # Linked parts all wait for one another.
    near = is_linked(arrangement.kind, used)
    away = [0.0 if near else _trip(home, b) for b in used]
    work = shape.token_bytes / (4 * shape.layers)
    limits = [usable(b.free) / shape.weight_bytes for b in used]
    speeds = alike([b.decode / b.slowed(used) for b in used])
    found = [[1 / len(used)] * len(used)]
    for most in (limits, None):
        try:
            found.append(balanced(speeds, latencies=away, work=work, limits=most))
        except ValueError:
            # They have no room for it together: what is missing is told by the other shares.
            continue
    for shares in list(found):
        heads = [round(s * shape.kv_heads) for s in shares]
        if sum(heads) == shape.kv_heads:
            found.append([h / shape.kv_heads for h in heads])
    # A part without a share is another arrangement.
    return [shares for shares in found if min(shares) >= _LEAST_SHARE]


def cuts_heads(shape: ModelShape, shares: Sequence[float]) -> bool:
    """Return whether tensor mode can cut attention: every part gets whole key/value heads.

    The queries that belong to them as well, since each weight is cut by itself.
    """
    keys, queries = (_head_cuts(n, shape.head_width, shares) for n in (shape.kv_heads, shape.heads))
    group = shape.heads // shape.kv_heads
    return keys is not None and queries == [group * cut for cut in keys]


def _head_cuts(heads: int, width: int, shares: Sequence[float]) -> list[int] | None:
    """Return the last head of each part, None if one is cut in two."""
    rows = heads * width
    ends = [r.last for r in partition(rows, shares, attention_multiple(rows))]
    return None if any(end % width for end in ends) else [end // width for end in ends]


def exchanges(
    shape: ModelShape, kind: Kind, shares: Sequence[float], *, linked: bool = False
) -> int:
    """Return how many exchanges with the coordinator a token takes; ``linked`` parts swap sums."""
    if kind == "row":
        return 4 * shape.layers + 1
    if linked:
        return 1 if cuts_heads(shape, shares) else shape.layers + 1
    return (2 if cuts_heads(shape, shares) else 3) * shape.layers + 1


def swaps(shape: ModelShape) -> int:
    """Return how often linked parts swap sums for a token: behind attention and the FFN."""
    return 2 * shape.layers


def is_linked(kind: Kind, used: Sequence[Box]) -> bool:
    """Return whether parts add up sums among themselves."""
    return kind == "tensor" and len(used) > 1 and all(box.links for box in used)


def _wire_bytes(
    shape: ModelShape, kind: Kind, shares: Sequence[float], share: float, *, linked: bool
) -> float:
    """Bytes of activations there and back for one token, between the coordinator and one worker."""
    heads = shape.kv_heads * shape.head_width
    # Linked parts have their sums from one another.
    block = 0.0 if linked else 2.0 * shape.width
    attention = ffn = block
    if kind == "row" or not cuts_heads(shape, shares):
        # The coordinator's: it gets a share of queries, keys and values, and gives what comes out.
        attention = share * (2 * shape.width + 2 * heads) + block
    if kind == "row":
        ffn = shape.width + shape.ffn_width + share * (2 * shape.ffn_width + shape.width)
    return 4 * (shape.layers * (attention + ffn) + shape.width + share * shape.vocabulary)


def _swapped_bytes(shape: ModelShape, n_parts: int) -> float:
    """Bytes that a part sends to all others for one token, while it receives as many of theirs."""
    return 4.0 * swaps(shape) * (n_parts - 1) * shape.width


def _split(
    shape: ModelShape,
    boxes: Sequence[Box],
    arrangement: Arrangement,
    shares: Sequence[float],
    context: int,
    batch: int,
    one_cable: bool,
) -> Prediction:
    assert arrangement.coordinator is not None
    home, kind = boxes[arrangement.coordinator], arrangement.kind
    used = [boxes[i] for i in arrangement.parts]
    workers = [(s, b) for s, b in zip(shares, used, strict=True) if b is not home and s > 0]
    linked = is_linked(kind, used)
    n: float = exchanges(shape, kind, shares, linked=linked)
    # Linked parts all compute what lies between the sums.
    among = used if linked else [home]
    alone = max(_rest(shape, b) * b.slowed(among, prompt=True) for b in among)
    weights = max(
        s * shape.token_bytes / b.decode * b.slowed(used) for s, b in zip(shares, used, strict=True)
    )
    # A swap is one way of an exchange, between any two of the parts.
    n += swaps(shape) / 2 if linked else 0
    trips = n * max(_trip(home, b, used) for s, b in zip(shares, used, strict=True) if s > 0)
    together = sum if one_cable else max
    wire = together(
        [_wire_bytes(shape, kind, shares, s, linked=linked) / b.link for s, b in workers]
    )
    # Each part has a cable of its own, and none of the others' sums are on it.
    swapped = _swapped_bytes(shape, len(used)) if linked else 0.0
    swapping = max((swapped / b.link for _, b in workers), default=0.0)
    terms = {
        "bandwidth": weights, "the coordinator alone": alone + _least(home),
        "round trips": trips, "network": wire + swapping + 4 * shape.vocabulary / home.link,
    }  # fmt: skip
    # The output is computed for the last token of a prompt only.
    read = shape.token_bytes - shape.output_bytes
    prompt = max(
        s * read / b.prompt * b.slowed(used, prompt=True) for s, b in zip(shares, used, strict=True)
    )
    # Logits are computed for the last token of a prompt only.
    batch_wire = together(
        [
            (_wire_bytes(shape, kind, shares, s, linked=linked) - 4 * s * shape.vocabulary) / b.link
            for s, b in workers
        ]
    )
    if kind == "row":
        # Of a prompt's results those that are there go out while the rest is computed.
        batch_wire -= min(batch_wire * _OVERLAPPED_WIRE, prompt * _OVERLAPPED_PRODUCTS)
    return Prediction(
        arrangement,
        tuple(shares),
        _missing(shape, home, used, shares, kind, context),
        sum(terms.values()),
        prompt + _prompt_rest(shape, home) + batch_wire + swapping + trips / batch,
        max(s * shape.weight_bytes / b.link for s, b in [(1.0, home), *workers]),
        terms,
    )


def _missing(
    shape: ModelShape,
    home: Box,
    used: Sequence[Box],
    shares: Sequence[float],
    kind: Kind,
    context: int,
) -> int:
    """Bytes by which the model doesn't fit, 0 or less where it does."""
    cache = context * shape.cache_bytes
    # A cache goes to the heads in tensor mode; else it lies with the coordinator.
    moves = kind == "tensor" and cuts_heads(shape, shares)
    needed_at_home = _overhead(shape, 0) + (0 if moves else cache)
    short = []
    for share, box in zip(shares, used, strict=True):
        needed = int(share * (shape.weight_bytes + (cache if moves else 0)))
        if box is home:
            needed += needed_at_home
        short.append(needed - usable(box.free))
    if home not in used:
        short.append(needed_at_home - usable(home.free))
    return max(short)
