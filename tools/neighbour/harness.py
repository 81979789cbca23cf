"""Puts a victim beside each attack, and says what it noticed and what was left afterwards."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rpc_server.devices.cpu.turns import SLICE
from tools.neighbour.attack import Attack
from tools.neighbour.site import Attacked, started
from tools.neighbour.victim import Noticed, Victim
from tools.serving.processes import PROJECT

log = logging.getLogger(__name__)

# What a victim may notice at most, in seconds.
MOST_HELLO = 0.100
MOST_GRAPH = SLICE + 0.100
# Kernels afterwards, against before.
LEAST_SPEED = 0.7
_SETTLE_SECONDS = 30.0
_SPEED_TRIES = 6
# How long an attack may go on when its time is over.
_GRACE_SECONDS = 45.0
_FAULTS = re.compile(
    # A traceback with its last line, which says what happened.
    r"Traceback[^\n]*\n(?:[ \t][^\n]*\n)*[^\n]*|[^\n]*(?:internal error|never retrieved)[^\n]*"
)


@dataclass(slots=True)
class AttackResult:
    """The outcome of one attack. ``kept`` and ``findings`` are in words."""

    attack: Attack
    noticed: Noticed
    kept: str = ""
    speed: float = 1.0
    attempts: int = 0
    findings: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def faults(self) -> list[str]:
        """The things that must not be, times aside."""
        found = list(self.findings)
        if self.noticed.changed:
            found.append(self.noticed.changed)
        if self.kept:
            found.append(f"kept: {self.kept}")
        return found

    @property
    def delays(self) -> list[str]:
        """Times that are too long."""
        found = []
        if self.noticed.hello > MOST_HELLO:
            found.append(f"HELLO {1e3 * self.noticed.hello:.0f} ms")
        if self.noticed.graph > MOST_GRAPH:
            found.append(f"one node {1e3 * self.noticed.graph:.0f} ms")
        if self.speed < LEAST_SPEED:
            found.append(f"kernels at {self.speed:.2f} of their speed")
        return found

    @property
    def passed(self) -> bool:
        """True if nothing is wrong."""
        return not (self.faults or self.delays)


def run(attacks: Sequence[Attack], seconds: float) -> Iterator[AttackResult]:
    """Try each attack for ``seconds``; a server is started for each kind that they need."""
    for kind in dict.fromkeys(attack.server for attack in attacks):
        waiting = [attack for attack in attacks if attack.server == kind]
        while waiting:
            with started(kind, seconds) as site:
                victim = Victim(site.where.port)
                # So that pools are filled and kernels are there when the first level is taken.
                victim.watch(_never, 0.3)
                victim.speed()
                while waiting and site.process.alive:
                    result = _try(waiting.pop(0), site, victim, seconds)
                    yield result
                    if result.noticed.changed:
                        # On to the next with a new server.
                        break
                victim.close()


def alone(seconds: float) -> Noticed:
    """Return what a victim notices that has no neighbours: what the machine itself does to it."""
    with started("worker", seconds) as site:
        victim = Victim(site.where.port)
        victim.watch(_never, 0.3)
        return victim.watch(_never, seconds)


def _never() -> bool:
    return False


def _try(attack: Attack, site: Attacked, victim: Victim, seconds: float) -> AttackResult:
    if "TLS" in attack.kind and not site.where.tls_port:
        return AttackResult(attack, Noticed(), skipped="needs trustme, to make a certificate")
    before, speed, logged = site.level(), victim.speed(), len(site.process.log)
    command = [sys.executable, "-m", "tools.neighbour.attacker", attack.name, str(seconds)]
    with subprocess.Popen(
        [*command, site.where.encode()], cwd=PROJECT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as attacker:  # fmt: skip
        end = time.monotonic() + seconds + _GRACE_SECONDS
        noticed = victim.watch(lambda: attacker.poll() is None and time.monotonic() < end, seconds)
        if attacker.poll() is None:
            attacker.kill()
        said, problem = attacker.communicate()
    result = AttackResult(attack, noticed)
    try:
        told = json.loads(said)
        result.attempts, result.findings = told["rounds"], told["findings"]
    except ValueError:
        last = problem.strip().splitlines()[-1:] or ["it was ended"]
        result.findings.append(f"the attack itself failed: {last[0]}")
    if not site.process.alive:
        result.findings.append("the server ended")
        return result
    if fault := _FAULTS.search(site.process.log[logged:]):
        result.findings.append(f"the log has: {fault[0].splitlines()[-1]}")
        log.debug("%s: %s", attack.name, fault[0])
    if not noticed.changed:
        result.kept = site.settled(before, _SETTLE_SECONDS).kept(before)
        # What else the machine does passes; what an attack left doesn't.
        result.speed = 0.0
        for _ in range(_SPEED_TRIES):
            result.speed = max(result.speed, speed / victim.speed())
            if result.speed >= LEAST_SPEED:
                break
            time.sleep(0.3)
    return result
