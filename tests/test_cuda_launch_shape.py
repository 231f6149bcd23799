"""Which instance of the CUDA kernel runs a problem on a device, in which grid; no kernel is run."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil

import pytest
from trmfast.kernels.architectures import ARCHITECTURES, GPUS
from trmfast.kernels.persistent import cache_blocks, stream_rows

from benchmarks.offline.cuda import CUDA_ARCHITECTURES
from simt_recursion import LaunchShape, build, launch_shape, listed_instances
from trmfast.cases import PUBLISHED, Case, make_case

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")

DEVICES = [f"sm_{number}" for number in CUDA_ARCHITECTURES]


@pytest.fixture(scope="module")
def harness() -> ctypes.CDLL:
    """The harness without kernels."""
    return build(shapes_alone=True)


@pytest.mark.parametrize("device", DEVICES)
def test_launch_shapes(harness: ctypes.CDLL, device: str) -> None:
    """The published problems on every architecture: which instance, and that its shared memory fits."""
    shared = ARCHITECTURES[device].block_shared
    rows = set()
    for case in PUBLISHED:
        if case.name == "urm-arc":
            continue
        made = launch_shape(harness, case, device)
        assert isinstance(made, LaunchShape), f"{case}: {made}"
        assert made.shared_bytes <= shared
        assert made.group_blocks * made.instance.row_tiles * 16 >= case.length
        assert made.instance in listed_instances()
        rows.add(made.instance.row_tiles)
    assert rows <= ({1, 2} if shared == 99 << 10 else {1, 2, 4})


def test_every_instance_is_chosen_for_something(harness: ctypes.CDLL) -> None:
    """No row of csrc/cuda/instances.h is left that no architecture would run; all of them are tested above."""
    chosen = set()
    for device in DEVICES:
        for width, length, mixer, batch in itertools.product((128, 512), (97, 916), ("attention", "mlp_t"), (1, 54)):
            case = make_case(
                "some", batch=batch, hidden_size=width, num_heads=width // 64, length=length, token_mixer=mixer
            )
            made = launch_shape(harness, case, device)
            assert isinstance(made, LaunchShape), made
            chosen.add(made.instance)
    assert chosen == set(listed_instances())


def test_constants_of_the_choice() -> None:
    """A100 by its whitepaper: 1024 multiply-adds a clock for 32 two-byte weights, 5120 bytes for 64 of a port."""
    assert (stream_rows(GPUS["A100"]), cache_blocks(GPUS["A100"])) == (32, 80)


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_more_rows_for_more_sequences(harness: ctypes.CDLL, device: str) -> None:
    """Few sequences spread over the device; many share weights between as many rows as fit."""
    few = make_case("few", batch=1, length=97, hidden_size=512, num_heads=8)
    many = make_case("many", batch=768, length=97, hidden_size=512, num_heads=8)
    made = [launch_shape(harness, case, device) for case in (few, many)]
    assert [one.instance.row_tiles for one in made if isinstance(one, LaunchShape)] == [2, 4]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (make_case("conv", "urm", channel_mixer="conv_swiglu"), "channel_mixer: got conv_swiglu"),
        (make_case("wide", hidden_size=528, num_heads=11), "hidden_size: got 528"),
        (make_case("ragged", hidden_size=72, num_heads=2), "hidden_size: got 72"),
        (make_case("head", hidden_size=48, num_heads=8), "head_dim: got 6"),
        (make_case("heads", hidden_size=512, num_heads=64, length=9), "shared memory: a block needs"),
        (make_case("tokens", token_mixer="mlp_t", length=1025, intermediate_size=16), "seq_len: got 1025"),
        (make_case("long", length=1800), "length: 1800 tokens need"),
    ],
    ids=str,
)
def test_refusals(harness: ctypes.CDLL, case: Case, reason: str) -> None:
    made = launch_shape(harness, case, "sm_89", 20)
    assert isinstance(made, str)
    assert made.startswith(reason), made
