"""A bidirectional two-layer LSTM that tells whether a film was liked, on IMDB's reviews: metric accuracy."""

from __future__ import annotations

import re
from collections import Counter

import torch
from checkpoints import trained
from reviews import Batches, reviews
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune.core import Task

WORDS, LENGTH = 8000, 128
PAD, UNKNOWN = 0, 1


class Classifier(nn.Module):
    """Word numbers [B, LENGTH] to logits [B, 2]: the largest of each hidden unit over time is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 96)
        self.lstm = nn.LSTM(96, 96, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3)
        self.hidden, self.drop, self.out = nn.Linear(192, 64), nn.Dropout(0.3), nn.Linear(64, 2)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(words))
        return self.out(F.relu(self.hidden(self.drop(states.amax(1)))))


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[!?]", text.lower().replace("<br />", " "))


def make_task() -> Task:
    train, search, test = reviews("imdb")
    counts = Counter(word for text in train[0] for word in tokens(text))
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}

    def numbers(texts: list[str]) -> Tensor:
        """The last words, where the verdict is."""
        rows = [[number.get(word, UNKNOWN) for word in tokens(text)[-LENGTH:]] for text in texts]
        return torch.tensor([[PAD] * (LENGTH - len(row)) + row for row in rows])

    held = Batches(numbers(search[0]), search[1], size=250, shuffled=False)
    return Task(
        name="lstm_reviews",
        model=trained(Classifier(), "lstm"),
        inputs=(held.inputs[:8],),
        train=Batches(numbers(train[0]), train[1], size=64, shuffled=True),
        search=held,
        test=Batches(numbers(test[0]), test[1], size=250, shuffled=False),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(2, average="micro"),
        lr=0.1,
    )
