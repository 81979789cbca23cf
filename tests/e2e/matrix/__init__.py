"""llama.cpp's programs over arrangements of servers: each answers as it does without them.

python -m tests.e2e.matrix               # all combinations
python -m tests.e2e.matrix --list        # only what they are, and what is left out and why
python -m tests.e2e.matrix --only 3,17   # some of them, by their numbers
"""
