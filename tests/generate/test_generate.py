"""`osdn generate`: what it prints is what the model says, whatever the batch, the tokenizer or the length."""

import gc
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.decoders import WordPiece as Spaces
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import osdn
from osdn.cli import main
from osdn.data.tokenizer import byte_tokenizer, checkpoint_tokenizer
from osdn.generate import Generate
from osdn.generate.text import Codec, TextStream, continue_texts, prefill, prompt_text
from osdn.models.checkpoint import load_model
from osdn.models.configuration import CACHE

BYTES = Codec(byte_tokenizer())


def make_model(name="osdn-apf", **overrides):
    torch.manual_seed(0)
    size = {"vocab_size": 256, "hidden_size": 24, "num_heads": 2, "head_dim": 8, "intermediate_size": 32}
    model = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{name}-tiny", **{**size, **overrides})).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("d0"):
                p.uniform_(0.2, 2)
            elif p.ndim > 1:
                p.normal_(std=0.5)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    model, path = make_model(), tmp_path / "model"
    model.save_pretrained(path)
    return model, path


def words_tokenizer(words, **special):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = Spaces(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def greedy(model, prompt, count):
    """Without a cache."""
    x = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        for _ in range(count):
            x = torch.cat([x, model(x, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return BYTES.decode(x[0, -count:].tolist())


def test_prompts_of_any_length_are_one_batch():
    model = make_model()
    prompts = ["a", "Once upon a time, ", "é" * 40]
    batch = continue_texts(model, BYTES, prompts, Generate(model=None, max_new_tokens=12))
    assert batch == [greedy(model, prompt, 12) for prompt in prompts]
    assert len(set(batch)) == 3


def test_samples_share_one_pass_over_the_prompt(monkeypatch):
    model, prompt, seen = make_model(), "x" * 1500, []
    forward = model.model.forward

    def spy(input_ids, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    options = Generate(model=None, max_new_tokens=6, samples=5, temperature=1.0, seed=3)
    texts = continue_texts(model, BYTES, [prompt, "y"], options)
    assert seen == [(2, 1024), (2, 475), *[(10, 1)] * 6]
    assert len(set(texts[:5])) > 1
    x, mask = torch.full((2, 1500), ord("x")), torch.ones(2, 1500, dtype=torch.long)
    x[1], mask[1, :-1] = ord("y"), 0
    torch.manual_seed(3)
    whole = model.generate(
        x, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=6, num_return_sequences=5, pad_token_id=0
    )
    assert texts == [BYTES.decode(row) for row in whole[:, 1500:].tolist()]


def test_beams():
    model, prompts = make_model(), ["ab", "a longer prompt"]
    texts = continue_texts(model, BYTES, prompts, Generate(model=None, max_new_tokens=6, beams=4, samples=2))
    for i, prompt in enumerate(prompts):
        x = torch.tensor([list(prompt.encode())])
        alone = model.generate(
            x, num_beams=4, num_return_sequences=2, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0
        )
        assert texts[2 * i : 2 * i + 2] == [BYTES.decode(row[x.shape[1] :]) for row in alone.tolist()]


def test_memory_is_flat_to_16k_tokens(monkeypatch):
    """Whatever went before, a pass and the state keep their size; nothing grows but the tokens and their mask."""
    model = make_model(num_hidden_layers=1, hidden_size=8, num_heads=1, head_dim=8, intermediate_size=8)
    model.generation_config.eos_token_id = None
    widest, live, states = 0, {}, {}
    layer = model.model.layers[0]
    forward = layer.forward

    def spy(x, *, past_key_values, **kwargs):
        nonlocal widest
        widest = max(widest, x.shape[1])
        states[T] = sum(y.nbytes for y in past_key_values.snapshot().values())
        return forward(x, past_key_values=past_key_values, **kwargs)

    def write(_):
        nonlocal step
        step += 1
        if step in (8, 1008):
            gc.collect()
            live[T, step] = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)

    monkeypatch.setattr(layer, "forward", spy)
    for T in (1024, 16384):
        step = 0
        continue_texts(model, BYTES, ["p" * T], Generate(model=None, max_new_tokens=1010, temperature=1.0), write)
    assert widest == 1024
    assert states[1024] == states[16384] == model.config.state_bytes() + 8  # and the count of tokens
    # A token and its mask take 8 bytes each; keys and values would take 64.
    assert 0 < live[16384, 8] - live[1024, 8] <= 48 * (16384 - 1024)
    for T in (1024, 16384):
        assert 0 < live[T, 1008] - live[T, 8] <= 24 * 1000


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_the_stream_is_the_text(content):
    shown = []
    stream = TextStream(BYTES, shown.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in content:
        stream.put(torch.tensor([byte]))
        assert len(stream.tokens) <= 16
    stream.end()
    assert "".join(shown) == content.replace(b"\0", b"").decode(errors="replace")  # 0 is the end of a text


def test_a_tokenizer_of_bytes(tmp_path):
    """ByT5's ids are bytes plus 3; it closes every text, and leaves out what is no character."""
    ByT5Tokenizer().save_pretrained(tmp_path)
    codec, text, shown = Codec(checkpoint_tokenizer(tmp_path, 384)), "naïve €5, 終わり 🙂" * 3, []
    tokens = codec.encode(text)
    assert tokens == [byte + 3 for byte in text.encode()]
    stream = TextStream(codec, shown.append)
    for token in [0, *tokens]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == text


def test_byte_fallback():
    """Decodes bytes that are not whole characters yet to one mark each, those of whole ones before them included."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    text, shown = "終わりまで 🙂🙂 é naïve" * 3, []
    stream = TextStream(codec, shown.append)
    for byte in [0, *text.encode()]:
        stream.put(torch.tensor([257 if byte == 32 else byte + 1]))
        assert text.startswith("".join(shown))
    stream.end()
    assert "".join(shown) == text


def test_the_stream_shows_what_is_whole_at_once():
    shown = []
    stream = TextStream(BYTES, shown.append)
    stream.put(torch.tensor([[1, 2]]))
    for byte in "aé".encode():
        stream.put(torch.tensor([byte]))
    assert shown == ["a", "", "é"]


def test_a_tokenizer_of_its_own(tmp_path, checkpoint, capsys):
    model, path = checkpoint
    special = {"eos_token": "w200"}
    words_tokenizer([f"w{i}" for i in range(255)], **special).save_pretrained(path)
    codec = Codec(checkpoint_tokenizer(path, 256))
    assert codec.encode("w1 w200 w2") == [2, 201, 3]  # special tokens in a prompt are read as such
    assert main(["generate", str(path), "--prompt", "w1 w2", "--max-new-tokens", "30"]) == 0
    with torch.no_grad():
        tokens = model.generate(torch.tensor([[2, 3]]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 2:]
    assert capsys.readouterr().out == codec.decode(tokens.tolist()) + "\n"
    assert len(set(tokens.tolist())) > 3
    words_tokenizer([f"w{i}" for i in range(400)]).save_pretrained(path)
    assert main(["generate", str(path), "--prompt", "w1 w390"]) == 2
    assert "whose tokenizer has 401 tokens; takes at most the model's 256" in capsys.readouterr().err
    (path / "tokenizer.json").write_text("{")
    assert main(["generate", str(path), "--prompt", "w1"]) == 2
    assert re.fullmatch(
        r"osdn: checkpoint: got \S+model, whose tokenizer cannot be read \(.+\)\n", capsys.readouterr().err
    )
    small = make_model(vocab_size=53)
    small.save_pretrained(tmp_path / "small")
    assert main(["generate", str(tmp_path / "small"), "--prompt", "a"]) == 2
    assert (
        "small, without tokenizer files and with 53 tokens; takes a tokenizer beside the model"
        in capsys.readouterr().err
    )


def test_prompt_file_and_standard_input_say_the_same(checkpoint, tmp_path, capsys, monkeypatch):
    model, path = checkpoint
    expected = greedy(model, "Zwölf\n", 20) + "\n"
    arguments = ["generate", str(path), "--max-new-tokens", "20"]
    assert main([*arguments, "--prompt", "Zwölf\n"]) == 0
    assert capsys.readouterr().out == expected
    (tmp_path / "prompt").write_text("Zwölf\n")
    assert main([*arguments, "--file", str(tmp_path / "prompt")]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zwölf\n".encode())))
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected
    assert main([*arguments, "--prompt", "Zwölf\n", "b", "--samples", "2", "--temperature", "1"]) == 0
    assert len(re.findall(r"^\[prompt [12], continuation [12]\]$", capsys.readouterr().out, re.MULTILINE)) == 4


def test_text_comes_out_while_it_is_made(checkpoint):
    """A pipe gets the first characters before the last token exists; Ctrl-C ends it with status 130, no traceback."""
    _, path = checkpoint
    command = [sys.executable, "-m", "osdn.cli", "generate", str(path), "--prompt", "a", "--max-new-tokens", "1000000"]
    # SIGINT is ignored in a shell's background, and children inherit that.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"osdn: interrupted\n")


def test_a_reader_that_has_had_enough(checkpoint):
    _, path = checkpoint
    command = [sys.executable, "-m", "osdn.cli", "generate", str(path), "--prompt", "a", "--max-new-tokens", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_full_disk(checkpoint):
    _, path = checkpoint
    command = [sys.executable, "-m", "osdn.cli", "generate", str(path), "--max-new-tokens", "2", "--prompt"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    commands = [[*command, "a"], [*command, "a", "b"], [*command[:3], "--version"]]  # the first printed as it grows
    for full_command in commands:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(full_command, stdout=full, stderr=subprocess.PIPE, env=buffered)
        assert (done.stderr, done.returncode) == (b"osdn: [Errno 28] No space left on device\n", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "\udcff"], r"prompt: '\\udcff', half of a character; takes Unicode text"),
        (["--prompt", "a", "--seed", "-1"], r"seed: got -1, takes a number in \[0, 2\^63\)"),
        (["--prompt", ""], "prompt: got an empty text, takes at least one token"),
        (["--prompt", "a", ""], "prompt: got an empty text, takes at least one token"),
        (["--prompt", "a", "--file", "b"], "prompt, file: got both, takes one of the two"),
        (["--file", "none"], r"file: got none, which cannot be read \(No such file or directory\)"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: got 0, takes a number >= 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: got -1.0, takes a number >= 0"),
        (["--prompt", "a", "--top-p", "1.5"], r"top_p: got 1.5, takes a number in \(0, 1\]"),
        (
            ["--prompt", "a", "--samples", "2"],
            "samples: got 2 at temperature 0, takes 1, or a temperature > 0, or beams",
        ),
        (["--prompt", "a", "--top-k", "3"], "top_k: got 3 at temperature 0, takes 0, or a temperature > 0"),
        (["--prompt", "a", "--top-p", ".5"], "top_p: got 0.5 at temperature 0, takes 1, or a temperature > 0"),
    ],
)
def test_a_bad_request_is_one_line(arguments, message, checkpoint, capsys):
    _, path = checkpoint
    try:
        status = main(["generate", str(path), *arguments])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(message, error), error


def test_what_is_no_checkpoint(checkpoint, tmp_path, capsys):
    _, path = checkpoint
    for directory, message in [
        (tmp_path / "none", r"\S+none: does not exist, takes the directory of a checkpoint"),
        (tmp_path, r"\S+: not a checkpoint, there is no config.json in it"),
    ]:
        assert main(["generate", str(directory), "--prompt", "a"]) == 2
        assert re.fullmatch(rf"osdn: {message}\n", capsys.readouterr().err)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", str(path), "--prompt", "a"]) == 2
    assert re.fullmatch(r"osdn: \S+: weights cannot be read \(.+\)\n", capsys.readouterr().err)
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"file: got .*latin, which is not UTF-8 at byte 0"):
        prompt_text(tmp_path / "latin")


def test_a_hybrid_generates_too(tmp_path):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
        partial_rotary_factor=1.0,  # so that a wrong position shows
    )
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.5)
    osdn.precondition_model(model, {"feedback": "beta_aware"}).save_pretrained(tmp_path)
    loaded, prompts = load_model(tmp_path), ["ab", "a longer prompt"]
    # Also where a single column of padding would be left: transformers takes that for no padding.
    for batch in (prompts, ["ab", "a"], ["x", "y" * 1026]):
        texts = continue_texts(loaded, BYTES, batch, Generate(model=None, max_new_tokens=8))
        assert texts == [greedy(model, prompt, 8) for prompt in batch]
    # A padded prefill, by what it leaves: the short row sees its own positions.
    rows = [BYTES.encode(prompt) for prompt in prompts]
    x = torch.tensor([[0] * 13 + rows[0], rows[1]])
    mask = torch.tensor([[0] * 13 + [1] * 2, [1] * 15])
    with torch.no_grad():
        cache = prefill(loaded, x[:, :-1], mask[:, :-1])
        last = {"attention_mask": mask, "position_ids": torch.tensor([[1], [14]]), CACHE: cache}
        batch = loaded(x[:, -1:], **last).logits[:, 0]
        alone = torch.stack([model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])
    assert (batch - alone).abs().max() < 1e-4 * alone.abs().max()  # float32
