"""PEFT's LoRA layers on bitsandbytes' weights with a forward of ours; imported where PEFT has such layers alone."""

from __future__ import annotations

from peft.tuners.lora import bnb

from .peft_layers import ACCELERATED, LoraParts


class AcceleratedLinear8bitLt(LoraParts, bnb.Linear8bitLt):
    """PEFT's LoRA, rsLoRA and DoRA on an 8-bit layer: what that gives for x, then the form."""


class AcceleratedLinear4bit(LoraParts, bnb.Linear4bit):
    """The same on a 4-bit layer."""


ACCELERATED |= {bnb.Linear8bitLt: AcceleratedLinear8bitLt, bnb.Linear4bit: AcceleratedLinear4bit}
