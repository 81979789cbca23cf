"""Coverage-guided fuzzing of everything that reads bytes off the wire.

    python -m tests.fuzz --help

A target (``targets.py``) takes any bytes and fails by any exception that isn't a declared refusal.
``streams.py`` has those of the two readers, ``graphs.py`` those of graphs and programs;
``damage.py`` changes inputs with their structure in mind; ``seeds.py`` makes valid ones. What found
new paths or a fault is kept in ``corpus/``, and run with all other tests.
"""
