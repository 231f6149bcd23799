"""Solving puzzles: halting, continuous batching and trajectories, over any evaluator.  Needs NumPy alone."""

from trmfast.solving.evaluator import Batch, Evaluator, Step
from trmfast.solving.halting import Confident, Halting, Never, Unchanged
from trmfast.solving.puzzle import Puzzle, Result
from trmfast.solving.solver import Solver

__all__ = ["Batch", "Confident", "Evaluator", "Halting", "Never", "Puzzle", "Result", "Solver", "Step", "Unchanged"]
