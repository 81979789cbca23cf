"""Compiled routines: written in Python for numba, compiled by other processes, kept on disk.

The serving process loads machine code and never a compiler: numba and LLVM would take more memory
than a small model. ``library`` finds, loads and asks for routines; ``processes`` runs compilers;
``compiler`` is what they do, ``elf`` lays out their output; ``image`` is the format of the files.
"""
