"""accelerate and restore: swap the fused recursion into an existing model, and out again."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from trmfast import foreign
from trmfast.backends import BACKENDS
from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.dropin import probe
from trmfast.dropin.families import FAMILIES
from trmfast.dropin.language import functions_of, kind_of, language_models, read
from trmfast.dropin.language_forward import FORWARDS
from trmfast.dropin.language_probe import difference
from trmfast.dropin.structure import UnsupportedModelError, find, inner_modules
from trmfast.dropin.swap import Swap, forwards_of, is_swapped, swap, swap_back, swap_of

__all__ = ["accelerate", "restore"]

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, backend: str = "auto", recompute: Recompute = DEFAULT) -> M:
    """Lets a model's recursion run as one fused operation; the model itself is changed and returned.

    Takes TRM and its variants, HRM, the transformer baseline, URM and nano-trm under whatever class names, plain or
    inside a loss head, ``torch.compile``, DistributedDataParallel or another wrapper.  The model is recognised by the
    names, shapes and parts of its modules, and then by what its own code computes on random numbers, in a private
    double that shares no tensor with it.  Parameters, buffers, state_dict, hooks outside of the networks and random
    generators stay as they are.  An accelerated model takes the new backend and recompute and is otherwise left alone.

    The layers of HRM-Text (transformers) and of Ouro run as one recursion too, in training and scoring; a call with a
    cache, so all of ``generate``, runs the model's own code.

    A model of tiny-recursive-model or hrm-pytorch, whose networks are of any kind, keeps running its own code and
    recomputes its gradient window in backward, see :mod:`trmfast.foreign`.

    Args:
        model: the model.
        backend: the name of a backend, or ``"auto"`` for the best that supports the problem.
        recompute: what backward computes again: True, False or a size, as in :func:`trmfast.recursion`.

    Raises:
        TypeError: model is not a module, or recompute of another type.
        UnsupportedModelError: a ValueError that lists every difference of the model, one per line.
        ValueError: there is no backend of that name, recompute is no size, or False for networks of any kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted are torch.nn.Module")
    budget_of(recompute)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, accepted are {', '.join(('auto', *BACKENDS))}")
    swapped = [module for module in model.modules() if is_swapped(module)]
    languages = language_models(model)
    if swapped and len(inner_modules(model)) + len(languages) == len(swapped):
        for module in swapped:
            swap_of(module).backend, swap_of(module).recompute = backend, recompute
        return model
    if languages:
        _accelerate_language(languages, backend, recompute)
        return model
    other = _foreign(model)
    if other is not None:
        if backend != "auto":
            raise ValueError(f"backend: got {backend!r}, accepted is 'auto', the networks are {other.kind}'s own")
        if recompute is False:
            raise ValueError(f"recompute: got False, accepted is True, which is all that is done for {other.kind}")
        other.swap()
        return model
    found = find(model)
    differences = probe.differences(found)
    if differences:
        raise UnsupportedModelError(differences)
    forwards = forwards_of(found.inner, FAMILIES[found.family])
    swap(found.inner, Swap(found.family, found.nets, backend, forwards, recompute), FAMILIES[found.family].method)
    return model


def restore(model: M) -> M:
    """Undoes :func:`accelerate`; the model computes what it did before, bit for bit, and is returned.

    A model that is not accelerated stays as it is.
    """
    for module in list(model.modules()):
        if is_swapped(module):
            swap_back(module)
    foreign.undo(model)
    return model


def _accelerate_language(models: list[nn.Module], backend: str, recompute: Recompute) -> None:
    if len(models) > 1:
        raise UnsupportedModelError(["several modules hold a recursion; accelerate them one at a time"])
    (model,) = models
    name = kind_of(model)
    assert name is not None
    try:
        parts = read(model, name)
    except ValueError as error:
        raise UnsupportedModelError([str(error)]) from error
    reason = difference(model, name, parts)
    if reason is not None:
        raise UnsupportedModelError([reason])
    specs = tuple(part.spec for part in parts)
    swap(model, Swap(name, specs, backend, functions_of(model, name), recompute), "forward", FORWARDS[name])


def _foreign(model: nn.Module) -> foreign.Foreign | None:
    """The recursion over networks of any kind in a model, if it has one that can be recomputed."""
    try:
        found = foreign.recognise(model)
    except ValueError as error:
        raise UnsupportedModelError([str(error)]) from error
    reasons = found.refusals() if found is not None else []
    if reasons:
        raise UnsupportedModelError(reasons)
    return found
