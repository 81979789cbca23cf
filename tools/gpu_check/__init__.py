"""Checks the CUDA device on a real card and measures it: ``python -m tools.gpu_check``."""
