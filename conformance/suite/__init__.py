"""Cases that a server of the ggml RPC wire format is held against, one rule each.

A case speaks to the server over connections of its own, in the server's dialect, and ends in a
verdict: it returns (pass), or calls ``c.fail``, ``c.differs`` (the protocol leaves it open, and the
server does it otherwise than it had better) or ``c.skip``. Everything that goes over its
connections is recorded for the report.

Cases are in ``conformance/cases/NAME.py``, any number of modules; each is found by being there.
A module takes its groups from ``conformance.cases.groups``::

    from conformance.cases.groups import BUFFERS
    from conformance.suite import Context
    from protocol.commands import Command

    @BUFFERS.case(
        3,                                   # 3.3: never renumber, take the next free one
        source="ggml-rpc.cpp rpc_server::buffer_get_base, since protocol 1.0",
        needs=(Command.BUFFER_GET_BASE,),    # commands that the dialect must have
    )
    def base_stays(c: Context) -> None:      # named 'base-stays'
        '''The client asks once and keeps the answer.

        Sends: BUFFER_GET_BASE twice
        Expects: the same address
        '''
        buffer = (peer := c.connect()).alloc(64)
        again = peer.call(Command.BUFFER_GET_BASE, remote_ptr=buffer.handle).base_ptr
        c.equal(again, buffer.base, "the second base")

What a server must not serve is a row of a table, see ``refusals``.

Further options: ``hostile=True`` (only on servers that the suite started, or with --hostile; checks
other clients and the server's life after it), ``devices=2`` (skipped on servers with fewer),
``concurrent=True`` (skipped where one client is served at a time), ``cache=True`` (skipped without
a tensor cache), ``split=True`` (skipped without the split extension; ``c.connect(split=True)`` then
asks for it), ``deadline=60.0`` seconds for the whole case.

What a case has (``Context``):

* ``c.dialect``, ``c.facts`` (devices, alignment, whether clients are served concurrently, cache);
* ``c.connect()``: a ``Peer`` after HELLO; ``c.connect(hello=False)``: a bare connection;
* ``c.equal(actual, expected, what)``, ``c.expect(condition, message)``;
* ``c.refused(peer, command=None, differs=None)``: what was sent last must end the connection. If
  the server goes on, the case fails, or differs when ``differs`` says why that is allowed.
* ``c.seed``: of random cases.

A ``Peer``:

* ``call(command, body=b"", **fields)``: request and answer (Message, bytes, None). Fields that are
  left out of ``device``, ``offset``, ``value``, ``cache_flag``, ``srcs``, ``conn_caps`` are 0;
* ``send(command, body=b"", **fields)``, ``answer(command)``, ``send_bytes(data)``,
  ``outcome(command)`` (closed, or what it answered; decides by a request behind it), ``ping()``,
  ``closed_by_server()``, ``half_close()``, ``close()``;
* ``alloc(size, device=0)``: a ``RemoteBuffer``; ``set(tensor, data, offset=0)``,
  ``get(tensor, size, offset=0)``; ``compute(nodes, leaves, device=0)`` of tensors as field dicts;
  ``send(Command.GRAPH_COMPUTE, payload)`` for a graph from ``client.builder.graph.GraphBuilder``;
* a server that hangs up, answers with another size or not at all within the deadline makes the
  case fail by itself (``Closed``, ``Malformed``, ``NoAnswer``); catch them to judge otherwise.

``RemoteBuffer.leaf(id, ne, at=0, type=F32, **fields)`` and ``.node(id, ne, op, *src, at=0, ...)``
make the fields of tensors in it, ``.whole()`` one that covers it.

From the outside: ``target`` is the server under test (an address, or a command that starts it),
``probe`` finds out what it is, ``runner`` runs cases and watches that it lives; ``reports`` shows.
"""

from conformance.suite.context import Context, Facts
from conformance.suite.errors import Closed, Malformed, NoAnswer
from conformance.suite.peer import Outcome, Peer
from conformance.suite.registry import Case, Group
from conformance.suite.tensors import RemoteBuffer, tensor

__all__ = [
    "Case",
    "Closed",
    "Context",
    "Facts",
    "Group",
    "Malformed",
    "NoAnswer",
    "Outcome",
    "Peer",
    "RemoteBuffer",
    "tensor",
]
