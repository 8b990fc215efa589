"""A ratio table in the Trainer of Hugging Face: python examples/hf_trainer.py RATIOS

The model is pruned before `Trainer(...)` is made, whose optimizer then takes the smaller one's parameters. RATIOS is
the ratios.yaml that this leaves, run in the folder of this file, on this machine or another:
python -m autoprune search task._target_=hf_trainer.make_task budget=params_80pct
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from autoprune import RatioTable, Task

LENGTH = 16


class Sentences(Dataset):
    """Made-up sentences of LENGTH words out of 50; the label: whether a word under 25 comes first."""

    def __init__(self, count: int, seed: int) -> None:
        self.words = torch.randint(50, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        words = self.words[i]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": (words[0] < 25).long()}

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs by name and labels, 50 sentences at a time."""
        given = [
            ({"input_ids": words, "attention_mask": torch.ones_like(words)}, words) for words in self.words.split(50)
        ]
        return [(inputs, (words[:, 0] < 25).long()) for inputs, words in given]


def make_model() -> nn.Module:
    """A small BERT of random weights; yours would come from `from_pretrained`."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


class Accuracy(MulticlassAccuracy):
    """Of the logits in what the model gives."""

    def update(self, output: SequenceClassifierOutput, target: Tensor) -> None:
        """Count a batch."""
        super().update(output.logits, target)


def loss(output: SequenceClassifierOutput, target: Tensor) -> Tensor:
    """Cross-entropy of the logits in what the model gives."""
    return nn.functional.cross_entropy(output.logits, target)


def make_task() -> Task:
    """What a search needs: the model, trained, and its data."""
    model, splits = make_model(), [Sentences(count, seed).batches() for seed, count in enumerate((1000, 500, 500))]
    optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-3)
    for inputs, target in splits[0] * 3:
        optimizer.zero_grad()
        loss(model(**inputs), target).backward()
        optimizer.step()
    return Task(
        name="sentences",
        model=model.eval(),
        inputs=example(),
        train=splits[0],
        search=splits[1],
        test=splits[2],
        loss=loss,
        metric=Accuracy(num_classes=2),
        lr=0.05,
    )


def example() -> dict[str, Tensor]:
    """What the model is called with, by the names of its arguments."""
    words = Sentences(2, seed=0).words
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


if __name__ == "__main__":
    smaller = RatioTable.load(sys.argv[1]).prune(make_model(), example())  # the one line
    arguments = TrainingArguments(
        output_dir="trained",
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=smaller, args=arguments, train_dataset=Sentences(1000, seed=1))
    done = trainer.train()
    widths = {name: layer.out_features for name, layer in smaller.named_modules() if isinstance(layer, nn.Linear)}
    print(f"widths: {widths}")
    # save_model would leave a configuration of the dense widths: save_file and RatioTable.rebuild know the pruned ones
    print(f"loss of one epoch: {done.training_loss:.3f}")
