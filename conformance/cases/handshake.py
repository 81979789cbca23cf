"""1: HELLO, versions, and what comes instead of them."""

from __future__ import annotations

from conformance.cases.groups import HANDSHAKE
from conformance.suite import Closed, Context, Peer
from conformance.suite.context import accepts
from conformance.suite.refusals import Refusal, declare, hung_up
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.messages import CONN_CAPS_SIZE, fixed_size

_UNANSWERED = "the connection is closed without an answer"
_SERVE = "ggml-rpc.cpp rpc_serve_client"
# Sizes of a HELLO that no version of llama.cpp sends.
_ODD_SIZES = (1, 8, 23, 25, 1000)


@HANDSHAKE.case(
    1, source="ggml-rpc.cpp negotiate_hello (check_server_version up to 3.x), since 1.0"
)
def version_is_accepted(c: Context) -> None:
    """A client closes the connection when the major number is another or the minor one newer.

    Sends: HELLO
    Expects: an answer with the major number of the client's protocol and no newer minor number
    """
    peer = c.connect()
    c.expect(accepts(c.dialect, peer.version), f"the answer is {peer.version}")


@HANDSHAKE.case(2, source="ggml-rpc.cpp rpc_msg_hello_rsp, 1.0 and 4.0")
def answer_has_its_size(c: Context) -> None:
    """The client reads exactly as many bytes, and takes any other size for a broken server.

    Sends: HELLO
    Expects: 3 bytes up to protocol 3, from 4.0 on 28: version, a zero byte, 24 of capabilities
    """
    peer = c.connect(hello=False)
    peer.send(Command.HELLO)
    size = len(peer.read_answer("HELLO"))
    peer.ping()
    c.equal(size, fixed_size(c.dialect.commands[Command.HELLO].response), "the answer's size")


@HANDSHAKE.case(
    3, source="ggml-rpc.cpp rpc_serve_client (rsp = {}), transport.cpp get_caps, since 4.0"
)
def unused_bytes_are_zero(c: Context) -> None:
    """Later versions give such bytes a meaning; what is not set must not be what was there.

    Sends: HELLO with 24 zero bytes of capabilities: a client with nothing but TCP
    Expects: a zero padding byte; zero capabilities, unless the server has another transport
    """
    if not c.dialect.hello_size:
        c.skip("HELLO has no capabilities before protocol 4.0")
    peer = c.connect(hello=False)
    peer.send(Command.HELLO)
    answer = peer.read_answer("HELLO")
    peer.ping()
    c.equal(answer[3], 0, "the padding byte")
    if any(answer[4:]):
        c.differs(f"capabilities {answer[4:].hex()}: the server offers another transport")


@HANDSHAKE.case(4, source="transport.cpp socket_t::update_caps, since 4.0")
def unknown_capabilities_are_ignored(c: Context) -> None:
    """Capabilities are how later transports will be announced: one that isn't known is no error.

    Sends: HELLO with capability bytes that mean nothing (all 0x5a), then a request
    Expects: the connection stays on TCP and the request is answered
    """
    if not c.dialect.hello_size:
        c.skip("HELLO has no capabilities before protocol 4.0")
    peer = c.connect(hello=False)
    peer.hello(b"\x5a" * CONN_CAPS_SIZE)
    peer.ping()


_FIRST = "'Expected HELLO command'"
declare(
    HANDSHAKE,
    [
        Refusal(
            5, "second-hello", "HELLO, and HELLO again on the same connection",
            lambda c, peer: peer.send(Command.HELLO), Command.HELLO,
            "The version is agreed on once; a client that starts over has lost its place.",
            f"{_SERVE}, case RPC_CMD_HELLO, since 1.0", "it lets a client say HELLO twice",
        ),
    ],
)  # fmt: skip
declare(
    HANDSHAKE,
    [
        Refusal(
            6, "question-before-hello", "GET_ALIGNMENT as the first message",
            lambda c, peer: peer.send(Command.GET_ALIGNMENT), Command.GET_ALIGNMENT,
            "Without HELLO nobody knows what the other's messages look like.",
        ),
        Refusal(
            7, "allocation-before-hello",
            "ALLOC_BUFFER as the first message: a client from before protocol 1.0",
            lambda c, peer: peer.send(Command.ALLOC_BUFFER, size=64), Command.ALLOC_BUFFER,
            "Clients without HELLO have other structures: what they ask for must not be guessed.",
        ),
    ],
    expects=_UNANSWERED,
    source=f"{_SERVE} ({_FIRST}), since 1.0",
    hello=False,
)  # fmt: skip
declare(
    HANDSHAKE,
    [
        Refusal(
            8, "http-request", "GET / HTTP/1.1 and headers",
            lambda c, peer: peer.send_bytes(
                b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            ),
            None, "Browsers and scanners come by; 'G' is no command.",
        ),
        Refusal(
            9, "tls-handshake", "the start of a TLS handshake",
            lambda c, peer: peer.send_bytes(
                bytes.fromhex("16030100c8010000c40303") + bytes(190)
            ),
            None, "A client that expects TLS waits for an answer: closing tells it there is none.",
        ),
        *(
            Refusal(
                number, f"hello-of-{size}-bytes", f"HELLO with {size} bytes of payload",
                lambda c, peer, size=size: peer.send_frame(Command.HELLO, bytes(size)),  # type: ignore[misc]
                None, "No version has such a HELLO; forks have, and other messages as well.",
                f"{_SERVE} ('HELLO request size mismatch'), since 1.0",
            )
            for number, size in enumerate(_ODD_SIZES, 10)
        ),
        Refusal(
            15, "hello-of-absurd-size", "a HELLO that claims to have 2^62 bytes, and 24 of them",
            lambda c, peer: peer.send_frame(
                Command.HELLO, bytes(CONN_CAPS_SIZE), size=1 << 62
            ),
            None, "A size off the wire is no reason to reserve or to wait for as much.",
            f"{_SERVE} ('HELLO request size mismatch'), since 1.0",
        ),
    ],
    expects=_UNANSWERED,
    source=f"{_SERVE} ({_FIRST}), since 1.0",
    judge=hung_up,
    hello=False,
)  # fmt: skip


@HANDSHAKE.case(16, source=f"{_SERVE} ('client needs upgrade'), since 4.0", hostile=True)
def hello_of_another_age(c: Context) -> None:
    """A server may speak several protocols; what it must not do is answer in the wrong one.

    Sends: HELLO of the other kind: empty to a server of 4.0 or later, 24 bytes to an older one
    Expects: the connection is closed, or the answer is of that kind and a version of it
    """
    others = [d for d in DIALECTS if d.hello_size != c.dialect.hello_size]
    peer = c.connect(hello=False, dialect=others[0])
    peer.send_frame(Command.HELLO, bytes(others[0].hello_size))
    try:
        answer = peer.read_answer("HELLO")
    except Closed:
        return
    reader = codec(others[0].commands[Command.HELLO].response)
    c.equal(len(answer), reader.size, "the answer's size")
    record = reader.parse(answer)
    theirs = (record.major, record.minor, record.patch)
    spoken = next((d for d in others if accepts(d, theirs)), None)
    c.expect(spoken is not None, f"version {theirs} has another HELLO than was sent")
    assert spoken is not None
    peer.speak(spoken)
    peer.ping()


@HANDSHAKE.case(
    17, source="transport.cpp recv_data: a message is what its size says, however it arrives"
)
def hello_in_single_bytes(c: Context) -> None:
    """TCP has no messages; a server that takes one read for one message works by luck.

    Sends: HELLO byte by byte, each in a segment of its own
    Expects: the answer to HELLO
    """
    peer = c.connect(hello=False)
    for i, byte in enumerate(peer.message(Command.HELLO)):
        peer.send_bytes(bytes([byte]), more=i > 0, command="HELLO")
    peer.answer(Command.HELLO)
    peer.ping()


@HANDSHAKE.case(18, source="transport.cpp recv_data, since 1.0")
def request_right_behind_hello(c: Context) -> None:
    """What arrives together with HELLO belongs to the connection as what comes later does.

    Sends: HELLO and GET_ALIGNMENT in one segment
    Expects: both answers, in this order
    """
    peer = c.connect(hello=False)
    joined = peer.message(Command.HELLO) + peer.message(Command.GET_ALIGNMENT)
    peer.send_bytes(joined, command="HELLO")
    peer.answer(Command.HELLO)
    peer.answer(Command.GET_ALIGNMENT)


@HANDSHAKE.case(19, source=f"{_SERVE}, since 1.0", hostile=True)
def half_closed_after_hello(c: Context) -> None:
    """A client may have said all it wants to; the answer is still due.

    Sends: HELLO, then the end of the stream (the client only reads from there on)
    Expects: the answer to HELLO, then the end of the connection
    """
    peer = c.connect(hello=False)
    peer.send(Command.HELLO)
    peer.half_close()
    peer.answer(Command.HELLO)
    c.expect(peer.closed_by_server(), "the connection stays open")


@HANDSHAKE.case(20, source=f"{_SERVE}: the first recv_data fails, since 1.0", hostile=True)
def connection_without_a_byte(c: Context) -> None:
    """Port scans and health checks do this all day.

    Sends: a connection that is closed right after it was made
    Expects: the next client is served
    """
    for _ in range(3):
        c.connect(hello=False).close()
    c.connect()


@HANDSHAKE.case(
    27,
    source="transport.cpp socket_t::impl::send_data: the peer may be gone, since 1.0",
    hostile=True,
)
def reset_after_hello(c: Context) -> None:
    """A reset ends both directions at once, whatever the server is about to do.

    Sends: HELLO, and the client resets the connection without reading the answer
    Expects: the next client is served
    """
    peer = c.connect(hello=False)
    peer.send(Command.HELLO)
    peer.reset()
    c.connect()


def _declare_cut(number: int, size: int, name: str) -> None:
    sends = f"the first {size} bytes of HELLO, then the end of the connection"
    source = f"{_SERVE}: recv_data fails, since 1.0"

    @HANDSHAKE.case(number, name=f"hello-cut-{name}", sends=sends, source=source, hostile=True)
    def check(c: Context) -> None:
        """A network that fails within HELLO must cost that connection only.

        Expects: the next client is served
        """
        peer = c.connect(hello=False)
        peer.send_bytes(peer.message(Command.HELLO)[:size], command="HELLO")
        peer.close()
        c.connect()


_declare_cut(22, 1, "behind-its-command")
_declare_cut(23, 5, "within-its-size")
_declare_cut(24, 8, "before-its-payload")


@HANDSHAKE.case(25, source="ggml-rpc.cpp rpc_server::hello, since 1.0")
def version_is_the_same_each_time(c: Context) -> None:
    """llama.cpp connects several times in a run, and ends if one connection is refused.

    Sends: HELLO on two connections, one after the other, by clients that go on
    Expects: the same version both times
    """

    def version(peer: Peer) -> tuple[int, int, int]:
        found = peer.version
        peer.close()
        return found

    first = version(c.connect())
    c.equal(version(c.connect()), first, "the second answer")


@HANDSHAKE.case(26, source="ggml-rpc.h RPC_PROTO_*_VERSION of llama.cpp's releases")
def version_is_known(c: Context) -> None:
    """A version that llama.cpp never had promises structures that nobody knows.

    Sends: HELLO
    Expects: a version that is known
    """
    peer = c.connect()
    known = {d.version[:2] for d in DIALECTS}
    # These minor numbers changed nothing that a server would notice.
    known |= {(3, n) for n in range(1, 5)}
    if peer.version[:2] not in known:
        c.differs(f"version {'.'.join(map(str, peer.version))} is not one of llama.cpp's")


@HANDSHAKE.case(
    28,
    source="ggml-rpc.cpp rpc_server::hello; since 6.0 clients connect to give back what they had",
    hostile=True,
)
def hang_ups_change_nothing(c: Context) -> None:
    """A dry run, a device without layers and a monitor's probe all say HELLO and close.

    Sends: a request on one connection, HELLO and nothing more on nine, and HELLO again
    Expects: the version that the first client went on with
    """
    peer = c.connect()
    served = peer.version
    peer.close()
    for _ in range(9):
        other = c.connect(hello=False)
        other.hello()
        other.close()
    again = c.connect(hello=False)
    c.equal(again.hello(), served, "the version for the next client")
