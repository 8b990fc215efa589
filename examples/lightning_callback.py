"""A ratio table in Lightning, as a callback: python examples/lightning_callback.py RATIOS

RATIOS is the ratios.yaml that this leaves, run in the folder of this file, on this machine or another:
python -m autoprune search task._target_=my_module.make_task budget=params_40pct
"""

import sys

import lightning.pytorch as pl
import torch
from my_module import make_task
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoprune import RatioTable


class PruneCallback(pl.Callback):
    """Prunes a module's network in `setup`, which Lightning calls before a checkpoint is read and before
    `configure_optimizers`, so that both see the smaller one. It is called for every fit and test; the first prunes.

    attribute: of the LightningModule, its network. inputs: an example of what that is called with.
    """

    def __init__(self, table: RatioTable, inputs: tuple[Tensor, ...], attribute: str = "network") -> None:
        self.table, self.inputs, self.attribute = table, inputs, attribute
        self.smaller: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the smaller network where the dense one was."""
        network = getattr(pl_module, self.attribute)
        if network is not self.smaller:
            self.smaller = self.table.prune(network, self.inputs)
            setattr(pl_module, self.attribute, self.smaller)


class Classifier(pl.LightningModule):
    """A LightningModule as any other: it knows nothing of pruning."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over what the callback left."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


if __name__ == "__main__":
    task = make_task()
    module = Classifier(task.model.train())
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[PruneCallback(RatioTable.load(sys.argv[1]), task.inputs)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(task.train, batch_size=None))  # the task's batches as they are
    widths = {
        name: layer.out_channels for name, layer in module.network.named_modules() if hasattr(layer, "out_channels")
    }
    print(f"widths: {widths}")
    print(f"loss after one epoch: {trainer.callback_metrics['loss']:.3f}")
