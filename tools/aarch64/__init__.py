"""64-bit ARM on a machine that is none: both servers in emulation, and what they execute.

Times in emulation say nothing, but how many instructions a server executes for a token can be
counted, and so can ours be held against upstream's compiled for the same processor.
"""
