"""A stand-in for the CUDA runtime under PyTorch: devices in the host's memory, whose blocks have an owner and an end.

Tensors of a device ``cuda:i`` hold a tensor of the CPU, and every operation on them runs at once.  What is checked is
what a GPU would not forgive: an access that no event or stream orders after the one before it, memory that is freed
while another stream uses it, a graph that replays over freed memory, a call that is illegal while a graph is captured,
a kernel launched on another device than its tensors'.  Each is a :class:`HazardError`.

    with standin(devices=2) as cuda:
        ...                                  torch.cuda and tensors of "cuda:0" and "cuda:1" work as far as needed

``memory.py`` has blocks of memory and the order of accesses, ``streams.py`` streams and events, ``graphs.py`` captures,
``tensors.py`` the tensors, ``kernels.py`` launches of Triton kernels, ``engine.py`` the CUDA engine, ``runtime.py``
puts them in the place of ``torch.cuda``.
"""

from standin.memory import HazardError
from standin.runtime import Runtime, standin

__all__ = ["HazardError", "Runtime", "standin"]
