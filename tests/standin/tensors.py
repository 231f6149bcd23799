"""Tensors of a stand-in device: a tensor of the CPU and a block of memory; operations go to the device's stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from standin.memory import Block, HazardError

if TYPE_CHECKING:
    from standin.runtime import Runtime

__all__ = ["DeviceMode", "DeviceTensor", "unwrap"]

aten = torch.ops.aten
# They hand a value to the host, which waits for it.
READ_BY_HOST = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
# PyTorch makes them itself, where it takes a tensor of the stand-in for one of ``meta``: numbers, and absent gradients.
MADE_BESIDE = (aten.scalar_tensor.default, aten.zeros.default)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class DeviceTensor(Tensor):
    """To PyTorch a tensor of the device ``meta``, which autograd and the operators treat like any other.

    Attributes:
        inner: the tensor of the CPU with its values.
        block: the memory.
    """

    runtime: ClassVar[Runtime]
    inner: Tensor  # type: ignore[assignment]
    block: Block

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
        )
        tensor.inner, tensor.block = inner, block
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return cls.runtime.dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.block.device)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return self.block.device

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def record_stream(self, stream: Any) -> None:
        raise HazardError("record_stream: the stand-in has none")


class DeviceMode(TorchDispatchMode):
    """Catches what makes tensors: factories with ``device="cuda:i"``."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.runtime.dispatch(func, args, kwargs or {})


def unwrap(value: Any) -> Any:
    """The tensor of the CPU inside of a tensor of a device."""
    return value.inner if isinstance(value, DeviceTensor) else value


class Operation:
    """One call of an ATen operator with at least one tensor of a device among its arguments or results."""

    def __init__(self, runtime: Runtime, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.runtime, self.func = runtime, func
        self.accesses: list[tuple[Block, bool, bool]] = []
        self.index: int | None = None
        self.to_host = self.from_host = False
        schema = func._schema.arguments
        named = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
        for argument, value in named:
            write = argument.alias_info is not None and argument.alias_info.is_write
            tree_map(lambda v, w=write: self._take(v, w), value)
        self.writes = any(write for _, _, write in self.accesses)
        asked = kwargs.get("device")
        if asked is not None:
            asked = torch.device(asked)
            self.to_host |= asked.type == "cpu" and self.index is not None
            if asked.type == "cuda":
                self.index = runtime.index(asked)
        self.args = tree_map(unwrap, args)
        self.kwargs = {k: unwrap_device(k, tree_map(unwrap, v)) for k, v in kwargs.items()}

    def _take(self, value: Any, write: bool) -> None:
        if isinstance(value, DeviceTensor):
            if self.index not in (None, value.block.device) and value.dim():
                raise HazardError(f"{self.func}: its tensors lie on cuda:{self.index} and on cuda:{value.block.device}")
            if write and value.block.inference and not torch.is_inference_mode_enabled():
                # PyTorch checks it in a layer above the one that calls the stand-in.
                raise RuntimeError(f"{self.func}: Inplace update to inference tensor outside InferenceMode")
            self.index = value.block.device
            self.accesses.append((value.block, not write, write))
        elif isinstance(value, Tensor):
            self.to_host |= write
            self.from_host = self.func._opname in ("copy_", "_to_copy")

    def run(self) -> Any:
        """Calls the operator on the tensors of the CPU, outside of inference mode: that is the device tensors'."""
        with torch.inference_mode(False), torch.no_grad():
            return self.func(*self.args, **self.kwargs)


def unwrap_device(name: str, value: Any) -> Any:
    """A device becomes the CPU, whose memory is not pinned."""
    return torch.device("cpu") if name == "device" and value is not None else None if name == "pin_memory" else value
