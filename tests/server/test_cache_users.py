"""Whose clients the files of the cache are for."""

from __future__ import annotations

import random

import pytest

from rpc_server.cache import users
from rpc_server.cache.users import SMALL, CacheUsers


def test_sums_are_those_of_the_files(seed: int) -> None:
    """Whatever is used, forgotten and found gone, in any order."""
    rng = random.Random(seed)
    known, model = CacheUsers(), dict[str, tuple[str, int]]()
    for _ in range(3000):
        name, user = f"{rng.randrange(40):016x}", f"10.0.0.{rng.randrange(3)}"
        match rng.randrange(8):
            case 0:
                known.forget(name)
                model.pop(name, None)
            case 1:
                left = set(rng.sample(sorted(model), len(model) // 2))
                known.keep_only(left)
                model = {name: model[name] for name in left}
            case _:
                size = rng.choice([1, 100, SMALL - 1, SMALL, 5 * SMALL])
                known.used(name, size, user)
                model[name] = user, size
        assert known.of(name) == model.get(name, (None, 0))[0]
        for user in ("10.0.0.0", "10.0.0.1", "10.0.0.2"):
            sizes = [size for whose, size in model.values() if whose == user]
            assert known.nbytes(user) == sum(sizes)
            assert known.small(user) == sum(size < SMALL for size in sizes)
        assert known.most() == max(map(known.nbytes, ("10.0.0.0", "10.0.0.1", "10.0.0.2")))


def test_the_files_used_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_MOST_FILES", 3)
    known = CacheUsers()
    for name in "abcab":
        known.used(name, 1, "10.0.0.1")
    known.used("d", 1, "10.0.0.1")
    assert [known.of(name) for name in "abcd"] == ["10.0.0.1", "10.0.0.1", None, "10.0.0.1"]
    assert known.nbytes("10.0.0.1") == 3
