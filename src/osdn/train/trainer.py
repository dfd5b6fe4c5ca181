"""Hugging Face's Trainer, with what it has no setting for: the optimizer's groups, skipped steps, the place in the
data, checkpoints that are whole or not there, and a refusal to train unsharded where FSDP was asked for."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from osdn.data.mqar import IGNORE
from osdn.data.packed import PackedRows, Position, collate
from osdn.nn.decay import decayed_names
from osdn.runs import RunError, first_line
from osdn.runs.store import write_json
from osdn.train.checkpoint import prune, seal
from osdn.train.config import TrainConfig

PROGRESS = "progress.json"


class OSDNTrainer(Trainer):
    """Trains on `PackedRows`, whose place in the data it keeps in its checkpoints, stamped with the run's fingerprint.

    progress: what `PROGRESS` holds in the checkpoint to go on from: the number of skipped steps and the last loss.
    """

    def __init__(
        self, *, config: TrainConfig, out: Path, stamp: str, rows: PackedRows, progress: dict[str, Any], **options: Any
    ) -> None:
        self.config, self.out, self.stamp, self.rows = config, out, stamp, rows
        self.positions: dict[int, Position] = dict(rows.positions)
        self.skip = SkipNonFinite(progress["skipped"])
        self.directory = out
        self.last_loss = torch.tensor(progress["last_loss"])
        self.began: tuple[float, int] | None = None
        super().__init__(data_collator=collate, **options)
        if self.is_fsdp_enabled:
            # With bf16, accelerate's own policy rounds all parameters, d0 and biases too, their gradients' sums and the
            # loss. They stay in float32: what is computed in bf16 is autocast's to say, as without FSDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.remove_callback(PrinterCallback)
        self.add_callback(self.skip)
        self.add_callback(LogWhereSaved())
        self.add_callback(RefuseUnsharded(self.config.fsdp))

    def get_train_dataloader(self) -> DataLoader:
        """Not accelerate's: every process reads its own streams, and a row is read when it is trained on."""
        workers = int(self.config.prefetch)
        return DataLoader(
            self.rows,
            batch_size=self.config.micro_batch,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=4 * self.args.gradient_accumulation_steps if workers else None,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.positions |= batch.pop("positions")
        return batches, items

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_names(model)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """Of the loss in training. accelerate puts a model's `forward` into autocast, but not where it shards it.

        There autocast keeps no copies of weights: each is needed once, and they would outlive what FSDP has gathered.
        """
        if not self.is_fsdp_enabled:
            return super().autocast_smart_context_manager(cache_enabled)
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss to be logged; where it is not finite, the last one that was, as the step is going to be skipped."""
        self.began = self.began or (time.perf_counter(), self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.last_loss = torch.where(loss.isfinite(), loss, self.last_loss.to(loss.device))
        return self.last_loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss of all labels in the held-out rows, whatever the batches and processes they are dealt to.

        Trainer's own is a mean of means over batches, in which some rows stand twice where they do not divide.
        """
        rows, size, world = eval_dataset or self.eval_dataset, self.config.micro_batch, self.args.world_size
        own = rows[self.args.process_index :: world]
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for i in range(0, math.ceil(len(rows) / world), size):
            # Under FSDP every process takes part in every call, also one whose rows are used up.
            batch = {k: x.to(self.args.device) for k, x in collate(own[i : i + size] or rows[:1]).items()}
            # As a model that Trainer has wrapped does by itself: one that only evaluates is not wrapped.
            with self.accelerator.autocast():
                loss = self.model(**batch, num_items_in_batch=torch.tensor(1)).loss
            if own[i : i + size]:
                total += torch.tensor([loss, batch["labels"][:, 1:].ne(IGNORE).sum()], dtype=torch.float64)
        loss, labels = sum(gather_object([total])).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / labels}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.pop("epoch", None)
        if "loss" in logs:
            if self.began is not None:
                seconds, steps = time.perf_counter() - self.began[0], self.state.global_step - self.began[1]
                logs["tokens_per_second"] = steps * self.config.tokens_per_step / seconds
            logs["skipped_steps"] = self.skip.count
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Raises RunError where the disk does not take it, in every process; checkpoints before this one are intact."""
        name = f"checkpoint-{self.state.global_step}"
        self.directory = self.out / "checkpoint.part"
        main, failure = self.is_world_process_zero(), None
        positions = {k: v for part in gather_object([self.positions]) for k, v in part.items()}
        if main:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = first_line(error)
        # A process that failed must not leave the others waiting, so all agree before the checkpoint gets its name.
        failure = next((f for f in gather_object([failure]) if f), None)
        if main and failure is None:
            try:
                # Nothing reads this pickle; config.json holds the run's settings.
                (self.directory / name / "training_args.bin").unlink(missing_ok=True)
                progress = {"positions": positions, "skipped": self.skip.count, "last_loss": self.last_loss.item()}
                progress["files"] = self.rows.documents.sizes
                write_json(self.directory / name / PROGRESS, progress)
                seal(self.directory / name, self.out / name, self.stamp)
                prune(self.out, self.config.keep)
            except (OSError, RunError) as error:
                failure = str(error)
        failure = next((f for f in gather_object([failure]) if f), None)
        if main:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = self.out
        if failure is not None:
            raise RunError(f"{self.out / name}: cannot be written ({failure}); checkpoints before it are intact")


class SkipNonFinite(TrainerCallback):
    """Drops the gradients of a step where they are not finite, so that the optimizer changes nothing; counts them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        gradients = [p.grad for p in objects["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not norm.isfinite():
            self.count += 1
            for p in objects["model"].parameters():
                p.grad = None


class LogWhereSaved(TrainerCallback):
    """Logs the loss at every checkpoint: it is a mean since it was last logged, so that what goes on from there has no
    losses of before to add."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        control.should_log |= control.should_save


class RefuseUnsharded(TrainerCallback):
    """accelerate leaves a model as it is where it cannot shard (on CPU it does), without a word."""

    def __init__(self, fsdp: bool) -> None:
        self.fsdp = fsdp

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        whole = [name for name, p in objects["model"].named_parameters() if not isinstance(p, DTensor)]
        if self.fsdp and whole:
            kind = f"{args.distributed_state.distributed_type.value} on {args.device.type}"
            takes = "several GPUs under torchrun"
            raise RunError(f"fsdp: got parameters that are not sharded, {whole[0]} first ({kind}); takes {takes}")
