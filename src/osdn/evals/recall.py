"""Cloze recall in the manner of Just Read Twice (arXiv 2407.05483): FDA, SWDE, SQuAD, each also read twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from osdn.evals.checkpoint import Checkpoint
from osdn.evals.documents import check_fields, digest, read_jsonl
from osdn.evals.results import Metric, Record, ratio
from osdn.generate.text import Codec
from osdn.runs import first_line

SOURCES = {"fda": "hazyresearch/based-fda", "swde": "hazyresearch/based-swde-v2", "squad": "hazyresearch/based-squad"}
KEPT = 50  # tokens of the window that are kept for the answer
NEW_TOKENS = 48
_MAY_BE_BLANK = ("value",)  # some documents of the data sets have no answer; they are left out
_SUMMARY = "Summary of information above..."  # behind it, SWDE's texts begin to ask


class Cloze:
    """Does the greedy continuation of a document and a question contain the answer (`value`, whatever its case)?

    A continuation has 48 tokens at most and ends at the first line break. The prompts:

        fda, swde    D. Key:                       D: `text` without a question at its end
        .._twice     Information about Key. D.\\nD. Key:
        squad        `text`, whose last sentence is to be completed
        squad_twice  `question` `context`\\n`text`

    D is cut to a window of `window` - 50 tokens that begins half its length before the first occurrence of the answer,
    or at the beginning; of documents without the answer, to their last tokens. SQuAD's texts, short ones, are cut to
    their last tokens, so that the sentence to complete stays. Nothing else is cut: a prompt that the model cannot
    read is refused. Documents whose answer has less than two characters are left out.

    Scores are not those of lm-evaluation-harness' `fda`, `swde` and `squad_completion`, which cut nothing.
    """

    kind = "recall"
    version = 2  # 1 read what a tokenizer puts behind every text as part of the prompt

    def __init__(
        self, checkpoint: Checkpoint, name: str, source: Path | None = None, *, window: int = 1_000, limit: int = 0
    ) -> None:
        self.name, self.tokenizer = name, checkpoint.tokenizer
        if window <= KEPT:
            raise ValueError(f"window: got {window}, takes more than the {KEPT} tokens kept for the answer")
        base, twice = name.removesuffix("_twice"), name.endswith("_twice")
        fields = ["text", "value"] if base == "squad" else ["text", "key", "value"]
        if base == "squad" and twice:
            fields += ["question", "context"]
        rows = _hub(SOURCES[base], fields) if source is None else read_jsonl("cloze", source, fields, _MAY_BE_BLANK)
        self.data: dict[str, Any] = {
            "sha256": digest([row[field] for row in rows for field in fields]),
            "sources": SOURCES[base] if source is None else source.name,
        }
        self.prompts, self.answers, self.cut = list[list[int]](), list[str](), {"documents": 0, "answers_lost": 0}
        known = [row for row in rows if len(row["value"].strip()) > 1]
        self.cut["left_out"] = len(rows) - len(known)
        for row in known[: limit or None]:
            answer = row["value"].strip()
            prompt, short = self._prompt(row, answer, base, twice, window - KEPT)
            self.cut["documents"] += short
            self.cut["answers_lost"] += answer.lower() in row["text"].lower() and answer.lower() not in prompt.lower()
            self.prompts.append(Codec(self.tokenizer).encode(prompt))
            self.answers.append(answer)
        if not self.prompts:
            raise ValueError(f"cloze: got {self.data['sources']}, without an answer of two characters or more")
        checkpoint.require(max(map(len, self.prompts)) + NEW_TOKENS, "window")
        self.policy: dict[str, Any] = {
            "window": window,
            "kept": KEPT,
            "new_tokens": NEW_TOKENS,
            "stop": "\n",
            "limit": limit,
            "tokenizer": checkpoint.tokens,
        }

    def __len__(self) -> int:
        return len(self.prompts)

    def order(self) -> Sequence[int]:
        return sorted(range(len(self)), key=lambda i: -len(self.prompts[i]))

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int]) -> list[Record]:
        prompts = [self.prompts[i] for i in indices]
        T = max(map(len, prompts))
        ends = model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if ends is None else ends
        pad = self.tokenizer.pad_token_id or 0
        # On the left, and masked: new tokens follow the prompt, and a prompt's score does not depend on its neighbours.
        ids = torch.tensor([[pad] * (T - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=pad)
        out = model.generate(
            ids,
            attention_mask=mask,
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([_LineBreak(self.tokenizer, T)]),
        )
        records = list[Record]()
        stops = end if isinstance(end, list) else [end]
        for index, new in zip(indices, out[:, T:].tolist(), strict=True):
            said = takewhile(lambda token: token not in stops, new)  # behind it comes padding, which may be text
            text = self.tokenizer.decode(list(said), skip_special_tokens=True).partition("\n")[0]
            answer = self.answers[index]
            records.append(
                {
                    "index": index,
                    "prompt_tokens": len(self.prompts[index]),
                    "prompt_end": self.tokenizer.decode(self.prompts[index][-100:]),
                    "answer": answer,
                    "continuation": text,
                    "contains": int(answer.lower() in text.lower()),
                }
            )
        return records

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        return {"contains": ratio([r["contains"] for r in records], [1] * len(records))}

    def _prompt(self, row: dict[str, str], answer: str, base: str, twice: bool, size: int) -> tuple[str, bool]:
        """The prompt, and whether something was cut from the document."""
        if base == "squad":
            text, short = self._window(row["text"].strip(), None, size)
            if not twice:
                return text, short
            context, short_too = self._window(row["context"].partition("Question:")[0].strip(), answer, size)
            return f"{row['question'].strip()} {context}\n{text}", short or short_too
        key = row["key"].strip()
        document = row["text"].partition(_SUMMARY)[0].strip()
        while document.lower().endswith(f"{key}:".lower()):
            document = document[: -len(key) - 1].rstrip()
        document, short = self._window(document, answer, size)
        key, document = key[0].upper() + key[1:], document.strip().strip(".") + "."
        return f"Information about {key}. {document}\n{document} {key}:" if twice else f"{document} {key}:", short

    def _window(self, text: str, answer: str | None, size: int) -> tuple[str, bool]:
        """`size` tokens at most, around `answer` as the class says or else the last; and whether that cuts any."""
        ids = self._encode(text)
        found = None if answer is None else re.search(re.escape(answer), text, re.IGNORECASE)
        if found is None:
            start = max(0, len(ids) - size)
        else:
            start = max(0, len(self._encode(text[: found.start()])) - size // 2)
        kept = ids[start : start + size]
        return (text, False) if len(kept) == len(ids) else (self.tokenizer.decode(kept), True)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


class _LineBreak(StoppingCriteria):
    """Ends a row once the text behind its first `start` tokens has a line break."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


def _hub(name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The validation split of a data set of the Hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"tasks: {name} needs `pip install 'osdn[eval]'`, or --cloze FILE") from None
    try:
        rows = list(load_dataset(name, split="validation"))
    except Exception as error:  # no network, no such data set: whatever its client raises
        raise ValueError(
            f"tasks: {name} cannot be loaded ({first_line(error)}); takes a network, or --cloze FILE"
        ) from error
    for number, row in enumerate(rows):
        check_fields(row, fields, _MAY_BE_BLANK, f"tasks: got {name}, row {number}")
    return rows
