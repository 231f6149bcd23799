"""Runs launches with a zone of NaN around every buffer, on the GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.dot import INTERPRETED
from trmfast.kernels.plan import Buffer, Launch, run

__all__ = ["DEVICE", "INTERPRETED", "guarded_run"]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

_ROWS = 160  # of the last axis on either side, more than the largest tile has
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def guarded_run(launches: Iterable[Launch], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs launches over buffers that lie between zones of NaN, those without an input filled with NaN themselves.

    A read outside of a buffer brings NaN into results.  A write outside, a write to a buffer that is only read, and a
    written buffer that holds NaN raise.

    Args:
        launches: what to run, in order; any iterable of launches, a :class:`Plan` too.
        inputs: the contents of buffers by name, in the buffer's dtype; of a whole buffer where launches use pieces.

    Returns:
        The buffers by name, in the shape of the input or else of the largest piece that starts at the buffer's first
        element, on ``DEVICE``.

    Raises:
        AssertionError: naming the buffer.
    """
    launches = list(launches)
    pieces = [piece for launch in launches for piece in launch.buffers((*launch.reads, *launch.writes))]
    written = {piece for launch in launches for piece in launch.buffers(launch.writes)}
    unknown = set(inputs) - {piece.name for piece in pieces}
    assert not unknown, f"inputs that no launch uses: {', '.join(sorted(unknown))}"

    whole: dict[str, Tensor] = {}
    zones: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(piece.name for piece in pieces):
        same = [piece for piece in pieces if piece.name == name]
        dtypes = {piece.dtype for piece in same}
        assert len(dtypes) == 1, f"{name}: its pieces are of {dtypes}"
        shapes[name] = _shape(same, inputs.get(name))
        whole[name], zones[name] = _allocate(shapes[name], dtypes.pop(), inputs.get(name))
    constant = {name: whole[name].clone() for name in whole if name not in {piece.name for piece in written}}

    run(launches, whole)

    for name, (before, after) in zones.items():
        for place, zone in (("before", before), ("after", after)):
            assert _is_poison(zone), f"{name}: something was written {place} it"
    for name, copy in constant.items():
        bits = _SAME_SIZE[copy.element_size()]
        assert torch.equal(whole[name].view(bits), copy.view(bits)), f"{name}: is only read, and was written"
    for piece in written:
        found = piece.of(whole[piece.name])
        if found.is_floating_point():
            count = int(found.isnan().sum())
            assert count == 0, f"{piece.name}{list(piece.shape)}: {count} of {found.numel()} elements are NaN"
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


def _shape(pieces: list[Buffer], given: Tensor | None) -> tuple[int, ...]:
    size = max(piece.offset + piece.numel for piece in pieces)
    if given is not None:
        name = pieces[0].name
        assert given.dtype == pieces[0].dtype, f"{name}: got {given.dtype}, the launches take {pieces[0].dtype}"
        assert given.numel() >= size, f"{name}: got {given.numel()} elements, the launches use {size}"
        return tuple(given.shape)
    covering = [piece.shape for piece in pieces if piece.offset == 0 and piece.numel == size]
    return covering[0] if covering else (size,)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, given: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A flat tensor at a multiple of 256 bytes, and the poisoned zones on either side of it."""
    zone = -(-_ROWS * (shape[-1] if shape else 1) // 256) * 256
    size = prod(shape)
    allocation = torch.full((2 * zone + size,), _poison(dtype), dtype=dtype, device=DEVICE)
    whole = allocation[zone : zone + size]
    if given is not None:
        whole.copy_(given.reshape(-1))
    return whole, (allocation[:zone], allocation[zone + size :])


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _is_poison(zone: Tensor) -> bool:
    bits = _SAME_SIZE[zone.element_size()]
    return torch.equal(zone.view(bits), torch.full_like(zone, _poison(zone.dtype)).view(bits))
