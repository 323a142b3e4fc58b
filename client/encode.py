"""Text to tokens: what the model reads, in which order, and which of it the loss counts.

The loss is on the response alone, its end-of-sequence token included.  Labels repeat the tokens
that count and are -100 elsewhere; the model itself shifts them by one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, ModelError
from ..prompt_text import joint
from .rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position without loss (`torch.nn.functional.cross_entropy`'s default)."""


class Example(NamedTuple):
    """One row: token ids and labels, int64, of equal length."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, and how many of them were too long and lost some."""

    examples: tuple[Example, ...]
    truncated: int


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Rows as at most `max_length` tokens each.

    A prompt goes through the tokenizer's chat template if it has one; otherwise it is joined to
    the response by nothing if it ends in white space, else by a line break.  Plain text stands
    alone.  Where the tokenizer has a beginning-of-sequence token, it comes first.

    Raises DataError where a row has no response token that could be predicted, and ModelError
    where the chat template doesn't show where a response begins.
    """
    examples, truncated = [], 0
    for row in rows:
        prompt, response = _tokens(row, tokenizer)
        truncated += len(prompt) + len(response) > max_length
        prompt, response = _truncate(prompt, response, max_length, tokenizer.bos_token_id)
        if not response or len(prompt) + len(response) < 2:
            raise DataError(
                f"a row of participant {row.client!r} has no response tokens: {_start(row)!r}",
                f"max_length is {max_length}",
            )
        ids = torch.tensor(prompt + response)
        labels = torch.tensor([IGNORED] * len(prompt) + response)
        examples.append(Example(ids, labels))
    return Encoded(tuple(examples), truncated)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> list[int]:
    """A prompt as the model reads it before it answers; or, `plain`, text for it to go on from."""
    if not plain and tokenizer.chat_template:
        asked = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return _ids(tokenizer, shown, special=True)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return first + _ids(tokenizer, text if plain else text + joint(text), special=False)


def collate(examples: Sequence[Example], pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), each int64 (rows, longest), padded on the right.

    Under a causal mask nothing reads the padding, so that `pad` may be any token.
    """
    shape = len(examples), max(len(example.ids) for example in examples)
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.ids)
        input_ids[row, :length] = example.ids
        labels[row, :length] = example.labels
        attention_mask[row, :length] = 1
    return input_ids, attention_mask, labels


def batch_indices(count: int, batch: int, step: int, seed: int, client: str) -> list[int]:
    """Numbers of the `batch` rows, out of `count`, that a client reads in its step `step`.

    Steps count from 0 over the whole run.  Each epoch is a permutation of its own; a batch that
    reaches an epoch's end goes on into the next.  Raises DataError where there are no rows.
    """
    if count < 1:
        raise DataError(f"participant {client!r} has no training rows")
    positions = (divmod(at, count) for at in range(step * batch, (step + 1) * batch))
    return [_epoch(count, epoch, seed, client)[offset] for epoch, offset in positions]


@lru_cache(maxsize=128)
def _epoch(count: int, epoch: int, seed: int, client: str) -> tuple[int, ...]:
    """Row numbers sorted by random keys.

    `Random.random` is the one generator that Python promises never to change; `shuffle` is not.
    """
    digest = hashlib.sha256(f"meadow/epoch/{seed}/{epoch}/{client}".encode()).digest()
    generator = random.Random(int.from_bytes(digest, "little"))
    return tuple(sorted(range(count), key=lambda _: generator.random()))


def _tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if row.prompt and tokenizer.chat_template:
        return _chat(row, tokenizer)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    asked = row.prompt + joint(row.prompt)
    prompt, response = _split(tokenizer, asked, row.response, special=False)
    return first + prompt, response + last if response else []


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The dialogue as its template renders it; the response is what follows the prompt's text."""
    asked = [{"role": "user", "content": row.prompt}]
    answered = [*asked, {"role": "assistant", "content": row.response}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the tokenizer's chat template renders a prompt differently once it is answered",
            "remove chat_template from the tokenizer to train on plain prompts and responses",
        )
    before, after = _split(tokenizer, prompt, whole[len(prompt) :], special=True)
    return before, _ended(after, tokenizer.eos_token_id)


def _ended(response: list[int], end: int | None) -> list[int]:
    """The response up to its last end-of-sequence token, which is added if the template has none.

    Templates often write a line break after it, which no model should learn to say.
    """
    if end is None or not response:
        return response
    if end in response:
        return response[: len(response) - response[::-1].index(end)]
    return [*response, end]


def _split(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, *, special: bool
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt as it stands alone, and of the response as it continues it.

    Where a token of the joined text would straddle the border, the response is encoded alone: at
    inference the model sees the prompt's own tokens.
    """
    before = _ids(tokenizer, prompt, special)
    whole = _ids(tokenizer, prompt + response, special)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, _ids(tokenizer, response, special)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Token ids of the text; names of special tokens in it are mere text unless `special`."""
    if not text:
        return []  # some tokenizers put a space before nothing
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=not special, verbose=False
    )
    return list(encoding["input_ids"])


def _truncate(
    prompt: list[int], response: list[int], limit: int, first: int | None
) -> tuple[list[int], list[int]]:
    """At most `limit` tokens.  The prompt loses its beginning, then the response its end.

    The response keeps at least half of the limit, and a beginning-of-sequence token stays.
    """
    if len(prompt) + len(response) <= limit:
        return prompt, response
    response = response[: max((limit + 1) // 2, limit - len(prompt))]
    room = limit - len(response)
    if prompt and prompt[0] == first and room > 0:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]], response
    return prompt[len(prompt) - room :], response


def _start(row: Row) -> str:
    return (row.prompt or row.response)[:40]
