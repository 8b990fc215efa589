"""Batches of small images held in memory: no files, no worker processes, vectorised augmentation.

Letters: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class ImageBatches:
    """Iterates (images [n, C, H, W] float32 normalised, labels [n] int64) over one split.

    `shift` > 0 makes it a training split: the order is shuffled, each image is moved by up to `shift` pixels in
    both directions (zero padding) and mirrored with probability 1/2. All draws come from torch's global generator
    at iteration, so whoever seeds that generator repeats the batches exactly.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        shift: int = 0,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels: they must pair up")
        self.images = torch.from_numpy(np.array(images))
        self.labels = torch.from_numpy(np.array(labels)).long()
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.batch_size, self.shift = batch_size, shift

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)) if self.shift else torch.arange(len(self.images))
        for chosen in order.split(self.batch_size):
            images = self.normalised(self.images[chosen])
            yield (_augmented(images, self.shift) if self.shift else images), self.labels[chosen]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [n, H, W, C] -> float32 [n, C, H, W] in channels_last memory, the CPU's fast layout."""
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def _augmented(images: Tensor, shift: int) -> Tensor:
    n, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, n, 1, 1))
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)
    columns = left + torch.where(torch.rand(n, 1, 1) < 0.5, columns.flip(2), columns)
    return padded.permute(0, 2, 3, 1)[torch.arange(n).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
