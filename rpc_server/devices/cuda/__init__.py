"""The CUDA device: kernels in CUDA C++, memory and launches through CuPy."""
