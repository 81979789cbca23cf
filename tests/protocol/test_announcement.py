"""Records of DNS-SD: what is published, and reading those of anybody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.announcement import (
    SERVICE_TYPE,
    Announcement,
    instance_name,
    reachable,
    shown_name,
)


def test_what_is_published_reads_back() -> None:
    said = Announcement("ggml-rpc-server 0.1.0", "CPU", tls=True)
    pairs = {key.encode(): value.encode() for key, value in said.properties().items()}
    assert Announcement.read(pairs) == said
    # Nothing but what is meant for everybody: no token, no path, no user.
    assert set(pairs) == {b"txtvers", b"software", b"device", b"tls"}


@given(st.dictionaries(st.sampled_from([b"software", b"device", b"tls"]), st.binary() | st.none()))
def test_any_record_can_be_read_and_shown(pairs: dict[bytes, bytes | None]) -> None:
    said = Announcement.read(pairs)
    assert said.software.isprintable()
    assert said.device.isprintable()
    assert len(said.software) <= 64 * 10


@pytest.mark.parametrize("host", ["box", "box.home.arpa", "Bü x", "", "x" * 200, "."])
def test_names_of_services_are_labels(host: str) -> None:
    name = instance_name(host, 65535, 123456789)
    label = name.removesuffix("." + SERVICE_TYPE)
    assert "." not in label
    assert label.isascii()
    assert len(label) <= 63


def test_a_hostile_name_stays_text() -> None:
    told = shown_name("a\x1b[2Jb\nc\u202e" + "x" * 500 + "." + SERVICE_TYPE)
    assert told.isprintable()
    assert "\\x1b" in told
    assert len(told) < 200


@pytest.mark.parametrize(
    ("address", "can_be"),
    [
        ("192.168.1.10", True),
        ("127.0.0.1", True),
        ("fd00::2", True),
        ("224.0.0.251", False),
        ("0.0.0.0", False),
        ("::", False),
        ("ff02::fb", False),
        ("255.255.255.255", False),
        ("192.168.1.255", False),
        ("example.org", False),
    ],
)
def test_addresses_of_one_server(address: str, can_be: bool) -> None:
    assert reachable(address) is can_be
