"""What is seen while a run trains: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SECONDS_BETWEEN_LINES = 10.0


class ShowProgress(TrainerCallback):
    """Step, loss, tokens/s and the time that is left, of this process's own steps."""

    def __init__(self, console: Console, tokens_per_step: int) -> None:
        self.console, self.tokens_per_step = console, tokens_per_step
        self.loss = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]} {task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        self.began = self.last_line = time.monotonic()
        self.first = state.global_step
        self.task = self.bar.add_task("step", total=state.max_steps, completed=self.first, loss="", speed="")
        self.bar.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        now = time.monotonic()
        rate = (state.global_step - self.first) / (now - self.began)
        speed = f"{rate * self.tokens_per_step:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, loss=self.loss, speed=speed)
        last = state.global_step == state.max_steps
        if not self.console.is_terminal and (last or now - self.last_line > _SECONDS_BETWEEN_LINES):
            self.last_line = now
            left = timedelta(seconds=round((state.max_steps - state.global_step) / rate))
            self._say(f"step {state.global_step}/{state.max_steps} {self.loss} {speed}, {left} left")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        logs = objects["logs"]
        if "loss" in logs:
            skipped = f", {logs['skipped_steps']} skipped" if logs["skipped_steps"] else ""
            self.loss = f"loss {logs['loss']:.4f}{skipped}"
        elif "eval_loss" in logs:
            self._say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        self.bar.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
