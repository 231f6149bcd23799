"""What a compiled kernel assumes of its arguments, compared with those of a launch: ``TRMFAST_CHECK_LAUNCHES=1``.

Triton compiles a kernel for the arguments of the launch that first needs it.  Addresses and integers that are multiples
of 16 there are assumed to be; absent buffers and integers that are 1 become constants; on AMD, pointers to less than
2 GiB get 32-bit offsets.  Another launch finds the kernel again by the same facts, and where it did not, wide loads
would fault or read other bytes.  Kernels state no hints of their own (``tl.multiple_of``, ``tl.max_contiguous``), so
this is all that they assume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check", "check_launch"]

_GIB = 1 << 30


def check_launch(
    function: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Checks a launch before it is made; where Triton interprets, nothing is assumed.

    Args:
        function: the ``triton.jit`` function.
        grid: programs along each axis.
        arguments: tensors, and tuples of them, by parameter.
        options: the other arguments, constants and launch options.

    Raises:
        RuntimeError: as :func:`check` does.
    """
    kernel = function.run(grid=grid, warmup=True, **arguments, **options)  # compiled or found, not launched
    if kernel is None:
        return
    given = {**arguments, **options}
    values = [given.get(param.name, param.default) for param in function.params]
    check(kernel.src, values)


def check(source: Any, values: Sequence[Any]) -> int:
    """Compares what a kernel was compiled for with the values of its parameters.

    Args:
        source: what Triton compiled it from, with ``attrs`` and ``constants`` by place among the parameters.
        values: in the order of the parameters.

    Returns:
        How many assumptions were compared.

    Raises:
        RuntimeError: in one line the kernel, the argument, its value and what is assumed of it.
    """
    compared = 0
    for place, attributes in source.attrs.items():
        value = _at(values, place)
        for name, size in attributes:
            compared += 1
            if name == "tt.divisibility":
                number = value.data_ptr() if hasattr(value, "data_ptr") else value
                if number % size != 0:
                    raise _untrue(source, place, number, f"a multiple of {size}")
            elif name == "tt.pointer_range" and size == 32:
                nbytes = value.numel() * value.element_size()
                if nbytes >= 2 * _GIB:
                    raise _untrue(source, place, f"{nbytes} bytes", "less than 2 GiB")
            else:
                raise _untrue(source, place, value, f"{name} = {size}, which is not checked")
    for place, constant in source.constants.items():
        compared += 1
        value = _at(values, place)
        if value != constant:
            raise _untrue(source, place, value, repr(constant))
    return compared


def _at(values: Any, place: Sequence[int]) -> Any:
    for index in place:
        values = values[index]
    return values


def _untrue(source: Any, place: Sequence[int], value: object, assumed: str) -> RuntimeError:
    name = source.fn.arg_names[place[0]] + "".join(f"[{index}]" for index in place[1:])
    return RuntimeError(f"{source.name}: {name} is {value}, the compiled kernel assumes {assumed}")
