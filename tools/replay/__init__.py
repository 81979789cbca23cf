"""Sends recorded sessions to a server and compares what it answers with what was recorded.

``rewrite`` translates the recording's handles and addresses to those of the server, ``compare``
says whether two answers are the same, ``links`` knows who was linked to whom, ``live`` is a
connection, ``player`` plays.
"""
