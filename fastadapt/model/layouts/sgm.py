"""The names that Stability's own code has for the modules of diffusers' U-Nets: kohya's files for SDXL have those.

Source: huggingface/diffusers `loaders/lora_conversion_utils.py`, kohya-ss/sd-scripts `library/sdxl_model_util.py`.
"""

from __future__ import annotations

from collections.abc import Collection

# Modules outside of the blocks, and those inside of one of ResNet's.
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def sgm_names(paths: Collection[str]) -> dict[str, str]:
    """Stability's name for each of diffusers' module paths that has one: there all blocks of a side count as one list.

    paths: of all modules of the model. Empty for a model that is no U-Net of diffusers.
    """
    known = set(paths)
    parts = _blocks(known)
    found = {path: name for path, name in _ENDS.items() if path in known}
    for path in paths if parts else ():
        pieces = path.split(".")
        for length in (2, 3, 4):
            name = parts.get(".".join(pieces[:length]))
            if name is not None:
                rest = ".".join(pieces[length:])
                if "resnets" in pieces[:length]:
                    rest = _IN_RESNET.get(rest, rest)
                elif "downsamplers" in pieces[:length] and rest == "conv":
                    rest = "op"
                found[path] = f"{name}.{rest}" if rest else name
    return found if parts else {}


def _blocks(known: set[str]) -> dict[str, str]:
    """Stability's name for each part of each block."""
    found: dict[str, str] = {}

    def numbered(start: str) -> list[str]:
        names: list[str] = []
        while f"{start}.{len(names)}" in known:
            names.append(f"{start}.{len(names)}")
        return names

    def part(path: str, side: str, index: int, place: int) -> int:
        """Enters a part, as far as the model has it, and returns the place of the next one."""
        if path not in known:
            return place
        found[path] = f"{side}.{index}.{place}"
        return place + 1

    index = 1  # 0 is conv_in
    for block in numbered("down_blocks"):
        for layer in range(len(numbered(f"{block}.resnets"))):
            for kind in ("resnets", "attentions"):
                part(f"{block}.{kind}.{layer}", "input_blocks", index, int(kind == "attentions"))
            index += 1
        if part(f"{block}.downsamplers.0", "input_blocks", index, 0):
            index += 1
    for place, path in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        if f"mid_block.{path}" in known:
            found[f"mid_block.{path}"] = f"middle_block.{place}"
    index = 0
    for block in numbered("up_blocks"):
        layers = len(numbered(f"{block}.resnets"))
        for layer in range(layers):
            place = part(f"{block}.resnets.{layer}", "output_blocks", index, 0)
            place = part(f"{block}.attentions.{layer}", "output_blocks", index, place)
            if layer == layers - 1:
                part(f"{block}.upsamplers.0", "output_blocks", index, place)
            index += 1
    return found
