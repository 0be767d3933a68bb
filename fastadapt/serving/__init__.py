"""Many adapters in one batch: a pool of them, and models that serve from it."""

from ..model.untrusted import AdapterError, Limits
from ..operators.multi_adapter_linear.batch import AdapterBatch
from ..operators.multi_adapter_linear.captured import CapturedUpdate, PagedColumns, TokenBuffers
from ..operators.multi_adapter_linear.experts import ExpertForms, ExpertPart
from ..operators.multi_adapter_linear.form_pages import FormPages
from ..operators.multi_adapter_linear.packed import Columns, PackedUpdate
from ..operators.multi_adapter_linear.stacks import FormStacks
from .entries import AdapterInfo
from .loader import LoadedAdapter, adapter_directory, read_adapter
from .model import MultiAdapterModel
from .pool import AdapterPool, PoolFullError
from .shapes import LayerShape, PartForm, ShapedAdapter, Shard, read_adapter_by_shapes

__all__ = [
    "AdapterBatch",
    "AdapterError",
    "AdapterInfo",
    "AdapterPool",
    "CapturedUpdate",
    "Columns",
    "ExpertForms",
    "ExpertPart",
    "FormPages",
    "FormStacks",
    "LayerShape",
    "Limits",
    "LoadedAdapter",
    "MultiAdapterModel",
    "PackedUpdate",
    "PagedColumns",
    "PartForm",
    "PoolFullError",
    "ShapedAdapter",
    "Shard",
    "TokenBuffers",
    "adapter_directory",
    "read_adapter",
    "read_adapter_by_shapes",
]
