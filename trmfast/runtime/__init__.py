"""Solving without PyTorch: NumPy arrays in and out, a file of ``trmfast.save``, the C++ engine.

Nothing here imports PyTorch.  The solving loop is the one of :class:`trmfast.Solver`::

    from trmfast import runtime

    solver = runtime.Solver(runtime.load("sudoku.safetensors"))
    for result in solver.solve(puzzles):  # token ids, integers [N, S]
        print(result.prediction, result.steps, result.confidence)
"""

from trmfast.runtime.model import Model, cores, load
from trmfast.solving import Confident, Never, Puzzle, Result, Solver, Unchanged

__all__ = ["Confident", "Model", "Never", "Puzzle", "Result", "Solver", "Unchanged", "cores", "load"]
