"""What must hold for anything that is sent: random messages, sessions of requests, graphs.

    python -m conformance.properties --endpoint localhost:50052 --profile nightly

Of whoever reads and writes the wire format: ``messages`` draws every message of every protocol
version, ``codecs`` has the properties, to be held against any reader.

Of a live server (``properties`` is their table): ``steps`` draws what clients do to a server's
memory, ``memory`` is the model of that memory, ``session`` does the one and compares with the
other. ``programs`` draws graphs of many nodes, ``evaluate`` computes their ops with numpy,
``graphs`` judges. ``damage`` sends requests whose bytes were changed.

``search`` looks for a value that breaks a property, ``reduce`` makes it smaller, ``findings``
prints, keeps and repeats it.
"""
