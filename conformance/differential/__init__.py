"""The same graphs on two servers, the results compared: each op against upstream's own.

    python -m conformance.differential --help

``families/`` has a strategy per op that draws graphs: types, shapes, strides, parameters, values.
``sketch`` is what they draw with, ``case`` what they draw, ``runner`` sends a case to a server,
``compare`` judges two results, ``explore`` searches for a case that differs and shrinks it.
Cases that were found once are kept in ``regressions/`` and tried first.
"""
