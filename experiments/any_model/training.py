"""Train the networks of these tasks: python training.py detector|lstm|minilm (the fourth comes trained)."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from checkpoints import keep
from torch import nn

from autoprune.borrowing import arguments

RECIPES = {"detector": (20, 2e-3), "lstm": (6, 3e-3), "minilm": (3, 1e-4)}  # epochs, highest learning rate of AdamW


def main(name: str) -> None:
    torch.manual_seed(0)
    module: Any = __import__(name)
    epochs, lr = RECIPES[name]
    model: nn.Module = getattr(module, {"detector": "Detector", "lstm": "Classifier", "minilm": "pretrained"}[name])()
    module.trained = lambda untrained, _: untrained  # the task's data, with a network that is still to be trained
    task = module.make_task()
    names = list(task.inputs) if isinstance(task.inputs, dict) else []

    def output(inputs: Any) -> Any:
        return model(**inputs) if names else model(*arguments(inputs))

    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(task.train), pct_start=0.1)
    for epoch in range(epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        for inputs, target in task.train:
            value = task.loss(output(inputs), target)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += value.item()
        model.eval()
        task.metric.reset()
        with torch.no_grad():
            for inputs, target in task.search:
                task.metric.update(output(inputs), target)
        score, seconds, mean = float(task.metric.compute()), time.perf_counter() - began, total / len(task.train)
        print(f"epoch {epoch + 1}: loss {mean:.3f}, search split {score:.4f}, {seconds:.0f} s", flush=True)
    print(keep(model, name))


if __name__ == "__main__":
    main(sys.argv[1])
