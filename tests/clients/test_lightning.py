"""PyTorch Lightning trains a converted model as a plain loop does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels

# Of Lightning: it counts processors, and knows of newer ways of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning_utilities"),
]


def test_training(tmp_path: Any) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        """Two layers in both directions and a linear one."""

        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
            self.out = nn.Linear(8, 2)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.out(self.lstm(x)[0][:, -1]), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.5)

    torch.manual_seed(0)
    model = Classifier()
    assert len(seqkernels.convert(model).swapped) == 1
    data = [(torch.randn(5, 3), torch.tensor(k % 2)) for k in range(6)]
    loader = torch.utils.data.DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    by_hand = copy.deepcopy(model)
    optimizer = by_hand.configure_optimizers()
    for k, batch in enumerate(loader):
        optimizer.zero_grad()
        by_hand.training_step(batch, k).backward()
        optimizer.step()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader)
    assert type(model.lstm) is seqkernels.nn.LSTM
    assert all(map(torch.equal, model.parameters(), by_hand.parameters()))
