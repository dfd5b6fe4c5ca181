"""Training runs by name, model_data_hardware: a function that returns a config, to be changed field by field.

`osdn train NAME --field VALUE`, or `osdn.train.train(replace(recipe(), field=value))`. The paper is arXiv 2605.13473;
what it leaves open is this library's choice: weight decay, AdamW's betas, the tokenizer, the share that is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from osdn.train.config import TrainConfig

__all__ = ["RECIPES", "osdn_1b3_fineweb_8gpu", "osdn_340m_fineweb_8gpu", "tiny_text_cpu"]


def tiny_text_cpu() -> TrainConfig:
    """A model of 0.6M parameters on bytes of local text, minutes on two cores."""
    return TrainConfig(
        preset="osdn-apf-tiny",
        held_out=0.1,
        context=256,
        streams=16,  # every row of a batch from a document of its own: they are longer than a batch
        steps=200,
        batch_size=16,
        micro_batch=16,
        lr=3e-3,
        warmup_steps=20,
        device="cpu",
    )


def osdn_340m_fineweb_8gpu() -> TrainConfig:
    """The paper's 340M run: the plain rule on 10.7B tokens of FineWeb-Edu, 524,288 tokens a step."""
    return TrainConfig(
        preset="osdn-340m",
        data=("HuggingFaceFW/fineweb-edu",),
        subset="sample-10BT",
        held_out=0.01,
        tokenizer="fla-hub/transformer-1.3B-100B",  # 32,000 tokens; flame trains with it
        context=4096,
        shuffle=10_000,
        streams=8,
        prefetch=True,
        steps=20_480,
        batch_size=128,
        micro_batch=16,
        warmup_steps=1024,
        bf16=True,
        save_every=1024,
        eval_every=2048,
    )


def osdn_1b3_fineweb_8gpu() -> TrainConfig:
    """The paper's 1.3B run: with forgetting (APF), on 100B tokens of FineWeb-Edu, 524,288 tokens a step, sharded."""
    return replace(
        osdn_340m_fineweb_8gpu(),
        preset="osdn-apf-paper-1.3b",
        subset="sample-100BT",
        steps=190_735,
        warmup_steps=2048,
        micro_batch=4,
        checkpoint_activations=True,
        fsdp=True,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    f.__name__: f for f in (tiny_text_cpu, osdn_340m_fineweb_8gpu, osdn_1b3_fineweb_8gpu)
}
