"""ggml's structures as ctypes sees them. Source: ggml.h, ggml-backend.h and ggml-backend-impl.h, API version 2."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p

API_VERSION = 2
CPU, ACCELERATOR = 0, 3
"""Of `enum ggml_backend_dev_type`."""
MUST_BE_COMPUTED = 16
"""GGML_TENSOR_FLAG_COMPUTE."""
FLOAT32, FLOAT16 = 0, 1
"""GGML_TYPE_F32, GGML_TYPE_F16."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""


Tensor._fields_ = [
    ("type", c_int),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(Tensor) * 10),
    ("view_src", c_void_p),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
    ("extra", c_void_p),
    ("padding", c_char * 8),
]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class BufferType(ctypes.Structure):
    """`struct ggml_backend_buffer_type`."""

    _fields_ = _pointers(
        "get_name", "alloc_buffer", "get_alignment", "get_max_size", "get_alloc_size", "is_host", "device", "context"
    )  # fmt: skip


class Buffer(ctypes.Structure):
    """The beginning of `struct ggml_backend_buffer`."""

    _fields_ = _pointers(
        "free_buffer", "get_base", "init_tensor", "memset_tensor", "set_tensor", "get_tensor", "set_tensor_2d",
        "get_tensor_2d", "cpy_tensor", "clear", "reset", "type",
    )  # fmt: skip


class BackendFunctions(ctypes.Structure):
    """`struct ggml_backend_i`."""

    _fields_ = _pointers(
        "get_name", "free", "set_tensor_async", "get_tensor_async", "set_tensor_2d_async", "get_tensor_2d_async",
        "cpy_tensor_async", "synchronize", "graph_plan_create", "graph_plan_free", "graph_plan_update",
        "graph_plan_compute", "graph_compute", "event_record", "event_wait", "graph_optimize",
    )  # fmt: skip


class Backend(ctypes.Structure):
    """`struct ggml_backend`: one per context."""

    _fields_ = [("guid", c_void_p), ("functions", BackendFunctions), *_pointers("device", "context")]


class DeviceFunctions(ctypes.Structure):
    """`struct ggml_backend_device_i`."""

    _fields_ = _pointers(
        "get_name", "get_description", "get_memory", "get_type", "get_props", "init_backend", "get_buffer_type",
        "get_host_buffer_type", "buffer_from_host_ptr", "supports_op", "supports_buft", "offload_op", "event_new",
        "event_free", "event_synchronize",
    )  # fmt: skip


class Device(ctypes.Structure):
    """`struct ggml_backend_device`."""

    _fields_ = [("functions", DeviceFunctions), *_pointers("registration", "context")]


class RegistrationFunctions(ctypes.Structure):
    """`struct ggml_backend_reg_i`."""

    _fields_ = _pointers("get_name", "get_device_count", "get_device", "get_proc_address")


class Registration(ctypes.Structure):
    """`struct ggml_backend_reg`."""

    _fields_ = [("api_version", c_int), ("functions", RegistrationFunctions), ("context", c_void_p)]


class Capabilities(ctypes.Structure):
    """`struct ggml_backend_dev_caps`."""

    _fields_ = [
        (n, c_bool) for n in ("asynchronous", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")
    ]


class Properties(ctypes.Structure):
    """`struct ggml_backend_dev_props`."""

    _fields_ = [
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        ("capabilities", Capabilities),
    ]


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]
