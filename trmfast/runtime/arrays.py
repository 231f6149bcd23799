"""Arrays in a compute dtype: float32 as it is, bfloat16, for which NumPy has no type, as its upper 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trmfast.file_format import described, naming, shortened

__all__ = ["narrow", "read", "rounded", "widen"]

STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def narrow(values: np.ndarray, element: str) -> np.ndarray:
    """Float32 values as the engine takes them: float32 for ``"f32"``, uint16 for ``"bf16"``, rounded to nearest
    even."""
    if element == "f32":
        return np.ascontiguousarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    upper = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    # The carry would turn a NaN into infinity.
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper)


def widen(values: np.ndarray) -> np.ndarray:
    """The engine's values, float32 or bfloat16 stored as uint16, in float32."""
    return values if values.dtype == np.float32 else (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray, element: str) -> np.ndarray:
    """Float32 values rounded to a compute dtype."""
    return widen(narrow(values, element))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The tensors of a file of ``trmfast.save`` in float32, and its metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of ``trmfast.save``.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    with naming("path", path):
        content = path.read_bytes()
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        found = deserialize(content)
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a whole safetensors file: {shortened(error)}") from error
    about = described(path, metadata)
    if about is None:
        raise ValueError(f"path: {path} does not say which model it is; accepted are files of trmfast.save")
    return {name: _float32(name, view) for name, view in found}, about


def _float32(name: str, view: dict[str, object]) -> np.ndarray:
    kind, shape, data = view["dtype"], view["shape"], view["data"]
    if kind == "BF16":
        values = widen(np.frombuffer(data, dtype=np.uint16))  # type: ignore[call-overload]
    elif kind in STORED:
        values = np.frombuffer(data, dtype=STORED[str(kind)]).astype(np.float32, copy=False)  # type: ignore[call-overload]
    else:
        raise ValueError(f"{name}: got {kind}, accepted are BF16, {', '.join(STORED)}")
    return values.reshape(shape)  # type: ignore[call-overload]
