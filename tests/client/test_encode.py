"""Tokens and labels: the loss is on the response, on all of it, and on nothing else."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meadow.client.encode import Encoded, batch_indices, collate, encode
from meadow.client.rows import Row
from meadow.errors import DataError, ModelError

MODELS = Path(os.environ.get("MEADOW_MODELS", Path(__file__).parents[2] / ".." / "shared/models"))
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
RESPONSE = TEXT.filter(str.strip)


@cache
def tokenizer(bos: bool = True, eos: bool = True, template: str = "") -> Any:
    """Byte-level BPE over a few lines, so that any text survives the round trip."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["the cat sat on the mat", "what is that?\n\nthat is the hat"], trainer)
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    made.chat_template = template or None
    return made


def row(prompt: str, response: str) -> Row:
    return Row("ann", prompt, response, "", "ann")


def encoded(tokens: Any, *rows: Row, max_length: int = 1000) -> Encoded:
    return encode(rows, tokens, max_length)


def parts(tokens: Any, one: Row, max_length: int = 1000) -> tuple[str, str]:
    """The decoded text without loss, and that with it."""
    [example] = encoded(tokens, one, max_length=max_length).examples
    counts = example.labels != -100
    assert torch.equal(example.labels[counts], example.ids[counts])
    assert counts.tolist() == sorted(counts.tolist())  # prompt first, then response
    return tokens.decode(example.ids[~counts]), tokens.decode(example.ids[counts])


@settings(deadline=None)
@given(TEXT, RESPONSE, st.booleans(), st.booleans())
def test_labels_decode_to_the_response(prompt: str, response: str, bos: bool, eos: bool) -> None:
    tokens = tokenizer(bos, eos)
    if not bos and not prompt and len(tokens(response)["input_ids"]) + eos < 2:
        return
    joint = "\n" if prompt and not prompt[-1].isspace() else ""
    wanted = ("<s>" if bos else "") + prompt + joint, response + ("</s>" if eos else "")
    assert parts(tokens, row(prompt, response)) == wanted


def test_a_prompt_is_encoded_as_it_will_be_asked() -> None:
    tokens = tokenizer()
    for prompt, response in [("what is that ", "the cat"), ("what\n", "\nthat"), ("the", "cat")]:
        [example] = encoded(tokens, row(prompt, response)).examples
        asked = prompt if prompt[-1].isspace() else prompt + "\n"
        ids = [tokens.bos_token_id, *tokens(asked, add_special_tokens=False)["input_ids"]]
        assert example.ids[: len(ids)].tolist() == ids
        assert (example.labels[: len(ids)] == -100).all() and (example.labels[len(ids) :] > 0).all()


def test_special_tokens_in_a_text_are_text() -> None:
    tokens = tokenizer()
    [example] = encoded(tokens, row("say </s>", "<s></s>")).examples
    assert example.ids.tolist().count(tokens.eos_token_id) == 1
    assert example.ids.tolist().count(tokens.bos_token_id) == 1


@settings(deadline=None)
@given(RESPONSE, RESPONSE)
def test_a_chat_template_frames_the_prompt(prompt: str, response: str) -> None:
    tokens = tokenizer(template=CHAT)
    before, after = parts(tokens, row(prompt, response))
    assert before == f"<|user|>{prompt}</s>\n<|assistant|>"
    assert after == response + "</s>"  # without the template's line break


def test_plain_text_needs_no_template() -> None:
    assert parts(tokenizer(template=CHAT), row("", "the cat")) == ("<s>", "the cat</s>")


def test_a_template_without_an_end_gets_one() -> None:
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert parts(tokenizer(template=template), row("a", "b"))[1] == "b\n</s>"


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    template = CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    with pytest.raises(ModelError, match="renders a prompt differently once it is answered"):
        encoded(tokenizer(template=template), row("a", "b"))


@settings(deadline=None)
@given(TEXT, RESPONSE, st.integers(2, 40), st.booleans())
def test_truncation(prompt: str, response: str, limit: int, bos: bool) -> None:
    tokens = tokenizer(bos)
    [whole], [cut] = (
        encoded(tokens, row(prompt, response), max_length=length).examples
        for length in (1000, limit)
    )
    asked, answer = split(whole), split(cut)
    assert len(cut.ids) == min(limit, len(whole.ids))
    assert answer[1] == asked[1][: len(answer[1])]
    assert len(answer[1]) >= min(len(asked[1]), (limit + 1) // 2)
    rest = answer[0][1:] if bos and answer[0] else answer[0]
    assert asked[0][len(asked[0]) - len(rest) :] == rest
    assert not (bos and answer[0]) or answer[0][0] == tokens.bos_token_id
    if len(answer[1]) < len(asked[1]):  # the prompt gave all that it had to
        assert len(answer[0]) == min(limit // 2, len(asked[0]))


def split(example: Any) -> tuple[list[int], list[int]]:
    border = int((example.labels == -100).sum())
    return example.ids[:border].tolist(), example.ids[border:].tolist()


def test_truncated_rows_are_counted() -> None:
    rows = [row("", "cat"), row("what is " * 20, "cat"), row("", "the mat " * 20)]
    result = encoded(tokenizer(), *rows, max_length=10)
    assert result.truncated == 2 and [len(example.ids) for example in result.examples][1:] == [
        10,
        10,
    ]
    assert encoded(tokenizer(), *rows).truncated == 0


def test_rows_without_response_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="participant 'ann' has no response tokens: 'cat'"):
        encoded(tokenizer(), row("", "cat"), max_length=1)
    with pytest.raises(DataError, match="no response tokens"):
        encoded(tokenizer(bos=False, eos=False), row("", "a"))


def test_collate_pads_on_the_right() -> None:
    examples = encoded(tokenizer(), row("the", "cat sat"), row("", "a")).examples
    ids, mask, labels = collate(examples, 9)
    longest = max(len(example.ids) for example in examples)
    for index, example in enumerate(examples):
        length = len(example.ids)
        assert ids[index].tolist() == example.ids.tolist() + [9] * (longest - length)
        assert mask[index].tolist() == [1] * length + [0] * (longest - length)
        assert labels[index].tolist() == example.labels.tolist() + [-100] * (longest - length)
    assert {tensor.dtype for tensor in (ids, mask, labels)} == {torch.int64}


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**32), st.text(max_size=5))
def test_each_epoch_is_a_permutation(count: int, batch: int, seed: int, client: str) -> None:
    steps = -(-3 * count // batch)
    stream = [i for step in range(steps) for i in batch_indices(count, batch, step, seed, client)]
    assert len(stream) == steps * batch
    for start in range(0, 3 * count, count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_batches_differ_by_seed_client_and_epoch() -> None:
    first = batch_indices(50, 50, 0, 1, "a")
    others = [batch_indices(50, 50, *rest) for rest in ((0, 2, "a"), (0, 1, "b"), (1, 1, "a"))]
    assert all(first != other for other in others)
    assert batch_indices(5, 5, 0, 0, "a") == [0, 4, 1, 2, 3]  # the same on every machine
    with pytest.raises(DataError, match="participant 'a' has no training rows"):
        batch_indices(0, 1, 0, 0, "a")


def test_a_tokenizer_that_puts_spaces_before_words() -> None:
    folder = MODELS / "stories260K"
    if not folder.exists():
        pytest.skip(f"stories260K is not in MEADOW_MODELS ({MODELS})")
    tokens = AutoTokenizer.from_pretrained(folder)
    assert parts(tokens, row("FIRST CITIZEN:", "Speak, speak.")) == (
        "<s> FIRST CITIZEN:\n", "Speak, speak.</s>",
    )  # fmt: skip
