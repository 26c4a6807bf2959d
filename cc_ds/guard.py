"""Steps that must not count, and losses that should worry someone.

A loss that is NaN or Inf poisons its own gradient (`poison_if_not_finite`), so it shares the fate of a gradient that is
not finite: the norm over all ranks is not finite either, and the optimiser skips the step, on every rank, weights and
schedule untouched. The optimiser reads that one norm on the host before it steps (DeepSpeed's ZeRO does so by itself);
nothing here adds another wait. The loss is summed over the ranks on the device and read one step later.

    output_dir/skipped_steps.json    the latest skipped steps in a row, and the rows (file and number) that every rank
                                     had in them, with its loss
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from cc_ds.config import TrainConfig
from cc_ds.dist.group import Group
from cc_ds.telemetry import log

_WINDOW = 50
_ENOUGH = 20


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """`loss`, whose gradient is NaN throughout where its value is NaN or Inf. No host sync."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Guard:
    """Counts skipped steps and watches the loss. Every decision is made from what is the same on all ranks."""

    def __init__(self, group: Group, train: TrainConfig) -> None:
        self.group, self.train = group, train
        self.skipped = 0
        self._row: list[dict] = []
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._pending: tuple[int, Tensor] | None = None

    def after_step(self, step: int, applied: bool, losses: list[Tensor], sources: list[str]) -> None:
        """`losses`: this rank's share of the step's loss, by micro-batch; `sources`: this rank's rows.

        Raises:
            ValueError: max_skipped_steps in a row were skipped, or a loss spike with on_loss_spike "stop".
        """
        local = torch.stack([loss.detach().float() for loss in losses]).sum()
        if not applied:
            self._skip(step, float(local), sources)
            return
        self._row = []
        late, self._pending = self._pending, (step, _to_host(self.group.sum(local.clone())))
        if late is not None:
            self._watch_loss(late[0], float(late[1]))

    def _skip(self, step: int, loss: float, sources: list[str]) -> None:
        self.skipped += 1
        mine = {"rank": self.group.rank, "loss": _for_json(loss), "rows": sources}
        self._row.append({"step": step, "ranks": self.group.gather(mine)})
        guilty = [rank["rank"] for rank in self._row[-1]["ranks"] if isinstance(rank["loss"], str)]
        what = f"the loss of rank {', '.join(map(str, guilty))}" if guilty else "a gradient"
        path = Path(self.train.output_dir) / "skipped_steps.json"
        log.warning("step %d skipped: %s is not finite; its rows are in %s", step, what, path)
        if self.group.is_main:
            path.write_text(json.dumps(self._row, indent=1) + "\n", encoding="utf-8")
        limit = self.train.max_skipped_steps
        if limit and len(self._row) >= limit:
            raise ValueError(
                f"{len(self._row)} steps in a row were skipped, up to step {step}, as {what} was NaN or Inf; look at "
                f"the rows named in {path}, lower --learning_rate, or resume from an older checkpoint"
            )

    def _watch_loss(self, step: int, loss: float) -> None:
        limit = self.train.loss_spike
        if limit and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            if loss > usual + limit:
                text = f"step {step}: loss {loss:.3f}, {loss - usual:.3f} above the median of the last {_WINDOW} steps"
                if self.train.on_loss_spike == "stop":
                    raise ValueError(f"{text} (--loss_spike {limit:g}); resume from an older checkpoint")
                log.warning("%s", text)
        self._losses.append(loss)


def _to_host(value: Tensor) -> Tensor:
    """A copy on the host that is whole once the device has passed this point; nobody waits for it here."""
    if value.device.type == "cpu":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _for_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
