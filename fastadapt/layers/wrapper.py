"""A module over a base layer: what adapted and served layers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class BaseLayerWrapper(nn.Module):
    """A module over `base_layer`, which answers for every attribute that the module does not have itself."""

    base_layer: Any

    def __getattr__(self, name: str) -> Any:
        # Model code asks its layers for `weight`, `in_features`, `kernel_size`, ...: the base layer answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python's own names (__deepcopy__) are this module's or nobody's.
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    def _misfit(self) -> dict[str, Tensor]:
        """A tensor by the plain name of one of the base layer's, in a shape that is never its own.

        A reader who knows the model without wrappers finds none of the names that it has now, and would make what is
        missing anew, at random. It stops at this one.
        """
        for name, parameter in self.base_layer.named_parameters():
            return {name.replace("base_layer.", ""): torch.zeros((1,) * (parameter.dim() + 2))}
        return {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._misfit().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, tensor in self._misfit().items():
            if prefix + name in unexpected_keys and state_dict[prefix + name].shape == tensor.shape:
                unexpected_keys.remove(prefix + name)
