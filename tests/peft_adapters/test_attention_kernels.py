"""Which attention kernels a process takes, whoever asks and in whatever order they end."""

from __future__ import annotations

import torch

from meadow.peft_adapters.attention_kernels import any_length_at_once


def test_the_last_user_gives_the_choice_back() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    one, other = any_length_at_once(), any_length_at_once()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    other.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before  # type: ignore[no-untyped-call]
