"""A training loop of your own on a network pruned by a ratio table: python examples/train_with_table.py RATIOS"""

import itertools
import sys

import torch

from autoprune import RatioTable
from autoprune.tasks.fashion_mnist_resnet20 import make_task

task = make_task(data="shipped")
batches = list(itertools.islice(task.train, 4))
model = RatioTable.load(sys.argv[1]).prune(task.model, task.inputs, reconstruct=batches)  # the one line
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
model.train()
for images, labels in task.train:
    optimizer.zero_grad()
    loss = task.loss(model(images), labels)
    loss.backward()
    optimizer.step()
print(f"widths: { {name: m.out_channels for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)} }")
print(f"loss after one epoch: {loss.item():.3f}")
