"""Addresses as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.endpoint import DEFAULT_PORT, format_endpoint, parse_endpoint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("box", "box", DEFAULT_PORT),
        ("box:1", "box", 1),
        (" box.example:65535 ", "box.example", 65535),
        ("192.168.1.10:50060", "192.168.1.10", 50060),
        ("[::1]", "::1", DEFAULT_PORT),
        ("[::1]:5", "::1", 5),
        ("::1", "::1", DEFAULT_PORT),
        ("::1:50060", "::1", 50060),
        ("1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8", DEFAULT_PORT),
        ("[fe80::1%eth0]:7", "fe80::1%eth0", 7),
    ],
)
def test_what_is_one(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == (host, port)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://box:1", "write box:1, without 'http://'"),
        ("tcp://box:1/", "write box:1, without 'tcp://'"),
        ("https://", "is a URL; write host or host:port"),
        ("box:0", "'0' is not a port"),
        ("box:65536", "'65536' is not a port"),
        ("box:", "'' is not a port"),
        ("box:\u0663", "is not a port"),
        ("box:1/x", "'1/x' is not a port"),
        ("box/x", "is not host or host:port"),
        (":1", "is not host or host:port"),
        ("", "is not host or host:port"),
        ("a b:1", "is not host or host:port"),
        ("me@box:1", "is not host or host:port"),
        ("50052", "has no host; write 127.0.0.1:50052"),
        ("a:b:1", "such an address is in brackets"),
        ("fe80::1:8080", r"write \[fe80::1:8080\] or \[fe80::1\]:8080"),
        ("[box]:1", "is not host or host:port"),
        ("[::1", "no IPv6 address either"),
        ("[::1]x", "no IPv6 address either"),
    ],
)
def test_what_is_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_endpoint(text)


def test_a_port_that_has_to_be_there() -> None:
    assert parse_endpoint("box:1", None) == ("box", 1)
    with pytest.raises(ValueError, match="'box' has no port; write box:50052"):
        parse_endpoint("box", None)
    with pytest.raises(ValueError, match=r"write \[::1\]:50052"):
        parse_endpoint("::1", None)


_HOSTS = (
    st.ip_addresses().map(str)
    | st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z0-9]{1,9}){0,3}", fullmatch=True)
)  # fmt: skip


@given(_HOSTS, st.integers(1, 65535))
def test_what_is_written_is_read(host: str, port: int) -> None:
    assert parse_endpoint(format_endpoint(host, port)) == (host, port)
