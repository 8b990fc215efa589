"""A training loop of your own on a network pruned by a ratio table: python examples/train_with_table.py RATIOS"""

import sys

import torch

from autoprune import RatioTable
from autoprune.tasks.fashion_mnist_resnet20 import make_task

task = make_task(data="shipped")
model = RatioTable.load(sys.argv[1]).prune(task.model, task.inputs)  # the one line
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
model.train()
for images, labels in task.train:
    optimizer.zero_grad()
    loss = task.loss(model(images), labels)
    loss.backward()
    optimizer.step()
print(f"loss after one epoch: {loss.item():.3f}")
