"""One run: what is checked before any work, the work, and what is written at its end."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from osdn.data.documents import Documents, open_documents
from osdn.data.packed import PackedRows, Row, fills_streams, held_out_rows, training_texts, unigram_entropy
from osdn.data.tokenizer import digest, load_tokenizer
from osdn.models import OSDNConfig, OSDNForCausalLM
from osdn.runs import RunError, fingerprint
from osdn.runs.provenance import provenance
from osdn.runs.store import claim, differences, read_json, write_json
from osdn.train.checkpoint import MANIFEST, damage, latest, seal
from osdn.train.config import TrainConfig
from osdn.train.progress import ShowProgress
from osdn.train.sharded import load_sharded
from osdn.train.trainer import PROGRESS, OSDNTrainer

T = TypeVar("T")


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """See `osdn.train.train`."""
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    console = console if rank == 0 else Console(quiet=True)

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    accumulation = config.accumulation(processes)
    if config.fsdp and processes == 1:
        raise ValueError("fsdp: got one process, takes several GPUs under torchrun")
    if config.wandb and find_spec("wandb") is None:
        raise ValueError("wandb: got True, but it is not installed; takes `pip install wandb`, or False")
    task = Task.load(config)
    identity = config.identity(task.documents.name, digest(task.tokenizer))
    stamp = fingerprint(identity)
    out = config.out or Path("runs") / f"train-{stamp}"
    arguments = _arguments(config, out, accumulation)

    def start() -> tuple[dict[str, Any] | None, Path | None]:
        _refuse_what_would_be_replaced(out)
        held.enter_context(claim(out, identity, say))
        if (results := read_json(out / "results.json", {"stamp", "config"}, say)) is None:
            return None, latest(out, stamp, say)
        if lacks := damage(out / "model"):
            again = "move results.json away, and the same command writes it anew"
            raise RunError(f"{out}: finished before, but of its model {lacks}; {again}")
        return results, None

    with ExitStack() as held:
        results, checkpoint = _on_main_process(rank, start)
        if results is not None:
            changed = differences(results["config"], config.as_dict() | {"out": results["config"]["out"]})
            now = f", and is not done anew with other options ({changed})" if changed else ""
            say(f"{out}: finished before{now}; results.json tells all")
            return results
        progress: dict[str, Any] = {"positions": {}, "skipped": 0, "last_loss": 0.0, "files": task.documents.sizes}
        if checkpoint is not None:
            progress = json.loads((checkpoint / PROGRESS).read_bytes())
            say(f"{out}: going on from {checkpoint.name}")
            if progress["files"] != task.documents.sizes:
                say("note: files of data have other sizes than before; it goes on with what they hold now")

        disable_progress_bar()  # of every file that is written; ShowProgress stays
        set_seed(config.seed)
        model = OSDNForCausalLM(task.model_config)
        rows = PackedRows(
            task.documents,
            task.tokenizer,
            context=config.context,
            shuffle=config.shuffle,
            seed=config.seed,
            held_out=config.held_out,
            streams=config.streams,
            own=range(rank, config.streams, processes),
            positions={int(stream): position for stream, position in progress["positions"].items()},
        )
        callbacks: list[Any] = [ShowProgress(console, config.tokens_per_step)]
        step = 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])
        if rank == 0:
            board = TensorBoardCallback(SummaryWriter(out / "tensorboard", purge_step=step))
            board.logging_dir = str(out / "tensorboard")  # for the evaluation at the end, when that writer is closed
            callbacks.append(board)
        trainer = OSDNTrainer(
            config=config,
            out=out,
            stamp=stamp,
            rows=rows,
            progress=progress,
            model=model,
            args=arguments,
            eval_dataset=task.held_out or None,
            callbacks=callbacks,
        )
        say(
            f"{out}: {config.preset}, {model.num_parameters():,} parameters, {task.documents.name}, "
            f"{config.steps} steps of {config.tokens_per_step:,} tokens, {accumulation} micro-batch(es) on each of "
            f"{processes} {arguments.device.type} process(es)"
        )
        try:
            if step < config.steps:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            else:
                assert checkpoint is not None
                _finish_from(trainer, checkpoint)
            return _conclude(trainer, task, identity, say)
        except OSError as error:  # of TensorBoard on a full disk, or of a dataset's network
            raise RunError(f"{out}: stopped by {error}; the same command goes on from the last checkpoint") from error


@dataclass(frozen=True)
class Task:
    """What a config names, found and checked."""

    tokenizer: PreTrainedTokenizerBase
    model_config: OSDNConfig
    documents: Documents
    held_out: list[Row]

    @classmethod
    def load(cls, config: TrainConfig) -> Task:
        """Raises ValueError for a tokenizer, model or data that do not exist or do not fit."""
        tokenizer = load_tokenizer(config.tokenizer)
        sizes = {"vocab_size": len(tokenizer), **config.size}
        if sizes["vocab_size"] < len(tokenizer):
            takes = f"at least the tokenizer's {len(tokenizer)}"
            raise ValueError(f"size: got vocab_size {sizes['vocab_size']}, takes {takes}")
        model_config = OSDNConfig.preset(config.preset, **sizes, eos_token_id=tokenizer.eos_token_id)
        named: dict[str, Any] = {"subset": config.subset, "split": config.split, "text_field": config.text_field}
        documents = open_documents("data", config.data, **named)
        if documents.sizes:  # files, not a dataset that is streamed from elsewhere
            _require_documents(documents, config)
        held_out: list[Row] = []
        if config.eval_sequences and (config.eval_data or config.held_out):
            source = open_documents("eval_data", config.eval_data, **named) if config.eval_data else documents
            share = 1.0 if config.eval_data else config.held_out
            held_out = held_out_rows(source, tokenizer, context=config.context, rows=config.eval_sequences, share=share)
            if not held_out:
                less = f"less than a row of {config.context} tokens"
                if config.eval_data:
                    raise ValueError(f"eval_data: got {less}; takes more text")
                raise ValueError(f"held_out: got {share}, which leaves out {less}; takes more of data, or 0 for none")
        return cls(tokenizer, model_config, documents, held_out)


def _refuse_what_would_be_replaced(out: Path) -> None:
    """Raises ValueError for directories of these names that no run has written."""
    for name in ("model", "model.part", "checkpoint.part"):
        known = (out / "config.json").exists() or (out / name / MANIFEST).exists()
        if (out / name).exists() and not known:
            raise ValueError(f"out: got {out}, whose {name} is not of `osdn train`; takes a new path")


def _require_documents(documents: Documents, config: TrainConfig) -> None:
    """Raises ValueError where a stream would have no document to train on."""
    if fills_streams(documents, config.streams, config.held_out):
        return
    count = sum(1 for _ in training_texts(documents.source, documents, config.held_out))
    if not count:
        raise ValueError(f"data: got no documents to train on ({documents.name}), takes more, or held_out 0")
    divisors = (n for n in range(1, config.streams) if config.batch_size % n == 0)
    most = max(n for n in divisors if fills_streams(documents, n, config.held_out))
    got = f"got {config.streams}, of which one would get none of {count} document(s) to train on"
    raise ValueError(f"streams: {got}; takes {most}")


def _arguments(config: TrainConfig, out: Path, accumulation: int) -> TrainingArguments:
    # transformers' name for it since some release after 5.17.
    renamed = any(field.name == "activation_checkpointing" for field in fields(TrainingArguments))
    # FSDP brings its own recomputation, which knows of its gathered parameters.
    recompute = config.checkpoint_activations and not config.fsdp
    sharding: dict[str, Any] = {f"{'activation' if renamed else 'gradient'}_checkpointing": recompute}
    if config.fsdp:
        own = {"state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": config.checkpoint_activations}
        sharding |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True, **own}}
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr},
        warmup_steps=config.warmup_steps,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=config.seed,
        bf16=config.bf16,
        torch_compile=config.compile,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        logging_steps=config.log_every,
        save_steps=config.save_every,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        report_to="wandb" if config.wandb else "none",
        disable_tqdm=True,
        ignore_data_skip=True,  # PackedRows begins at its place
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        use_cache=True,  # what the model's config is to say; training makes no cache whatever it says
        **sharding,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process that sees more would spread its batches by DataParallel
    return arguments


def _on_main_process(rank: int, action: Callable[[], T]) -> T:
    """What `action` returns or raises in the main process, in every process."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except (ValueError, RunError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _finish_from(trainer: OSDNTrainer, checkpoint: Path) -> None:
    """All steps were done before: put the checkpoint's weights and losses in place."""
    if trainer.config.fsdp:
        load_sharded(trainer.model, checkpoint)
    else:
        trainer.model.load_state_dict(OSDNForCausalLM.from_pretrained(checkpoint).state_dict())
    trainer.model.to(trainer.args.device)
    trainer.state = type(trainer.state).load_from_json(str(checkpoint / "trainer_state.json"))


def _conclude(trainer: OSDNTrainer, task: Task, identity: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate, save the model, and write results.json last."""
    config, out, main = trainer.config, trainer.out, trainer.is_world_process_zero()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    results = {
        "stamp": trainer.stamp,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.as_dict(),
        "identity": identity,
        **provenance(),
        "device_type": trainer.args.device.type,
        "processes": trainer.args.world_size,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "skipped_steps": trainer.skip.count,
        "losses": [[entry["step"], entry["loss"]] for entry in history],
        "tokens_per_second": history[-1]["tokens_per_second"] if history else None,
    }
    if task.held_out:
        loss = evaluated[config.steps] if config.steps in evaluated else trainer.evaluate()["eval_loss"]
        unigram = unigram_entropy(task.held_out)
        results |= {"eval_loss": loss, "eval_bits": loss / math.log(2), "eval_unigram_entropy": unigram}
        say(f"held-out loss {loss:.4f} nats a token; the entropy of its unigrams is {unigram:.4f}")
    part = out / "model.part"
    if main:
        shutil.rmtree(part, ignore_errors=True)
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(part))
        (part / "training_args.bin").unlink(missing_ok=True)
    if main:
        try:
            if not part.exists():
                trainer.model.save_pretrained(part)
            task.tokenizer.save_pretrained(part)
            shutil.rmtree(out / "model", ignore_errors=True)
            seal(part, out / "model", trainer.stamp)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{out / 'model'}: cannot be written ({error}); the checkpoints are intact") from error
        write_json(out / "results.json", results)
        say(f"model and results.json are in {out}")
    return results
