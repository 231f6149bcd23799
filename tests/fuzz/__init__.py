"""A differential fuzzer of the CPU engine and of checkpoints: ``python -m tests.fuzz --seconds 60 --seed 1``.

Random recursions run on random tensors, in variants of a run (instruction set, threads, recompute), and are judged by
the tolerance policy against float64, and by invariants of bits (checks.py).  Damaged checkpoints are loaded and
converted (files.py).  A failure is minimised and printed as a test case, which needs

    from fuzz.damage import FileTrial
    from fuzz.files import examine_file
    from fuzz.judge import examine
    from fuzz.variant import Variant
    from fuzz.trial import Trial

and the fuzzer goes on.  Problem i of a seed is the same on every machine: ``--seed 1 --number i`` runs it alone.

What it leaves out, and why:

* other backends: Triton's interpreter and the emulator of CUDA take seconds a problem; their tests draw by themselves;
* networks whose blocks differ, float16 and float64, more than 8 taps: the engine refuses them, and the reference, which
  runs them, is the judge;
* large sizes: most problems have fewer than 300,000 multiply-adds, so that there are tens of them a second.  Faults of
  size (a full store, many panels) are looked for with stores of a few bytes and with widths just beyond a panel;
* states, x and weights beyond 1e4 times their usual size: scores, gated products and sums of squares overflow, in eager
  PyTorch too (docs/cpu.md); and gradients of 1e20 for float16 weights, whose own gradients are float16;
* norms over one element in bfloat16: their slope is 0 but for a peak of 1 / sqrt(eps) at 0, so that single elements
  decide the error of a case (test_cpu_edges.py compares medians);
* numbers where eager PyTorch itself is off by a tenth: the policy has no verdict, and the engine only has to be finite
  where eager and the truth are;
* NaN and Inf in weights, which rightly reach all sequences, and which elements of a poisoned sequence are NaN;
* programs of more than a few tens of updates, and calls from several threads or forked processes, which have tests of
  their own (test_cpu_threads.py).
"""
