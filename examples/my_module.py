"""A task of your own: any model that runs, any data that iterates. From the folder of this file:

python -m autoprune search task._target_=my_module.make_task task.width=24 budget=params_40pct
"""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from autoprune import Task


def make_task(width: int = 16) -> Task:
    """Which of the four quadrants of a noisy 12 x 12 image is brightest? A small network, trained on the spot."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (3000,), generator=draw)
    images = torch.randn(3000, 1, 12, 12, generator=draw)
    for i, quadrant in enumerate(labels.tolist()):
        row, column = divmod(quadrant, 2)
        images[i, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 0.35
    batches = list(zip(images.split(100), labels.split(100), strict=True))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18 * width, 4),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for inputs, target in batches[:20] * 3:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()

    return Task(
        name="quadrants",
        model=model.eval(),
        inputs=(images[:1],),
        train=batches[:20],
        search=batches[20:25],  # held out of the training above
        test=batches[25:],
        loss=nn.functional.cross_entropy,
        metric=MulticlassAccuracy(num_classes=4),
        lr=0.05,
    )
