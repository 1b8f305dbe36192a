"""Linear layers on weights in oneDNN's own layout, as two operators that FX, AOTAutograd and Inductor take.

    torch.ops.fxfusion.pack_weight(weight, tokens)  ->  packed       [out, in] -> [out, in], bytes in oneDNN's order
    torch.ops.fxfusion.packed_linear(x, packed, bias)                [..., in] -> [..., out]

The packed weight looks like a dense tensor of the weight's shape and dtype (compilers and their caches need one), but
only `packed_linear` can read it: it finds oneDNN's tensor by the address. It has no gradient. Its memory is moved to
huge pages where the system has them, since streaming weights through pages of 4 KiB is bound by address translation.
"""

from __future__ import annotations

import ctypes
import sys
import weakref

import torch

from fxfusion.graph.torch_private import onednn_linear, onednn_memory, onednn_pack

__all__ = ["is_packed", "use_huge_pages"]

_HUGE = 2 << 20  # bytes of a huge page on x86-64
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1 and newer: move what is there to huge pages now

_by_address: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

_library = torch.library.Library("fxfusion", "DEF")
_library.define("pack_weight(Tensor weight, int tokens) -> Tensor")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a packed weight (of this process, and alive)."""
    return tensor.device.type == "cpu" and tensor.data_ptr() in _by_address


def use_huge_pages(address: int, size: int) -> bool:
    """Move memory [bytes] to huge pages; False where it is too small or the system does not do it (no harm done)."""
    start, stop = -(-address // _HUGE) * _HUGE, (address + size) // _HUGE * _HUGE
    if not sys.platform.startswith("linux") or stop <= start:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(advise(start, stop - start, _COLLAPSE)) == 0


def _pack(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """Pack a weight for calls of about so many tokens; other numbers of tokens work too."""
    opaque = onednn_pack(weight.detach().contiguous(), tokens)
    address, size = onednn_memory(opaque)
    use_huge_pages(address, size)
    memory = (ctypes.c_char * size).from_address(address)
    memory.owner = opaque  # type: ignore[attr-defined]  # the memory lives as long as a tensor that shows it
    _by_address[address] = opaque
    return torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel()).view(weight.shape)


def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    opaque = _by_address.get(packed.data_ptr())
    if opaque is None:
        raise RuntimeError("packed_linear: the weight is no packed weight of this process; make it with pack_weight")
    return onednn_linear(x, opaque, bias)


def _like_weight(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _like_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


for _key, _pack_impl, _linear_impl in (("CPU", _pack, _linear), ("Meta", _like_weight, _like_linear)):
    _library.impl("pack_weight", _pack_impl, _key)
    _library.impl("packed_linear", _linear_impl, _key)
