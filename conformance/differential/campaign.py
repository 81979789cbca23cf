"""A whole run: which families and variants, how many cases of each, in how many processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import conformance.differential.families  # noqa: F401  (fills the table)
from conformance.differential.case import GraphCase
from conformance.differential.endpoint import Endpoint
from conformance.differential.explore import Difference, FamilyTally, Judge, Mismatch
from conformance.differential.sketch import FAMILIES, label

# Share of a family's examples that a profile draws.
PROFILES = {"smoke": 0.03, "short": 0.1, "full": 1.0, "nightly": 10.0}

REGRESSIONS = Path(__file__).parent / "regressions"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Servers:
    """The two servers, each by address or by command."""

    tested_address: Address | None
    tested_command: str
    reference_address: Address | None
    reference_command: str
    version: str = "7"
    # Where servers under test that are started here write.
    tested_log: Path | None = None
    # Whether numbers below the normal ones are 0 for the server under test.
    flushes: bool = False

    def tested(self) -> Endpoint:
        """Return a new endpoint of the server under test."""
        return Endpoint(
            address=self.tested_address,
            command=self.tested_command,
            version=self.version,
            log=self.tested_log,
        )

    def reference(self) -> Endpoint:
        """Return a new endpoint of the reference."""
        return Endpoint(
            address=self.reference_address, command=self.reference_command, version=self.version
        )


def select(only: str | None = None, variant: str | None = None) -> dict[str, list[str]]:
    """Return families by name with the labels of their variants; ValueError for unknown names."""
    names = [n.strip() for n in only.split(",")] if only else list(FAMILIES)
    unknown = [n for n in names if n not in FAMILIES]
    if unknown:
        raise ValueError(f"no family {', '.join(unknown)}: there are {', '.join(FAMILIES)}")
    chosen = {}
    for name in names:
        labels = [label(v) for v in FAMILIES[name].variants]
        kept = [x for x in labels if variant is None or x == variant]
        if kept:
            chosen[name] = kept
    if not chosen:
        raise ValueError(f"no variant '{variant}'")
    return chosen


def regressions(name: str) -> dict[str, GraphCase]:
    """Return the kept cases of a family, by file name."""
    folder = REGRESSIONS / name.replace(" ", "_")
    return {
        p.stem: GraphCase.from_json(json.loads(p.read_text()))
        for p in sorted(folder.glob("*.json"))
    }


@dataclass(frozen=True, slots=True)
class DifferentialCampaign:
    """The variants that are to be tried. ``chosen`` as of :func:`select`."""

    servers: Servers
    profile: str
    seed: int
    chosen: dict[str, list[str]]

    def run(self, jobs: int = 1) -> Iterator[tuple[str, FamilyTally]]:
        """Yield tallies of families as they come in, several of one family where jobs share it."""
        names = sorted(self.chosen, key=lambda n: -FAMILIES[n].examples * len(self.chosen[n]))
        if jobs < 2:
            with CampaignWorker(self) as worker:
                for name in names:
                    yield name, worker.family(name)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawn, _start_worker, (self,)) as pool:
            futures = {pool.submit(_family, n): n for n in names}
            for future in as_completed(futures):
                yield futures[future], future.result()


class CampaignWorker:
    """One process's part of a campaign: its own connections, its own started servers."""

    def __init__(self, campaign: DifferentialCampaign) -> None:
        self._campaign = campaign
        self._endpoints = (campaign.servers.tested(), campaign.servers.reference())
        self._judge = Judge(*self._endpoints, flushes=campaign.servers.flushes)

    def __enter__(self) -> CampaignWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._judge.close()
        for endpoint in self._endpoints:
            endpoint.close()

    def family(self, name: str) -> FamilyTally:
        """Try regressions first, then every chosen variant."""
        total = FamilyTally()
        for stem, case in regressions(name).items():
            total.add(self._regression(name, stem, case))
        family, wanted = FAMILIES[name], self._campaign.chosen[name]
        share = PROFILES[self._campaign.profile]
        budget = max(1, round(family.examples * share))
        # A short run tries each variant still, unless there are very many of them.
        skip = 1
        if family.examples * share < 1:
            skip = max(1, round(1 / (family.examples * share) / 4))
        turn = self._campaign.seed % skip
        for variant in itertools.islice(family.variants, turn, None, skip):
            if label(variant) in wanted:
                seed = zlib.crc32(f"{self._campaign.seed} {name} {label(variant)}".encode())
                total.add(self._judge.explore(family, variant, budget, seed))
        return total

    def _regression(self, name: str, stem: str, case: GraphCase) -> FamilyTally:
        tally = FamilyTally(cases=1, keys={case.key()})
        try:
            refusal = self._judge.judge(case)
        except Mismatch as error:
            tally.findings.append(Difference(name, f"regression {stem}", case, str(error)))
            return tally
        if refusal:
            tally.refused, tally.reasons[refusal] = 1, 1
        return tally


_worker: CampaignWorker | None = None


def _start_worker(campaign: DifferentialCampaign) -> None:
    import atexit

    global _worker
    _worker = CampaignWorker(campaign)
    atexit.register(_worker.__exit__)


def _family(name: str) -> FamilyTally:
    assert _worker is not None
    return _worker.family(name)
