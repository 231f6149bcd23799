"""Analysis of the GPU kernels without a GPU: machine code, launches, bytes and modelled times.

``python -m benchmarks.offline.triton`` and ``python -m benchmarks.offline.cuda`` compile the kernels and check their
machine code; ``python -m benchmarks.offline.tables`` writes the counted and modelled tables of docs/gpu_model.md.
"""
