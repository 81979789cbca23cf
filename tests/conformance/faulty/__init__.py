"""This project's server with one fault planted in it, to test that the suite finds it.

``python -m tests.conformance.faulty --fault NAME --port N`` starts one; other options are the
server's. What each fault is, and which case has to find it, stands beside it: in ``answers`` (what
is answered), ``memory`` (buffers and bytes), ``graphs`` (what is run), ``framing`` (how requests
are read), ``split`` (programs, and weights that are cut), ``groups`` (members and swaps).
"""
