"""Many adapters in one batch: a pool of them, and models that serve from it."""

from ..model.untrusted import AdapterError, Limits
from ..operators.multi_adapter_linear.batch import AdapterBatch
from ..operators.multi_adapter_linear.stacks import FormStacks
from .entries import AdapterInfo
from .loader import LoadedAdapter, adapter_directory, read_adapter
from .model import MultiAdapterModel
from .pool import AdapterPool, PoolFullError

__all__ = [
    "AdapterBatch",
    "AdapterError",
    "AdapterInfo",
    "AdapterPool",
    "FormStacks",
    "Limits",
    "LoadedAdapter",
    "MultiAdapterModel",
    "PoolFullError",
    "adapter_directory",
    "read_adapter",
]
