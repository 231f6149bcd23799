"""Ctrl-C in the middle of a call: all threads leave the engine, KeyboardInterrupt is raised, the next call is right."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from trmfast.backends import BACKENDS

_reason = BACKENDS["cpu"].available()
pytestmark = [
    pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}"),
    pytest.mark.skipif(sys.platform == "win32", reason="it sends signals to a process"),
]

# Of the CPU time of the process, which no neighbour takes: 0.3 s of two threads.
MOST_SECONDS = 0.6
# Updates, sequences, tokens, token mixer; about 100 GFLOP forward each, twice the time between two looks at the signals
# at 1 TFLOP/s.  Two threads: of an odd number of sequences a team shares one, and of a single one every phase.
DEPTHS = [(2, 57, 1024, "attention"), (21, 111, 97, "mlp_t"), (210, 11, 97, "attention"), (6300, 1, 32, "attention")]

PREPARE = """
import json, signal, sys, threading, time, types
import torch, trmfast
from trmfast.backends import cpu
from trmfast.cases import make_case, make_inputs

torch.set_num_threads(2)

def prepare(updates, batch, length, mixer, dtype=torch.float32):
    case = make_case(
        "deep", "urm", H_cycles=1, L_cycles=updates, window="all", batch=batch, length=length, hidden_size=128,
        num_heads=2, intermediate_size=384, num_layers=1, token_mixer=mixer,
    )
    inputs = make_inputs(case, dtype)
    weights = [weight.requires_grad_() for weight in inputs.weights]

    def forward():
        return trmfast.recursion(
            case.problem.program, case.problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin,
            backend="cpu",
        )

    return inputs, weights, forward

armed = threading.Event()
signal.signal(signal.SIGALRM, signal.default_int_handler)

def entering(function):
    def enter(*arguments):
        if armed.is_set():
            armed.clear()
            # The kernel sends it, so no thread of this process has to find a core in time.
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        return function(*arguments)
    return enter

# The signal comes 0.02 s after the call has entered the engine.
engine = dict(vars(cpu._cpu))
cpu._cpu = types.SimpleNamespace(**engine)
cpu._cpu.forward, cpu._cpu.backward = entering(engine["forward"]), entering(engine["backward"])
"""

INTERRUPT = (
    PREPARE
    + """
def seconds_to_interrupt(call):
    armed.set()
    start = time.process_time()
    try:
        call()
    except KeyboardInterrupt:
        return time.process_time() - start
    raise AssertionError("the call ended")

def small_gradients():
    inputs, weights, forward = prepare(3, 3, 16, "attention")
    return torch.autograd.grad(forward(), weights, inputs.grad_states)

expected = small_gradients()
times = []
for depth in json.loads(sys.argv[1]):
    inputs, weights, forward = prepare(*depth)
    times.append(seconds_to_interrupt(forward))
    outputs = forward()
    backward = lambda: torch.autograd.grad(outputs, weights, inputs.grad_states, retain_graph=True)
    times.append(seconds_to_interrupt(backward))
    for gradient, right in zip(small_gradients(), expected, strict=True):
        assert torch.equal(gradient, right), "the call after it is wrong"
print(json.dumps(times))
"""
)

HANDLED = (
    PREPARE
    + """
inputs, weights, forward = prepare(210, 15, 97, "attention")
with torch.no_grad():
    expected = forward()[0]
    handled = []
    signal.signal(signal.SIGALRM, lambda *_: handled.append(time.process_time()))
    armed.set()
    start = time.process_time()
    output, end = forward()[0], time.process_time()
    assert torch.equal(output, expected)
    during = bool(handled) and handled[0] < end - (end - start) / 4

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    results, finished = [], threading.Event()
    def work():
        with torch.no_grad():
            results.append(forward()[0])
        finished.set()
    threading.Thread(target=work).start()
    armed.set()
    try:
        finished.wait()
        interrupted = False
    except KeyboardInterrupt:
        interrupted = not results
    finished.wait()
print(json.dumps([during, interrupted, torch.equal(results[0], expected)]))
"""
)

MULTIPLIES = (
    PREPARE
    + """
torch.set_num_threads(1)
inputs, weights, forward = prepare(210, 4, 97, "attention", torch.bfloat16)
expected = forward()[0]
square, handled = torch.ones(64, 64, dtype=torch.bfloat16), []
signal.signal(signal.SIGALRM, lambda *_: handled.append(square @ square))
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
outputs = [forward()[0] for _ in range(3)]
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([bool(handled), all(torch.equal(output, expected) for output in outputs)]))
"""
)


def run(program: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.representative(when=lambda depths: depths == DEPTHS[1:2])
@pytest.mark.parametrize("depths", [DEPTHS[1:2], [DEPTHS[0], *DEPTHS[2:]]], ids=["one", "others"])
def test_a_call_is_interrupted_at_any_depth(depths: list[tuple[int, int, int, str]]) -> None:
    times = run(INTERRUPT, json.dumps(depths))
    names = [f"{updates} updates, {way}" for updates, *_ in depths for way in ("forward", "backward")]
    slow = {name: seconds for name, seconds in zip(names, times, strict=True) if seconds > MOST_SECONDS}
    assert not slow


@pytest.mark.breadth
def test_a_handler_that_returns_and_a_call_of_another_thread() -> None:
    """The handler runs during the call, which goes on; a worker's call ends while the main thread is interrupted."""
    assert run(HANDLED) == [True, True, True]


def test_a_handler_that_multiplies_in_bfloat16() -> None:
    """PyTorch's product configures the AMX tiles of the thread, whose own configuration is gone after it."""
    assert run(MULTIPLIES) == [True, True]
