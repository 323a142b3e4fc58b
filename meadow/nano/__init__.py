"""nano: the small llama inside the package, so that a fresh clone needs no download."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "base"
"""Hugging Face layout: config.json, model.safetensors (bf16), tokenizer.json."""
