"""Packed weights of the CPU engine, and the fingerprints of the weights that they were packed from."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from trmfast.problem import Problem
from trmfast.targets import extension

__all__ = ["NetShape", "PackedCache", "SeenWeights"]

PACKED_NETS = 16

_cpu = extension


@dataclass(frozen=True)
class NetShape:
    """A network in the engine's own structs."""

    key: str
    block: object  # _cpu.BlockShape
    num_layers: int
    final_norm: bool
    injection: int


@dataclass
class _Packed:
    fingerprint: int
    backward: bool
    weights: object  # _cpu.PackedWeights
    storages: tuple[StorageWeakRef, ...]


class PackedCache:
    """Packed weights by the addresses of the weights, valid for as long as their bytes are the same.

    A version counter would not work: writes through ``p.data`` do not change it.  So every call fingerprints the
    bytes, which costs one read of the weights at memory speed, and packs again when they differ.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[object, ...], _Packed] = OrderedDict()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def get(
        self, target: str, element: str, net: NetShape, weights: list[Tensor], backward: bool, threads: int
    ) -> tuple[int, object]:
        """The fingerprint of the weights of a network, and their pack."""
        assert _cpu is not None
        weights = [weight.contiguous() for weight in weights]
        addresses = [weight.data_ptr() for weight in weights]
        sizes = [weight.nbytes for weight in weights]
        fingerprint = _cpu.fingerprint(addresses, sizes, threads)
        key = (target, element, net.key, *addresses, *[weight.dtype for weight in weights])
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None and entry.fingerprint == fingerprint and (entry.backward or not backward):
                self._entries[key] = entry  # at the end
                return fingerprint, entry.weights
            # Free stale packs first: the new ones take their memory.
            del entry
            for stale in [k for k, e in self._entries.items() if any(s.expired() for s in e.storages)]:
                del self._entries[stale]
        floats = [weight if weight.dtype == torch.float32 else weight.to(torch.float32) for weight in weights]
        packed = _cpu.PackedWeights(
            *(target, element, net.block, net.num_layers, [w.data_ptr() for w in floats]),
            *(backward, threads, net.final_norm, net.injection),
        )
        if _cpu.fingerprint(addresses, sizes, threads) != fingerprint:
            return fingerprint, packed  # another thread wrote meanwhile: don't cache them under this fingerprint
        storages = tuple(StorageWeakRef(weight.untyped_storage()) for weight in weights)
        with self._lock:
            self._entries[key] = _Packed(fingerprint, backward, packed, storages)
            while len(self._entries) > PACKED_NETS:
                self._entries.popitem(last=False)
        return fingerprint, packed


class SeenWeights:
    """Fingerprints of the weights of forward passes, kept as long as what they saved."""

    def __init__(self) -> None:
        # Keyed by the address of a storage: no other storage gets it while a weak reference exists.
        self._entries: dict[int, tuple[StorageWeakRef, list[int]]] = {}

    def note(self, saved: Tensor, fingerprints: list[int]) -> None:
        for key, (storage, _) in list(self._entries.items()):
            if storage.expired():
                self._entries.pop(key, None)
        storage = StorageWeakRef(saved.untyped_storage())
        self._entries[storage.cdata] = (storage, fingerprints)

    def check(self, problem: Problem, saved: Tensor, fingerprints: list[int]) -> None:
        """Raises RuntimeError if the weights have changed; a copy of ``saved``, as hooks make it, is not checked."""
        _, seen = self._entries.get(saved.untyped_storage()._cdata, (None, fingerprints))
        for name, before, now in zip(problem.program.nets, seen, fingerprints, strict=True):
            if before != now:
                raise RuntimeError(
                    f"weights: those of {name} were changed after the forward pass, through .data or in another way "
                    "that no version counter sees, accepted are those of the forward pass; TRMFAST_CHECK_WEIGHTS=0 "
                    "skips the check"
                )
