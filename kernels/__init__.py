"""Triton kernels of trmfast, imported as ``trmfast.kernels``.

Importing this package imports no triton: a kernel module does that itself, when its backend is first used, so the
package can be installed and inspected on a machine that has none.
"""
