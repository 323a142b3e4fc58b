"""What is read of a signed adapter, in which order it is checked, and all that is refused."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registries import BASE, BLUEPRINT, ME, PROVENANCE, SITE, STRANGER, adapter, write_run
from safetensors.torch import save

from meadow.errors import AdapterError, FormatError, IdentityError, MeadowError
from meadow.peft_adapters import signed_adapter
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.manifest import PAYLOAD, write_manifest
from meadow.peft_adapters.signed_adapter import Limits, SignedAdapter

TRUSTED = {ME.key_id: ME.public}


def read(run: Path, limits: Limits | None = None) -> SignedAdapter:
    return SignedAdapter.read(run / "adapter", run / "manifest.json", limits)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def resigned(run: Path, weights: bytes) -> SignedAdapter:
    """Other weights, signed by the trusted key as they are."""
    (run / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    write_manifest(run, ME, PROVENANCE)
    return read(run)


def weights_of(**changes: torch.Tensor) -> bytes:
    tensors = {"lora_A": torch.ones(8, 8), "lora_B": torch.ones(16, 8)} | changes
    encoded: bytes = save(
        {f"base_model.model.m.q_proj.{key}.weight": value for key, value in tensors.items()}
    )
    return encoded


def header_of(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def test_what_verifies(run: Path) -> None:
    verified = read(run).verify(TRUSTED, BLUEPRINT)
    assert verified.provenance == replace(PROVENANCE, run_id=f"{1:032x}")
    assert verified.signers == (ME.key_id,)
    assert (verified.rank, verified.scaling, verified.dtypes, verified.modules) == (
        8, 2.0, ("F32",), 1,
    )  # fmt: skip
    plain, own = load_adapter(run / "adapter"), read(run).decode()
    assert plain.tree.keys() == own.tree.keys()
    assert all(torch.equal(plain.tree[name], own.tree[name]) for name in plain.tree)
    assert (plain.scaling, plain.rank, plain.base) == (own.scaling, own.rank, own.base)


BOMB = {"base_model.model.m.q_proj.lora_A.weight": {
    "dtype": "F32", "shape": [10**11, 8], "data_offsets": [0, 32 * 10**11],
}}  # fmt: skip
MANY = {"base_model.model.m.q_proj.lora_A.weight": {
    "dtype": "F32", "shape": [9] * 10**6, "data_offsets": [0, 4],
}}  # fmt: skip

TWICE = b"{%s,%s}" % (
    b'"base_model.model.m.q_proj.lora_A.weight":'
    b'{"dtype":"F32","shape":[8,8],"data_offsets":[0,256]}',
    b'"base_model.model.m.q_proj.lora_A.weight":'
    b'{"dtype":"F32","shape":[4,16],"data_offsets":[0,256]}',
)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (b"", "no valid length"),
        (b"\xff" * 8, "no valid length"),
        ((2**40).to_bytes(8, "little") + b"{}", "no valid length"),
        (header_of(BOMB), "cut short"),
        (header_of(MANY, bytes(4)), "contradicts its shape"),
        (header_of(b"[" * 10**6), "no readable JSON|not hold readable JSON"),
        (header_of(b"{" * 9), "readable JSON"),
        (header_of(TWICE, bytes(256)), "readable JSON"),
        (weights_of()[:-1], "cut short"),
        (weights_of() + b"\0", "cut short"),
        (b"PK\x03\x04" + bytes(100), "no valid length"),
        (b"\x80\x04\x95" + bytes(100), "no valid length"),
        (weights_of(lora_A=torch.full((8, 8), float("nan"))), "not finite"),
        (weights_of(lora_B=torch.full((16, 8), float("-inf"))), "not finite"),
        (weights_of(lora_A=torch.ones(8, 8, dtype=torch.float64)), "expected F32, F16 or BF16"),
        (weights_of(lora_A=torch.ones(4, 8)), "lora_A"),
        (weights_of(lora_A=torch.ones(8, 9)), "adapts a layer of"),
        (weights_of(lora_C=torch.ones(1)), "unexpected tensor"),
    ],
    ids=range(18),
)
def test_weights_that_are_refused_though_signed(run: Path, weights: bytes, said: str) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        resigned(run, weights).verify(TRUSTED, BLUEPRINT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((Site("m.k_proj", 16, 8),), "matches no layer"),
        ((Site("m.q_proj", 16, 9),), "adapts a layer of"),
        ((), "matches no layer"),
    ],
)
def test_an_adapter_for_other_layers(run: Path, layers: tuple[Site, ...], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        read(run).verify(TRUSTED, replace(BLUEPRINT, layers=layers))


def test_each_check_comes_before_the_costlier_ones(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter that has every fault: as each is mended, the next one shows."""
    good = read(run)
    nan = weights_of(lora_A=torch.full((8, 8), float("nan")))
    other = SITE, replace(BLUEPRINT, digest="00" * 32, layers=(Site("m.q_proj", 16, 9),))
    foreign = write_run(run.parent / "foreign", signer=STRANGER)
    faulty = replace(good, weights=nan[:-1], manifest=read(foreign).manifest)
    monkeypatch.setattr(signed_adapter, "read_tensors", _forbidden)
    with pytest.raises(AdapterError, match="cut short"):
        faulty.verify(TRUSTED, other[1])
    faulty = replace(faulty, weights=nan)
    with pytest.raises(IdentityError, match="no key that is trusted"):
        faulty.verify(TRUSTED, other[1])
    faulty = replace(faulty, manifest=good.manifest)
    with pytest.raises(AdapterError, match="was changed after it was signed"):
        faulty.verify(TRUSTED, other[1])
    faulty = resigned(run, nan)
    with pytest.raises(AdapterError, match="was trained on base"):
        faulty.verify(TRUSTED, other[1])
    with pytest.raises(AdapterError, match="adapts a layer of"):
        faulty.verify(TRUSTED, replace(other[1], digest=BASE))
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="not finite"):
        faulty.verify(TRUSTED, BLUEPRINT)


def _forbidden(*_: object) -> None:
    raise AssertionError("a tensor was decoded")


def test_sizes_come_before_reading(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match="at most 100 are read"):
        read(run, Limits(weights=100))
    with pytest.raises(AdapterError, match="expected 1 to 4"):
        read(run, Limits(rank=4)).verify(TRUSTED)
    for name, size in (("adapter/adapter_config.json", 2**24 + 1), ("manifest.json", 2**20 + 1)):
        os.truncate(run / name, size)
        with pytest.raises(AdapterError, match="at most"):
            read(run)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "README.md", "extra.safetensors"])
def test_a_file_that_does_not_belong(run: Path, name: str) -> None:
    (run / "adapter" / name).write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="is no part of a signed adapter"):
        read(run)
    (run / "adapter" / name).rename(run / "adapter" / "adapter_model.safetensors.draft")
    read(run)  # what a crash left


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "manifest.json"]
)
def test_what_is_no_plain_file(run: Path, kind: str, name: str) -> None:
    path = run / name
    path.rename(run / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(run / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(AdapterError, match="not a plain file"):
        read(run)


def test_a_folder_that_is_a_link(run: Path) -> None:
    (run / "adapter").rename(run / "real")
    (run / "adapter").symlink_to(run / "real")
    with pytest.raises(AdapterError, match="is no folder"):
        read(run)


def forged(run: Path, change: Callable[[dict[str, Any]], object]) -> SignedAdapter:
    """The statement changed, and signed by the trusted key."""
    files = read(run)
    statement = json.loads(base64.b64decode(json.loads(files.manifest)["payload"]))
    change(statement)
    envelope = ME.sign(PAYLOAD, json.dumps(statement).encode())
    return replace(files, manifest=json.dumps(envelope).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", "3"), ("rounds", True), ("rounds", None), ("strategy", 3), ("loss", "low"),
        ("loss", True), ("loss", 10**400), ("parents", "ab"), ("parents", [1]), ("privacy", None),
        ("evaluations", []), ("evaluations", {"a": "b"}), ("evaluations", {"a": True}),
        ("name", 1), ("base_digest", None),
    ],
)  # fmt: skip
def test_a_statement_of_the_wrong_type(run: Path, key: str, value: Any) -> None:
    files = forged(run, lambda statement: statement["predicate"].update({key: value}))
    with pytest.raises(FormatError, match=f"no usable {key}"):
        files.verify(TRUSTED)


def test_a_statement_of_an_older_meadow(run: Path) -> None:
    def forget(statement: dict[str, Any]) -> None:
        for key in ("evaluations", "privacy", "name", "parents"):
            del statement["predicate"][key]

    provenance = forged(run, forget).verify(TRUSTED).provenance
    assert (provenance.evaluations, provenance.privacy, provenance.name) == ({}, "none", "")


def test_a_file_that_is_signed_and_missing(run: Path) -> None:
    extra = {"name": "other.bin", "digest": {"sha256": "0" * 64}}
    with pytest.raises(AdapterError, match="'other.bin' is signed and missing"):
        forged(run, lambda statement: statement["subject"].append(extra)).verify(TRUSTED)
    with pytest.raises(AdapterError, match="is not signed"):
        forged(run, lambda statement: statement["subject"].pop()).verify(TRUSTED)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    good = adapter(1)
    part = data.draw(st.sampled_from(["config", "weights", "manifest"]))
    content = bytearray(getattr(good, part))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    changes: dict[str, Any] = {part: bytes(content)}
    changed = replace(good, **changes)
    if part == "manifest" and _means_the_same(bytes(content), good.manifest):
        return
    with pytest.raises(MeadowError):
        changed.verify(TRUSTED, BLUEPRINT)


def _content(envelope: Any) -> list[Any]:
    """Payload, signature, key and type; base64 has two alphabets, and bits of no meaning."""
    signature = envelope["signatures"][0]
    texts = [envelope["payload"], signature["sig"]]
    plain = [base64.b64decode(t.replace("-", "+").replace("_", "/"), validate=True) for t in texts]
    return [*plain, signature["keyid"], envelope["payloadType"]]


def _means_the_same(changed: bytes, manifest: bytes) -> bool:
    """Whether only the JSON around what is signed was spelt differently."""
    try:
        return _content(json.loads(changed)) == _content(json.loads(manifest))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
