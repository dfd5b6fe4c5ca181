import json
from dataclasses import replace

import pytest

import osdn
from osdn.recipes import RECIPES, osdn_1b3_fineweb_8gpu, osdn_340m_fineweb_8gpu, tiny_text_cpu
from osdn.runs import fingerprint
from osdn.train.config import TrainConfig


def test_the_papers_settings():
    """SPEC: 524,288 tokens a step at context 4096, AdamW 1e-3 to a tenth, eps 1e-15, clip 1, bf16."""
    small, large = osdn_340m_fineweb_8gpu(), osdn_1b3_fineweb_8gpu()
    for config, steps, warmup, subset in ((small, 20_480, 1024, "10BT"), (large, 190_735, 2048, "100BT")):
        assert (config.steps, config.warmup_steps, config.subset) == (steps, warmup, f"sample-{subset}")
        assert (config.tokens_per_step, config.context) == (524_288, 4096)
        assert (config.lr, config.min_lr, config.eps, config.clip, config.weight_decay) == (1e-3, 0.1, 1e-15, 1.0, 0.1)
        assert config.bf16
        assert config.data == ("HuggingFaceFW/fineweb-edu",)
        assert config.accumulation(8) == 128 // 8 // config.micro_batch
    assert small.steps * small.tokens_per_step == 10_737_418_240
    assert osdn.OSDNConfig.preset(small.preset).preconditioner["forget"] == "none"
    assert osdn.OSDNConfig.preset(large.preset).preconditioner["forget"] == "data_dependent"
    assert large.fsdp


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_named_and_described(name):
    recipe = RECIPES[name]
    assert recipe.__name__ == name
    assert recipe.__doc__
    assert json.loads(json.dumps(recipe().as_dict())) == recipe().as_dict()
    osdn.OSDNConfig.preset(recipe().preset)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 2e-3), ("batch_size", 32), ("seed", 1), ("bf16", True), ("size", {"num_heads": 4}), ("shuffle", 9)],
)
def test_what_decides_the_result_is_identity(field, value):
    config = tiny_text_cpu()
    other = fingerprint(replace(config, **{field: value}).identity("data", "tokens"))
    assert other != fingerprint(config.identity("data", "tokens"))
    for digests in (("other data", "tokens"), ("data", "other tokens")):
        assert fingerprint(config.identity(*digests)) != fingerprint(config.identity("data", "tokens"))


def test_where_and_how_often_is_not_identity(tmp_path):
    config = tiny_text_cpu()
    elsewhere = replace(config, out=tmp_path, save_every=7, micro_batch=4, log_every=1, prefetch=True, data=("x",))
    assert elsewhere.identity("data", "tokens") == config.identity("data", "tokens")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps: got 0, takes a number >= 1"),
        ({"context": 1}, "context: got 1, takes a number >= 2"),
        ({"lr": 0.0}, "lr: got 0.0, takes a finite float > 0"),
        ({"lr": float("nan")}, "lr: got nan, takes a finite float > 0"),
        ({"lr": float("inf")}, "lr: got inf, takes a finite float > 0"),
        ({"weight_decay": float("inf")}, "weight_decay: got inf, takes a finite number >= 0"),
        ({"min_lr": 1.5}, r"min_lr: got 1.5, takes a number in \[0, 1\]"),
        ({"betas": (0.9, 2.0)}, r"betas: got \(0.9, 2.0\), takes numbers in \[0, 1\)"),
        ({"held_out": 1.0}, r"held_out: got 1.0, takes a share in \[0, 1\)"),
        ({"streams": 3}, "streams: got 3, takes a divisor of batch_size, 16"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**fields).check()


def test_rows_are_dealt_to_processes():
    config = TrainConfig(batch_size=16, micro_batch=2, streams=4)
    assert [config.accumulation(n) for n in (1, 2, 4)] == [8, 4, 2]
    with pytest.raises(ValueError, match=r"^streams: got 4, takes a multiple of the number of processes, 3"):
        config.accumulation(3)
    with pytest.raises(ValueError, match=r"^micro_batch: got 8, takes a divisor of the 4 rows that each of 4"):
        replace(config, micro_batch=8).accumulation(4)
