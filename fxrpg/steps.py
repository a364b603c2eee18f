"""How to train, and one step of it: parts of a batch, autocast, scaled and clipped gradients, a moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxrpg.batches import MODEL
from fxrpg.errors import FxrpgError
from fxrpg.hashing import derive_key
from fxrpg.plan import checked_seed
from fxrpg.ranks import Ranks
from fxrpg.training import PrancTrainer

AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Args:
        epochs: passes over the examples; of each, what does not fill a batch is left out.
        batch: examples in one step of the optimizer, over all processes.
        accumulate: parts of a batch that go through the model one after the other.
        clip: largest norm of the gradient; None does not clip.
        amp: "bf16" or "fp16" (with scaled gradients) computes in that type where torch's autocast does; "" does not.
        ema: decay of a moving average of the parameters, such as 0.999, which is then what is evaluated; None keeps none.
            The average has the newest running statistics of batch norms.
        seed: of the order, of random changes to the examples, and of what is random in the model; 0 <= seed < 2^64.
        workers: processes that make batches beside this one.
        snapshot_every: steps between two snapshots; there is one more at the end.
        log_every: steps between two lines in the log.
    """

    epochs: int
    batch: int
    accumulate: int = 1
    clip: float | None = None
    amp: str = ""
    ema: float | None = None
    seed: int = 0
    workers: int = 0
    snapshot_every: int = 500
    log_every: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "snapshot_every", "log_every"):
            if getattr(self, name) < 1:
                raise FxrpgError(name.replace("_", "-"), "must be 1 or more", repr(getattr(self, name)), "Pass more.")
        checked_seed(self.seed)
        if self.workers < 0:
            raise FxrpgError("workers", "must be 0 or more", repr(self.workers), "Pass 0 to load data in this process.")
        if self.amp not in AMP:
            raise FxrpgError("amp", f"must be one of {list(AMP)}", repr(self.amp), "Pass one of them.")
        if self.clip is not None and not self.clip > 0:
            raise FxrpgError("clip", "must be above 0", repr(self.clip), "Pass such as 1.0.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise FxrpgError("ema", "must lie between 0 and 1", repr(self.ema), "Pass such as 0.999.")


class Stepper:
    """A model, what trains it, and the state of both.

    Attributes: `parts`, by name whatever has a state_dict; `loss_sum`, over the steps since it was last set to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        training: Training,
        ranks: Ranks,
        descent: PrancTrainer | None = None,
    ) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            fix = "Take another, such as CosineAnnealingLR."
            raise FxrpgError("scheduler", "must need no loss to step", "ReduceLROnPlateau", fix)
        self.model, self.optimizer, self.scheduler, self.loss = model, optimizer, scheduler, loss
        self.training, self.ranks, self.descent = training, ranks, descent
        if descent is not None and (descent.optimizer is not optimizer or training.amp == "fp16"):
            found = "fp16" if descent.optimizer is optimizer else "another optimizer"
            fix = "Pass the same optimizer to both, and amp='bf16' or none."
            raise FxrpgError("descent", "steps the trainer's optimizer, with unscaled gradients", found, fix)
        if descent is not None and descent.nested:
            fix = "Leave it out, or take PrancTrainer's own `step` in a loop of yours."
            raise FxrpgError("descent", "trains no prefixes here", "nested=True", fix)
        self.loss_sum = torch.zeros((), device=ranks.device)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema)) if training.ema else None
        self._whole: nn.Module = ranks.wrapped(model)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=training.amp == "fp16")
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": self._scaler}
        self.parts: dict[str, Any] = parts | {"average": self.average}

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def take(self, batches: Iterator[tuple[Tensor, Tensor]], step: int) -> None:
        """Step number `step` of the optimizer, on as many batches as a step has parts."""
        self.model.train()
        parts = self.training.accumulate
        for i in range(parts):
            inputs, labels = map(self._here, next(batches))
            torch.manual_seed(derive_key(self.training.seed, MODEL, step, i, self.ranks.rank))
            with self._apart(last=i + 1 == parts):
                with self._autocast():
                    logits = self._whole(inputs)
                loss = self.loss(logits.float(), labels) / parts
                self._scaler.scale(loss).backward()
            self.loss_sum += loss.detach()
        if self.training.clip is not None:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.training.clip)
        if self._advance(step) and self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _advance(self, step: int) -> bool:
        """Step the optimizer on the gradients; False if it was left out, for infinite ones of fp16."""
        if self.descent is not None:
            self.descent.steps = step
            self.descent.advance()
            return True
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) over the batches of all processes; of the average, if there is one."""
        model = self.model if self.average is None else self.average.module
        self.ranks.share_buffers(model)
        model.eval()
        sums = torch.zeros(3, device=self.ranks.device)
        for inputs, labels in batches:
            inputs, labels = self._here(inputs), self._here(labels)
            with self._autocast():
                logits = model(inputs)
            loss = self.loss(logits.float(), labels) * len(labels)
            sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])
        loss_sum, right, count = self.ranks.total(sums).tolist()
        return loss_sum / count, right / count

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.ranks.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AMP[self.training.amp]
        return torch.autocast(self.ranks.device.type, dtype) if dtype else contextlib.nullcontext()

    def _apart(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients with the last part of a step only."""
        if last or not isinstance(self._whole, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._whole.no_sync()
