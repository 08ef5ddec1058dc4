"""What a kernel takes, as numba's types: read from the annotations of its parameters.

What enters: a Python function whose parameters are annotated. What leaves: the one tuple of types that it is compiled
for. So a kernel can be compiled before anybody calls it, and for processors that are not here.

    int, float, bool, np.float32    scalars; Python's are 64 bits wide
    NDArray[np.int8]                a vector: 1-D, C-contiguous, aligned, writable
    Annotated[NDArray[Any], dtype]  a vector whose type of elements is known when the module is imported
    Annotated[..., READ_ONLY]       a vector that is not writable
    tuple[A, B], a NamedTuple       of all these
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
from numba import from_dtype, types

READ_ONLY = "read-only"
"""Annotation of vectors that callers hand over as not writable, since they may lie in a mapped file."""

_SCALARS: dict[Any, Any] = {
    int: types.int64,
    float: types.float64,
    bool: types.boolean,
    np.float32: types.float32,
}


def argument_types(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the numba types of a function's parameters.

    Raises
    ------
    TypeError
        If a parameter has no annotation, or one of another kind than this module's docstring lists.
    """
    hints = get_type_hints(function, include_extras=True)
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    missing = [name for name in names if name not in hints]
    if missing:
        raise TypeError(f"{function.__module__}.{function.__name__}: annotate {', '.join(missing)}.")
    try:
        return tuple(_numba_type(hints[name]) for name in names)
    except TypeError as error:
        raise TypeError(f"{function.__module__}.{function.__name__}: {error}") from None


def _numba_type(hint: Any) -> Any:
    if hint in _SCALARS:
        return _SCALARS[hint]
    hint = _expanded(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        vector, *extras = arguments
        dtypes = [extra for extra in extras if isinstance(extra, np.dtype)]
        element = from_dtype(dtypes[0]) if dtypes else _element(vector)
        return types.Array(element, 1, "C", readonly=READ_ONLY in extras)
    if origin is np.ndarray:
        return types.Array(_element(hint), 1, "C")
    if origin is tuple:
        return types.BaseTuple.from_types([_numba_type(argument) for argument in arguments])
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        fields = get_type_hints(hint, include_extras=True)
        return types.BaseTuple.from_types([_numba_type(fields[name]) for name in hint._fields], hint)
    raise TypeError(f"{hint} says no type that kernels take.")


def _element(vector: Any) -> Any:
    """The numba type of the elements of NDArray[...]."""
    found = _expanded(vector)
    if get_origin(found) is np.ndarray:
        (element,) = get_args(get_args(found)[1])
        if isinstance(element, type) and issubclass(element, np.generic):
            return from_dtype(np.dtype(element))
    raise TypeError(f"{vector} names no type of elements; write NDArray[np.float32], or Annotated with a dtype.")


def _expanded(hint: Any) -> Any:
    """What a parametrised alias stands for; NDArray[...] is one since NumPy 2.5, np.ndarray[...] itself before."""
    meaning = getattr(get_origin(hint), "__value__", None)
    return hint if meaning is None else meaning[get_args(hint)]
