"""The signed manifest: verified without meadow's own code, and broken in every part."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meadow.errors import AdapterError, FormatError, IdentityError
from meadow.identity import Identity
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.manifest import (
    PAYLOAD,
    Provenance,
    verify_manifest,
    write_manifest,
)

PROVENANCE = Provenance(
    run_id="5f" * 16,
    base_digest="ba" * 32,
    config_digest="c0" * 32,
    strategy="ffa_lora",
    rounds=3,
    participants=4,
    seed=7,
    base_loss=2.5,
    loss=1.25,
    parents=("de" * 32,),
    evaluations={"canary": 0.5},
    dtype="bfloat16",
    held_out_rows=12,
    held_out_digest="4e" * 32,
    name="team/mail",
)
ME = Identity(Ed25519PrivateKey.from_private_bytes(b"\1" * 32))
STRANGER = Identity(Ed25519PrivateKey.from_private_bytes(b"\2" * 32))
TRUSTED = {ME.key_id: ME.public}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a signed adapter."""
    tree = {"m.lora_A": torch.ones(8, 16), "m.lora_B": torch.zeros(16, 8)}
    save_adapter(tmp_path / "adapter", tree, scaling=2.0, base="nano")
    write_manifest(tmp_path, ME, PROVENANCE)
    return tmp_path


def read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(envelope, statement) as any JSON reader sees them."""
    envelope = json.loads((run / "manifest.json").read_bytes())
    return envelope, json.loads(base64.b64decode(envelope["payload"]))


def test_it_verifies_without_meadow(run: Path) -> None:
    envelope, statement = read(run)
    body = base64.b64decode(envelope["payload"])
    kind = b"application/vnd.in-toto+json"
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)
    ME.public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
    assert envelope["payloadType"] == kind.decode()
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run / "adapter").iterdir()
    }
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == hashes
    assert set(hashes) == {"adapter_config.json", "adapter_model.safetensors"}


def test_it_states_the_provenance_and_nothing_else(run: Path) -> None:
    _, statement = read(run)
    assert verify_manifest(run, TRUSTED) == statement
    predicate = statement["predicate"]
    assert predicate.pop("format") == 1
    assert isinstance(predicate.pop("meadow"), str)
    assert predicate == {
        "run_id": "5f" * 16, "base_digest": "ba" * 32, "config_digest": "c0" * 32,
        "strategy": "ffa_lora", "rounds": 3, "participants": 4, "seed": 7,
        "base_loss": 2.5, "loss": 1.25, "parents": ["de" * 32],
        "evaluations": {"canary": 0.5}, "privacy": "none", "name": "team/mail",
        "dtype": "bfloat16", "held_out_rows": 12, "held_out_digest": "4e" * 32,
    }  # fmt: skip


def test_writing_again_gives_the_same_bytes(run: Path) -> None:
    before = (run / "manifest.json").read_bytes()
    write_manifest(run, ME, PROVENANCE)
    assert (run / "manifest.json").read_bytes() == before


def test_a_loss_that_is_no_number_stays_valid_json(run: Path) -> None:
    lost = Provenance(
        run_id="5f", base_digest="", config_digest="", strategy="x", rounds=1, participants=1,
        seed=0, base_loss=float("inf"), loss=float("nan"),
    )  # fmt: skip
    write_manifest(run, ME, lost)
    predicate = verify_manifest(run, TRUSTED)["predicate"]
    assert (predicate["base_loss"], predicate["loss"]) == (None, None)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_every_bit_of_every_file_is_covered(run: Path, name: str) -> None:
    path = run / "adapter" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(AdapterError, match=f"{name} was changed"):
            verify_manifest(run, TRUSTED)
    path.write_bytes(whole + b"\0")
    with pytest.raises(AdapterError, match=f"{name} was changed"):
        verify_manifest(run, TRUSTED)
    path.write_bytes(whole)
    verify_manifest(run, TRUSTED)


def test_a_file_that_is_missing_or_added_is_named(run: Path) -> None:
    config = run / "adapter" / "adapter_config.json"
    kept = config.read_bytes()
    config.unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        verify_manifest(run, TRUSTED)
    config.write_bytes(kept)
    (run / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is not signed"):
        verify_manifest(run, TRUSTED)


def test_a_link_or_folder_is_no_file_of_an_adapter(run: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.rename(run / "elsewhere")
    weights.symlink_to(run / "elsewhere")
    with pytest.raises(AdapterError, match="not a plain file"):
        verify_manifest(run, TRUSTED)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(AdapterError, match="not a plain file"):
        verify_manifest(run, TRUSTED)


def test_what_a_crash_left_of_a_write_does_not_count(run: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors.draft").write_bytes(b"half")
    verify_manifest(run, TRUSTED)
    write_manifest(run, ME, PROVENANCE)
    assert len(read(run)[1]["subject"]) == 2


def rewritten(run: Path, change: Callable[[dict[str, Any]], object], signer: Identity) -> None:
    """Change the statement and sign the result."""
    _, statement = read(run)
    change(statement)
    envelope = signer.sign(PAYLOAD, json.dumps(statement).encode())
    (run / "manifest.json").write_text(json.dumps(envelope))


def test_a_changed_statement_does_not_verify(run: Path) -> None:
    envelope, statement = read(run)
    for key in PROVENANCE.__dataclass_fields__:
        forged = {**statement, "predicate": {**statement["predicate"], key: "other"}}
        payload = base64.b64encode(json.dumps(forged).encode()).decode()
        (run / "manifest.json").write_text(json.dumps({**envelope, "payload": payload}))
        with pytest.raises(IdentityError, match="does not hold"):
            verify_manifest(run, TRUSTED)


def test_a_strangers_manifest_is_refused(run: Path) -> None:
    write_manifest(run, STRANGER, PROVENANCE)
    with pytest.raises(IdentityError, match="by no key that is trusted"):
        verify_manifest(run, TRUSTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(_type="https://in-toto.io/Statement/v2"), "has format"),
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "has format"),
        (lambda s: s["predicate"].update(format=2), "has format"),
        (lambda s: s.pop("predicate"), "states nothing"),
        (lambda s: s.pop("subject"), "which files"),
        (lambda s: s.update(subject=[]), "which files"),
        (lambda s: s.update(subject=3), "which files"),
        (lambda s: s["subject"][0].pop("digest"), "which files"),
        (lambda s: s["subject"].append(dict(s["subject"][0])), "which files"),
    ],
)
def test_a_trusted_signature_does_not_excuse_a_wrong_statement(
    run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewritten(run, change, ME)
    with pytest.raises(FormatError, match=message):
        verify_manifest(run, TRUSTED)


def test_what_is_no_manifest_is_refused_in_a_line(run: Path) -> None:
    path = run / "manifest.json"
    for bad in (b"", b"\xff", b"[" * 100_000, b"{}", b" " * (2**20 + 1)):
        path.write_bytes(bad)
        with pytest.raises(FormatError) as caught:
            verify_manifest(run, TRUSTED)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(AdapterError, match="not signed"):
        verify_manifest(run, TRUSTED)


def test_there_is_nothing_to_sign_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no folder"):
        write_manifest(tmp_path, ME, PROVENANCE)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(AdapterError, match="is empty"):
        write_manifest(tmp_path, ME, PROVENANCE)
    assert not (tmp_path / "manifest.json").exists()
