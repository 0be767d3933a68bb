"""torch's fused encoder layers: in eval mode they read the weights of the layers inside and call none of them.

What wraps such a layer would be passed by without a word. A hook makes the encoder layer call it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import BaseLayerWrapper

_NESTED = "_nested_tensors_before_wrapping"


def mind_wrappers(model: nn.Module, path: str) -> None:
    """Makes torch's encoder layers around `path` call what is inside of them for as long as any of it is wrapped."""
    for end in range(path.count(".") + 1):
        around: Any = model.get_submodule(".".join(path.split(".")[:end]))
        if not isinstance(around, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        wrapped = any(isinstance(module, BaseLayerWrapper) for module in around.modules())
        ours = [key for key, hook in around._forward_pre_hooks.items() if hook is _called]
        if wrapped and not ours:
            around.register_forward_pre_hook(_called)
        for key in () if wrapped else ours:
            del around._forward_pre_hooks[key]
        if isinstance(around, nn.TransformerEncoder):  # only the fused layers take what it packs
            if wrapped and around.use_nested_tensor:
                setattr(around, _NESTED, True)
                around.use_nested_tensor = False
            elif not wrapped and around.__dict__.pop(_NESTED, False):
                around.use_nested_tensor = True


def _called(module: nn.Module, args: Any) -> None:
    """Does nothing: that it is there is what keeps the fused layer away."""
