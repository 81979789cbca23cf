"""Many clients at once on one server, among them bad ones: is each served, and all given back?

python -m tools.load --help
"""
