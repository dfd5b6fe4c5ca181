import math
import re

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

import osdn
from osdn.data.tokenizer import byte_tokenizer
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.perplexity import Perplexity, token_losses
from osdn.models.configuration import MIXERS

TINY = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokens(B=3, T=90, seed=0):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


def whole(model, ids):
    """The definition: all logits at once."""
    log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
    return -log_p.gather(2, ids[:, 1:, None])[..., 0].detach()


def watch(model):
    """Of every forward pass: length of its input, its cache, and numbers in that by then."""
    seen = []

    def note(module, args, kwargs, out):  # noqa: ARG001
        layers = [] if out.past_key_values is None else out.past_key_values.layers
        states = [s for layer in layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        seen.append(
            (kwargs["input_ids"].shape[1], out.past_key_values, sum(s.numel() for s in states if s is not None))
        )

    model.register_forward_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("preset", MIXERS)
def test_a_block_in_segments_is_the_block_at_once(save, preset):
    model = Checkpoint.open(save(preset)).load("cpu", "auto")
    assert model.dtype == torch.float64
    ids = tokens()
    expected, seen = whole(model, ids), watch(model)
    for segment in (7, 32, 89, 90, 500):
        # Chunks begin elsewhere, so the sums differ in order alone.
        torch.testing.assert_close(token_losses(model, ids, segment), expected, rtol=1e-9, atol=1e-9)
    if preset in ("osdn", "osdn-apf", "osdn-apf-paper", "os-gdn", "os-kda"):
        for layer, state in zip(model.model.layers, seen[-1][1].layers, strict=True):
            p = layer.attn.preconditioner
            d_0 = layer.attn.d0 if p.learn_d_init else torch.tensor(p.d_init)
            assert (state.recurrent_states[1] - d_0).abs().amax(-1).min() > 0.05


def test_no_forward_pass_is_longer_than_a_segment(save):
    model = Checkpoint.open(save()).load("cpu", "auto")
    seen = watch(model)
    token_losses(model, tokens(T=2000), 160)
    assert max(length for length, *_ in seen) == 160
    assert len({size for _, _, size in seen[-10:]}) == 1  # what is kept of the past does not grow either


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_models_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=128))
    else:
        model = LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=16, max_position_embeddings=128))
    model.double().save_pretrained(tmp_path / name)
    checkpoint = Checkpoint.open(tmp_path / name)
    model = checkpoint.load("cpu", "auto")
    torch.testing.assert_close(token_losses(model, tokens(), 16), whole(model, tokens()), rtol=1e-9, atol=1e-9)
    (tmp_path / "t").write_text("a" * 999)
    with pytest.raises(ValueError, match="block_size: needs 129 tokens, takes at most the 128 that"):
        Perplexity(checkpoint, [str(tmp_path / "t")], block_size=129, bucket_size=9)


def test_a_cache_that_restarts_is_refused(save):
    model = Checkpoint.open(save()).load("cpu", "auto")

    class Restarts(type(model)):
        def forward(self, *args, cache=None, past_key_values=None, **kwargs):  # noqa: ARG002
            return super().forward(*args, **kwargs)

    model.__class__ = Restarts
    with pytest.raises(ValueError, match="segment_size: a Restarts read in two segments is off by"):
        token_losses(model, tokens(), 32)
    torch.testing.assert_close(token_losses(model, tokens(), 90), whole(model, tokens()), rtol=1e-9, atol=1e-9)


def test_angles_of_positions_that_stay_in_float32():
    """In a float64 model of transformers; a segment boundary changes how they are rounded, and that is no restart."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads)).double().eval()
    model = osdn.precondition_model(model, {"feedback": "beta_aware", "d_init": 0.5})
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    ids = tokens(B=1, T=128)
    torch.testing.assert_close(token_losses(model, ids, 50), whole(model, ids), rtol=1e-5, atol=1e-5)


def test_what_stands_before_every_text_is_context_alone(save, text):
    path = save()
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 33)])
    tokenizer.save_pretrained(path)
    (text / "c.txt").write_text("more ")
    (text / "d.txt").write_text("and more, and more " * 6)
    checkpoint = Checkpoint.open(path)
    task = Perplexity(checkpoint, [str(text)], block_size=120, bucket_size=50, segment_size=40)
    assert task.policy["documents"] == "concatenated, begin of text before each, not counted, end of text behind each"
    stream = b"".join(b"!" + (text / name).read_bytes() + b"\0" for name in ("a.txt", "b.txt", "c.txt", "d.txt"))
    begins = {0} | {i + 1 for i, byte in enumerate(stream) if byte == 0}
    model, all_losses, hits = checkpoint.load("cpu", "auto"), [], 0
    for i, record in enumerate(task.score(model, range(len(task)))):
        block = stream[120 * i : 120 * (i + 1)]
        losses, known = whole(model, torch.tensor([list(block)]))[0].tolist(), set()
        counted = [t for t in range(1, 120) if 120 * i + t not in begins]
        all_losses += [losses[t - 1] for t in counted]
        assert record["tokens"] == [sum(t // 50 == b for t in counted) for b in range(3)]
        for t in range(1, 120):
            hits += t in counted and block[t - 1 : t + 1] in known
            known.add(block[t - 1 : t + 1])
    records = task.score(model, range(len(task)))
    assert sum(sum(r["tokens"]) for r in records) == len(all_losses) < 119 * len(task)
    assert sum(sum(r["losses"]) for r in records) == pytest.approx(sum(all_losses), rel=1e-9)
    assert sum(r["hits"] for r in records) == hits
    (text / "a.txt").write_text("x" * 6)
    (text / "b.txt").write_text("y" * 30)
    task = Perplexity(checkpoint, [str(text)], block_size=9, bucket_size=8, limit=1)  # "!" alone in the second bucket
    assert [name for name in task.metrics(task.score(model, [0])) if " " in name] == [
        "AR-hit loss",
        "other loss",
        "AR-hit share",
        "perplexity 0-8",
    ]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! ! $A", special_tokens=[("!", 33)])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="block_size: got 2, by which no token of the text is read behind another"):
        Perplexity(Checkpoint.open(path), [str(text)], block_size=2, bucket_size=2, limit=1)


def test_buckets_and_hits_by_hand(save, text):
    checkpoint = Checkpoint.open(save())
    task = Perplexity(checkpoint, [str(text)], block_size=150, bucket_size=60, segment_size=40)
    model = checkpoint.load("cpu", "auto")
    stream = b"".join((text / name).read_bytes() + b"\0" for name in ("a.txt", "b.txt"))
    assert len(task) == len(stream) // 150 == 4
    assert task.cut == {"tokens_behind_the_last_block": len(stream) - 600}
    sums = {0: [], 1: [], 2: [], "hit": [], "rest": []}
    for i in range(4):
        block = stream[150 * i : 150 * (i + 1)]
        losses = whole(model, torch.tensor([list(block)]))[0].tolist()
        seen = set()
        for t in range(1, 150):
            bigram = block[t - 1 : t + 1]
            sums[t // 60].append(losses[t - 1])
            sums["hit" if bigram in seen else "rest"].append(losses[t - 1])
            seen.add(bigram)
    assert [len(sums[i]) for i in range(3)] == [4 * 59, 4 * 60, 4 * 30]
    found = task.metrics(task.score(model, range(4)))
    mean = {key: sum(values) / len(values) for key, values in sums.items()}
    expected = {
        "loss": sum(sum(sums[i]) for i in range(3)) / 596,
        "AR-hit loss": mean["hit"],
        "other loss": mean["rest"],
        "AR-hit share": len(sums["hit"]) / 596,
        "perplexity 0-60": math.exp(mean[0]),
        "perplexity 60-120": math.exp(mean[1]),
        "perplexity 120-150": math.exp(mean[2]),
    }
    expected["perplexity"] = math.exp(expected["loss"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-9), name
        assert found[name]["stderr"] > 0
    assert [found[f"perplexity {x}"]["x"] for x in ("0-60", "60-120", "120-150")] == [30, 90, 135]


def test_a_batch_changes_nothing(save, text):
    checkpoint = Checkpoint.open(save("os-kda"))
    task = Perplexity(checkpoint, [str(text)], block_size=150, bucket_size=60, segment_size=40)
    model = checkpoint.load("cpu", "auto")
    together, alone = task.score(model, [3, 0, 2, 1]), [task.score(model, [i])[0] for i in (3, 0, 2, 1)]
    for a, b in zip(together, alone, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-11)


def test_a_model_that_is_lost_has_an_infinite_perplexity(save, text):
    task = Perplexity(Checkpoint.open(save()), [str(text)], block_size=20, bucket_size=20)
    record = {"losses": [19 * 800.0], "tokens": [19], "hit_loss": 0.0, "hits": 0}
    assert task.metrics([record, record])["perplexity"]["value"] == math.inf


def test_what_looks_like_a_special_token_is_text(save, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(save())
    checkpoint = Checkpoint.open(save())
    assert checkpoint.tokenizer("Ā")["input_ids"] == [0] != list("Ā".encode())
    (tmp_path / "t").write_text("abĀcd")
    task = Perplexity(checkpoint, [str(tmp_path / "t")], block_size=7, bucket_size=7)
    assert task.blocks.tolist() == [[*"abĀcd".encode(), 0]]


def test_limit_and_refusals(save, text):
    checkpoint = Checkpoint.open(save())
    task = Perplexity(checkpoint, [str(text)], block_size=150, bucket_size=60, limit=2)
    assert (len(task), task.cut) == (2, {"tokens_behind_the_last_block": 738 - 300})
    with pytest.raises(ValueError, match="block_size: got 739, takes 2 to 738, the tokens there are in text"):
        Perplexity(checkpoint, [str(text)], block_size=739)
    with pytest.raises(ValueError, match="bucket_size: got 1, takes an int >= 2"):
        Perplexity(checkpoint, [str(text)], block_size=150, bucket_size=1)
    (text / "c.bin").write_bytes(b"abc\xff")
    with pytest.raises(
        ValueError, match=re.escape(f"text: got {text}/c.bin, which is not UTF-8 at byte 3; takes UTF-8")
    ):
        Perplexity(checkpoint, [str(text)], block_size=150)
