"""Random valid graphs with every tensor next to a page that nobody may touch.

python -m tests.guard --help
"""
