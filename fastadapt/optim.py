"""The optimizers of LoRA+ and LoRA-FA."""

from .training.optim import LoRAFAAdamW, parameter_groups

__all__ = ["LoRAFAAdamW", "parameter_groups"]
