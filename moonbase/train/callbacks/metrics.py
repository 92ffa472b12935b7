"""metrics.jsonl, and TensorBoard where asked for. Comes after every callback that adds to the record."""

from __future__ import annotations

from typing import Any

from moonbase.errors import UserError
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import Callback, Trainer


class MetricsWriter(Callback):
    """One line per step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.folder.append_metrics(record)


class TensorBoardWriter(Callback):
    """The same numbers as TensorBoard events under `tensorboard/`. Raises UserError where the package is missing."""

    def __init__(self, folder: RunFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard=true needs the package tensorboard: "
                            "pip install 'moonbase[tensorboard]'") from None
        self.folder, self.make_writer = str(folder.path / "tensorboard"), SummaryWriter
        self.writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        # What an earlier life wrote beyond the point of return disappears from the curves.
        self.writer = self.make_writer(self.folder, purge_step=trainer.step + 1)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, record["step"])
            elif name in ("max_logit", "expert_load", "clipped_heads") and value:
                self.writer.add_scalar(f"{name}/largest", max(value), record["step"])

    def on_close(self) -> None:
        if self.writer is not None:
            self.writer.close()
