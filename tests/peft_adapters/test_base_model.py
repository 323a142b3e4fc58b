"""The base model: loaded whole, frozen and named, or refused in one line."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meadow.errors import ModelError
from meadow.peft_adapters.base_model import load_base, sites

MODELS = Path(os.environ.get("MEADOW_MODELS", Path(__file__).parents[2] / ".." / "shared/models"))
LLAMA = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def save_llama(folder: Path, tied: bool = True, **options: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).save_pretrained(
        folder, **options
    )
    vocabulary = {name: number for number, name in enumerate(["<s>", "</s>", *"abcdefghijklmn"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama")


def test_a_base_is_frozen_and_quiet(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base(str(folder), device="cpu")
    assert (base.name, base.device.type) == (str(folder), "cpu")
    assert not base.model.training and not base.model.config.use_cache  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.tokenizer.bos_token == "<s>"
    assert capfd.readouterr() == ("", "")


def test_weights_are_those_stored(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    loaded = load_base(str(folder), device="cpu").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_precision_does_not_change_the_digest(folder: Path) -> None:
    half = load_base(str(folder), dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.digest == load_base(str(folder), device="cpu").digest


def test_shards_hold_the_same_base(folder: Path, tmp_path: Path) -> None:
    shards = save_llama(tmp_path / "shards", max_shard_size="1KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    one, many = (load_base(str(path), device="cpu") for path in (folder, shards))
    assert one.digest == many.digest


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model.safetensors .pickled weights .* never read"):
        load_base(str(folder), device="cpu")


def test_missing_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="weights lack model.layers.0.mlp.up_proj.weight"):
        load_base(str(folder), device="cpu")


def test_wrongly_shaped_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_files_are_one_line(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_base(str(folder), device="cpu")


def test_code_beside_a_model_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "special", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError):
        load_base(str(folder), device="cpu")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("Got: ConnectError\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="'some/model': .* no answer: Got: ConnectError .give the"):
        load_base("some/model", device="cpu")


def test_a_hub_model_is_loaded_from_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    base = load_base("some/model", device="cpu")
    assert (base.name, asked["name"]) == ("some/model", "some/model")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".py", ".bin"))]


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a b/c", "../up"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="no such"):
        load_base(name, device="cpu")


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"quantize": "2bit"}, {"device": "tpu"}])
def test_unknown_options(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="is none of"):
        load_base(str(folder), **options)


def test_a_gpu_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no usable GPU"):
        load_base(str(folder), device="cuda")


def test_quantisation_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'meadow-fl\[quantized\]'"):
        load_base(str(folder), quantize="4bit", device="cpu")


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_layers_keep_their_shape_and_digest(
    folder: Path, quantize: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    plain = load_base(str(folder), device="cpu")
    small = load_base(str(folder), quantize=quantize, device="cpu")
    assert sites(small.model, "all-linear") == sites(plain.model, "all-linear")
    assert small.digest == plain.digest
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.isfinite(small.model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)), "bitsandbytes says the same with every product"


def test_sites_are_sorted_and_shaped(folder: Path) -> None:
    model = load_base(str(folder), device="cpu").model
    found = sites(model, ["up_proj", "k_proj"])
    assert [(site.name, site.rows, site.columns) for site in found] == [
        ("model.layers.0.mlp.up_proj", 12, 8), ("model.layers.0.self_attn.k_proj", 4, 8),
        ("model.layers.1.mlp.up_proj", 12, 8), ("model.layers.1.self_attn.k_proj", 4, 8),
    ]  # fmt: skip
    assert sites(model, "up_proj") == found[::2]
    stored = load_file(folder / "model.safetensors")
    for site in sites(model, ["all-linear"]):
        assert stored[f"{site.name}.weight"].shape == (site.rows, site.columns)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_no_linear_layer(tmp_path: Path, tied: bool) -> None:
    model = load_base(str(save_llama(tmp_path, tied)), device="cpu").model
    assert len(sites(model, "all-linear")) == 14
    if tied:
        with pytest.raises(ModelError, match="lm_head"):
            sites(model, ["lm_head"])
    else:
        assert [site.name for site in sites(model, ["lm_head"])] == ["lm_head"]


@pytest.mark.parametrize("targets", [["q_proj", "qkv"], [], "q", ["all-linear", "q_proj"]])
def test_targets_that_match_nothing(folder: Path, targets: list[str] | str) -> None:
    model = load_base(str(folder), device="cpu").model
    with pytest.raises(ModelError, match="this model has: down_proj, gate_proj, k_proj"):
        sites(model, targets)


def test_nano() -> None:
    base = load_base("nano", device="cpu")
    assert sites(base.model, "all-linear") and base.tokenizer.eos_token_id is not None


def test_a_real_llama(tmp_path: Path) -> None:
    folder = MODELS / "stories260K"
    if not folder.exists():
        pytest.skip(f"stories260K is not in MEADOW_MODELS ({MODELS})")
    base = load_base(str(folder), device="cpu")
    assert len(sites(base.model, "all-linear")) == 35
    shutil.copytree(folder, tmp_path / "copy")
    assert load_base(str(tmp_path / "copy"), device="cpu").digest == base.digest


def test_a_gpu_without_room_is_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand so on")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ModelError, match="cannot be loaded: CUDA out of memory") as told:
        load_base(str(folder), device="cpu")
    assert "and so on" not in str(told.value)
