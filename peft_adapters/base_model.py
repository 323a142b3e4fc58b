"""The base model: loaded once, frozen, and never written.

A name is `nano` (the embedded one), a local folder in Hugging Face's layout, or a hub name, which
is first fetched into a folder.  Only safetensors are read, and no code that comes with a model
runs.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from ..nano import FOLDER
from .base_digest import base_digest, weight_files
from .layout import Site

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NANO = "nano"
ALL_LINEAR = "all-linear"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "8bit", "4bit")
DEVICES = ("auto", "cpu", "cuda")

_FILES = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
"""What is fetched from a hub: no pickles, and no code."""


class _Once(logging.Filter):
    """Lets each message pass once: LLM.int8 says with every product that it casts its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        known = record.getMessage() in self._said
        self._said.add(record.getMessage())
        return not known


_INT8_LOG, _SAID = logging.getLogger("bitsandbytes.autograd._functions"), _Once()


@dataclass(frozen=True)
class Base:
    """A frozen causal language model in evaluation mode.

    `digest` names its stored weights before any quantisation; `name` is what was asked for.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    digest: str
    name: str
    device: torch.device


def load_base(
    name: str, *, dtype: str = "float32", quantize: str = "none", device: str = "auto"
) -> Base:
    """The base model `name` with its tokenizer.

    `dtype` is one of DTYPES, `quantize` of QUANTIZATIONS (bitsandbytes' NF4, which multiplies in
    `dtype`, or LLM.int8, which does so in float16), `device` of DEVICES.  Raises ModelError, in
    one line, on whatever keeps the model from being loaded whole.
    """
    for value, known in ((dtype, tuple(DTYPES)), (quantize, QUANTIZATIONS), (device, DEVICES)):
        if value not in known:
            raise ModelError(f"{value!r} is none of {', '.join(known)}")
    place = device_of(device)
    quantization = _quantization(quantize, DTYPES[dtype])
    with _quiet():
        folder = _folder(name)
        digest = base_digest(folder)
        tokenizer = _tokenizer(folder)
        model = _model(folder, DTYPES[dtype], quantization, place)
    return Base(_frozen(model), tokenizer, digest, name, place)


def load_skeleton(name: str) -> tuple[nn.Module, str]:
    """The base model's modules without storage (torch's device "meta"), and its digest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet():
        folder = _folder(name)
        digest = base_digest(folder)
        try:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError(f"{folder}: cannot be read: {_first_line(error)}") from None
    return model, digest


def sites(model: nn.Module, targets: str | Sequence[str]) -> list[Site]:
    """The linear layers to adapt, sorted by name.

    `targets` are last parts of module names (`q_proj`), or "all-linear" for every linear layer
    but the output head.  A head that is tied to the embedding can't be adapted.
    Raises ModelError, with the names that exist, where a target matches nothing.
    """
    layers = _linear_layers(model)
    known = {name.rpartition(".")[2] for name in layers}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if wanted == [ALL_LINEAR]:
        head = _output(model)
        return [site for name, site in layers.items() if model.get_submodule(name) is not head]
    missing = [target for target in wanted if target not in known]
    if missing or not wanted:
        names = ", ".join(sorted(known)) or "none"
        raise ModelError(
            f"target modules match no linear layer: {', '.join(missing) or 'none given'}",
            f"this model has: {names}; or take {ALL_LINEAR}",
        )
    return [site for name, site in layers.items() if name.rpartition(".")[2] in wanted]


def _linear_layers(model: nn.Module) -> dict[str, Site]:
    """Name to site of every `nn.Linear` (bitsandbytes' layers are subclasses), sorted by name.

    Shapes are those of the layer, not of its weight: a 4-bit weight is stored packed.
    """
    tied = _output(model) if _is_tied(model) else None
    found = {
        name: Site(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not tied
    }
    return dict(sorted(found.items()))


def _output(model: nn.Module) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return head


def _is_tied(model: nn.Module) -> bool:
    head = _output(model)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and head.weight is embedding.weight


def device_of(device: str) -> torch.device:
    """What one of DEVICES means here.  Raises ModelError where there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda': no usable GPU found", "take device = 'auto' or 'cpu'")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    """The settings of bitsandbytes, or None.  NF4: Dettmers et al., arXiv:2305.14314."""
    if quantize == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantize = {quantize!r} needs bitsandbytes", "pip install 'meadow-fl[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        _INT8_LOG.addFilter(_SAID)  # a filter that is there already is not added again
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _folder(name: str) -> Path:
    """The local folder that holds the model, fetched from the hub if need be."""
    if name == NANO:
        return FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        weight_files(folder)  # refuses a folder of pickles before anything is loaded
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"base model {name!r}: no such folder")
    return _fetched(name)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except GatedRepoError:
        reason = "the hub asks for a login (`hf auth login`)"
    except (HFValidationError, RepositoryNotFoundError):
        reason = "no such model on the hub"
    except OSError as error:
        reason = f"the hub gave no answer: {_first_line(error)}"
    raise ModelError(
        f"base model {name!r}: no such local folder, and {reason}",
        "give the path of a folder with config.json, model.safetensors and tokenizer.json",
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: no usable tokenizer: {_first_line(error)}") from None


def _model(folder: Path, dtype: torch.dtype, quantization: Any, device: torch.device) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map={"": device} if quantization else None,
        )
        placed: nn.Module = model if quantization else model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {_first_line(error)}") from None
    if report["missing_keys"]:  # which transformers would fill with random numbers
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: weights lack {missing[0]} and {len(missing) - 1} more")
    return placed


def _frozen(model: nn.Module) -> nn.Module:
    model.config.use_cache = False  # type: ignore[union-attr]
    model.requires_grad_(False)
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor log lines from transformers; its settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
