"""`osdn generate`: continue a text with a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, or several as one batch; a single continuation is printed as it grows.

    The state is of constant size: memory does not grow with the text, beyond the tokens themselves."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint of an OSDN model, or of a hybrid upgraded by osdn convert."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    file: Path | None = None
    """File whose text to continue. Without prompt and file: standard input."""
    max_new_tokens: int = 256
    """Tokens to add at most; the model's end-of-text token ends a continuation before."""
    samples: int = 1
    """Continuations of each prompt; they share one pass over it."""
    temperature: float = 0.0
    """0: the likeliest token each time; higher: drawn at random."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability."""
    beams: int = 1
    """Beam search of this width."""
    seed: int = 0
    """Of what is drawn."""

    def check(self) -> None:
        """Raises ValueError for a field out of range; not on construction, or the command line would frame the line."""
        for name, least in (("max_new_tokens", 1), ("samples", 1), ("beams", 1), ("top_k", 0), ("temperature", 0)):
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"{name}: got {value}, takes a number >= {least}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, takes a number in [0, 2^63)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, takes a number in (0, 1]")
        if self.samples > 1 and self.temperature == 0 and self.samples > self.beams:
            raise ValueError(f"samples: got {self.samples} at temperature 0, takes 1, or a temperature > 0, or beams")
        for name, all_tokens in (("top_k", 0), ("top_p", 1)):
            if (value := getattr(self, name)) != all_tokens and self.temperature == 0:
                raise ValueError(f"{name}: got {value} at temperature 0, takes {all_tokens}, or a temperature > 0")
        if self.prompt and self.file is not None:
            raise ValueError("prompt, file: got both, takes one of the two")

    def run(self) -> None:
        self.check()
        import torch

        from osdn.data.tokenizer import checkpoint_tokenizer
        from osdn.generate.text import Codec, continue_texts, prompt_text
        from osdn.models.checkpoint import load_model

        model = load_model(self.model)
        codec = Codec(checkpoint_tokenizer(self.model, model.config.get_text_config().vocab_size))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        prompts = self.prompt or (prompt_text(self.file),)
        alone = len(prompts) == self.samples == self.beams == 1

        def write(text: str) -> None:
            print(text, end="", flush=True)

        try:
            texts = continue_texts(model, codec, prompts, self, write if alone else None)
        except KeyboardInterrupt:
            print()
            raise
        if alone:
            print()
            return
        for i, text in enumerate(texts):
            print(f"[prompt {i // self.samples + 1}, continuation {i % self.samples + 1}]\n{text}")
