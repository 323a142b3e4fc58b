"""One config file, `run.toml`: typed sections, a default for every key, errors that name the fix.

The dataclasses below are the reference: their defaults are the defaults, their metadata is the
text that `meadow init` writes.  The keys of `[strategy]` besides `name` belong to the strategy
and are checked by `strategies.registry`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from .config_values import checked, nearest
from .errors import ConfigError

FORMAT = 1
"""Version of this file's format; written into every resolved run.toml."""


def _key(default: Any, about: str, least: float | None = None, most: float | None = None) -> Any:
    metadata = {"about": about, "least": least, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter's shape."""

    base: str = _key("nano", 'the base: "nano" (embedded), a local folder, or a Hugging Face name')
    dtype: Literal["float32", "bfloat16"] = _key("float32", "the base's precision in memory")
    quantize: Literal["none", "4bit", "8bit"] = _key("none", "needs the extra `quantized`")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "where to train")
    rank: int = _key(8, "LoRA rank r", 1)
    alpha: float = _key(16.0, "LoRA alpha; updates are scaled by alpha / rank", 1e-9)
    targets: list[str] = _key(["all-linear"], "names of the linear layers to adapt")


@dataclass(frozen=True)
class DataConfig:
    """Participants' text.  Each keeps its own; `source` names it all only in a simulation."""

    source: str = _key(
        "nano", 'JSON lines (.jsonl, .jsonl.gz), a folder of text, "datasets:NAME", or "nano"'
    )
    partition: Literal["natural", "iid", "dirichlet", "quantity"] = _key(
        "natural", "how rows are dealt to participants: by their own `client`, or artificially"
    )
    participants: int = _key(
        0, "how many, for artificial partitions; for natural: the largest N (0 = all)", 0
    )
    dirichlet_alpha: float = _key(
        0.5, "skew of the dirichlet partition: smaller is less equal", 1e-6
    )
    chunk: int = _key(
        600, "plain text is cut at line ends into rows of about so many characters", 1
    )
    max_length: int = _key(256, "longest row in tokens; longer ones are cut and counted", 8)
    train_rows: int = _key(0, "at most so many training rows a participant (0 = all)", 0)
    held_out_rows: int = _key(0, "at most so many held-out rows a participant (0 = all)", 0)


@dataclass(frozen=True)
class StrategyConfig:
    """The algorithm; `meadow strategies` lists names and options."""

    name: str = _key("fedavg_lora", "`meadow strategies` lists them")
    options: dict[str, Any] = _key({}, "the strategy's own keys")


@dataclass(frozen=True)
class RoundsConfig:
    """The schedule "rounds": sample a cohort, wait for a quorum or the deadline, combine."""

    count: int = _key(10, "how many rounds", 1)
    fraction: float = _key(1.0, "share of participants in a round's cohort", 1e-9, 1)
    quorum: float = _key(0.5, "least share of the cohort that has to arrive", 0, 1)
    deadline_seconds: float = _key(
        3600.0, "how long a round waits for its cohort (a simulation finishes it anyway)", 1e-3
    )
    evaluate_every: int = _key(
        1, "measure held-out losses every so many rounds (the last: always)", 1
    )
    spare: float = _key(
        0.0, "ask so much more than that share; the round closes without the slowest", 0, 10
    )
    seed: int = _key(1, "seed of cohorts, initial factors and batches", 0)


@dataclass(frozen=True)
class ClientsConfig:
    """Local training and what a client does to its update before sending it."""

    steps: int = _key(10, "optimiser steps (AdamW) a round", 1)
    batch: int = _key(8, "rows a step", 1)
    micro_batch: int = _key(0, "rows a forward pass (0 = batch); halved when memory runs out", 0)
    lr: float = _key(2e-3, "learning rate", 1e-12)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = _key(
        "constant", "over all of a client's steps; never restarts at a round"
    )
    warmup: int = _key(0, "steps of linear warm-up", 0)
    floor: float = _key(0.1, "where the schedule ends, as a share of lr", 0, 1)
    weight_decay: float = _key(0.0, "AdamW's decoupled weight decay", 0)
    clip: float = _key(1.0, "largest gradient norm (0 = off)", 0)
    clip_update: float = _key(0.0, "largest norm of what a round changes (0 = off)", 0)
    wire: Literal["float32", "bfloat16"] = _key(
        "float32", "precision of what is sent; what is rounded off goes with the next round"
    )


@dataclass(frozen=True)
class SimulationConfig:
    """The local engine."""

    engine: Literal["sequential", "fused"] = _key(
        "sequential", "fused trains several clients in one forward pass (pays with short batches)"
    )
    group: int = _key(8, "clients in one fused pass", 1)
    threads: int = _key(0, "torch threads (0 = torch's own choice); part of a run's identity", 0)


@dataclass(frozen=True)
class PeerConfig:
    """Without a coordinator: this machine's part in the gossip (`meadow peer`)."""

    charter: str = _key("charter.json", "the run's charter, from one of its founders")
    participant: str = _key("", 'whose rows are mine ("": all rows of the source)')
    listen: str = _key("", 'host:port to answer other peers at ("": only call them)')
    address: str = _key("", 'host:port by which others reach me ("": as listen)')
    steps: int = _key(200, "steps a record, a byte each", 1, 1000)
    records: int = _key(0, "stop training after so many records of mine (0 = never)", 0)
    lr: float = _key(1e-4, "of all peers together; my share falls with their square root", 1e-12)
    fanout: int = _key(3, "peers that a new record is pushed to", 1)
    sync_seconds: float = _key(5.0, "between two exchanges with a peer at random", 1e-2, 86400)
    evaluate_every: int = _key(1, "measure held-out loss every so many records (0 = never)", 0)
    witnesses: int = _key(2, "signatures of other peers that a checkpoint needs", 0, 63)


@dataclass(frozen=True)
class CoordinatorConfig:
    """A deployed run: where `meadow coordinator` is reached, and whom it waits for."""

    listen: str = _key("0.0.0.0:9440", "host:port of the one public port")
    addresses: list[str] = _key(
        [], "host:port by which participants reach it ([]: this host's name and that port)"
    )
    certificate: str = _key("", "own TLS certificate chain, PEM (empty: one is made)")
    key: str = _key("", "its private key, PEM")
    approve: Literal["by_hand", "invited"] = _key(
        "by_hand", "who may take part: whom the operator approves, or whoever has an invitation"
    )
    invitation_hours: float = _key(24.0, "how long an invitation can be used", 1e-3)
    invite: list[str] = _key([], "names of the participants to invite when the run begins")
    participants: int = _key(
        0, "the run begins once so many are online (0: as many as `invite` names, at least 1)", 0
    )
    retry_seconds: float = _key(30.0, "pause before a round without quorum is tried again", 0)

    @property
    def least(self) -> int:
        """How many have to be online before the run begins."""
        return self.participants or max(1, len(self.invite))


@dataclass(frozen=True)
class ServeConfig:
    """Where a run's adapters are published, and what one has to pass before it is served."""

    name: str = _key("", 'publish as NAME or TENANT/NAME in the registry ("": publish nothing)')
    registry: str = _key("", 'its folder ("": where `meadow adapters` looks, beside the key)')
    publish_every: int = _key(0, "publish every so many rounds, and at the end (0: only then)", 0)
    alias: str = _key("prod", 'the alias that then moves, if the gates pass ("": none)')
    max_loss_increase: float = _key(0.0, "by so much the held-out loss may get worse", 0)
    dtype: Literal["", "float32", "bfloat16", "float16"] = _key(
        "", 'precision it is served in ("": [model])'
    )
    quantize: Literal["", "none", "4bit", "8bit"] = _key("", 'as it is served ("": [model])')
    held_out: str = _key("", 'rows to measure it anew on, as it is served ("": the run\'s losses)')
    canaries: str = _key("", 'prompts whose answers have to pass, TOML or JSON lines ("": none)')

    def due(self, number: int, count: int) -> bool:
        """Whether the adapter after round `number` of `count` is published."""
        if not self.name or not number:
            return False
        return number == count or bool(self.publish_every) and number % self.publish_every == 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    peer: PeerConfig = field(default_factory=PeerConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def scaling(self) -> float:
        return self.model.alpha / self.model.rank

    def digest(self) -> str:
        """SHA-256 of all settings that shape a run: its folder refuses to continue under another.
        Where its adapters are published may change."""
        tables = dataclasses.asdict(self)
        del tables["serve"]
        canonical = json.dumps(tables, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def shared(self) -> Config:
        """What all participants of a deployed run have in common, and approve: everything but
        where text lies, where the coordinator is reached, and where it publishes."""
        common = self.replace(data={"source": ""})
        return dataclasses.replace(
            common, peer=PeerConfig(), coordinator=CoordinatorConfig(), serve=ServeConfig()
        )

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some keys of some sections changed: `replace(clients={"lr": 1e-3})`."""
        changed = {
            name: dataclasses.replace(getattr(self, name), **keys)
            for name, keys in sections.items()
        }
        return dataclasses.replace(self, **changed)


def precision(dtype: str, quantize: str) -> str:
    """What a base computes in, in one word: "float32", "bfloat16+4bit"."""
    return dtype if quantize == "none" else f"{dtype}+{quantize}"


def load(path: Path) -> Config:
    """Read a run.toml.  Raises ConfigError with the key and the nearest known one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "`meadow init` writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    return parse(text, str(path), path.parent)


def parse(text: str, name: str = "run.toml", folder: Path | None = None) -> Config:
    """The Config that a run.toml's text describes; relative paths are relative to `folder`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    version = tables.pop("format", FORMAT)
    if version != FORMAT:
        raise ConfigError(f"{name} has format {version}; this meadow reads format {FORMAT}")
    return _absolute(_built(tables, name), folder or Path.cwd())


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested tables, the strategy's options among its own keys."""
    tables = dataclasses.asdict(config)
    strategy = tables["strategy"]
    tables["strategy"] = {"name": strategy["name"], **strategy["options"]}
    return tables


def from_json(tables: Mapping[str, Any], name: str) -> Config:
    """The inverse of `to_json`, for a config that came from elsewhere.  Raises ConfigError."""
    return _built(tables, name)


def _built(tables: Mapping[str, Any], name: str) -> Config:
    sections = {part.name: part for part in dataclasses.fields(Config)}
    built = {}
    for section, keys in tables.items():
        if section not in sections:
            raise ConfigError(f"{name}: unknown section [{section}]", nearest(section, sections))
        if not isinstance(keys, dict):
            raise ConfigError(f"{name}: {section} must be a section, [{section}]")
        built[section] = _section(section, keys, name)
    return Config(**built)


def _section(section: str, keys: dict[str, Any], name: str) -> Any:
    kind = get_type_hints(Config)[section]
    if kind is StrategyConfig:
        options = {key: value for key, value in keys.items() if key != "name"}
        keys = {"name": keys.get("name", StrategyConfig().name), "options": options}
    hints = get_type_hints(kind)
    known = {part.name: part for part in dataclasses.fields(kind)}
    values = {}
    for key, value in keys.items():
        if key not in known:
            raise ConfigError(f"{name}: unknown key {key} in [{section}]", nearest(key, known))
        where = f"{name}: [{section}] {key}"
        bounds = known[key].metadata
        values[key] = checked(value, hints[key], where, bounds.get("least"), bounds.get("most"))
    return kind(**values)


def _absolute(config: Config, folder: Path) -> Config:
    """Paths in run.toml are relative to it, globs and `datasets:` folders too.

    A base that is no folder there is a hub name, a `datasets:` source likewise; any other source
    is a path, whether it exists or not.
    """
    changed: dict[str, dict[str, Any]] = {}
    base, source = config.model.base, config.data.source
    if base != "nano" and (folder / base).exists():
        changed["model"] = {"base": str((folder / base).resolve())}
    kind, _, name = source.rpartition("datasets:")
    if source != "nano" and (source == name or (folder / name).exists()):
        changed["data"] = {
            "source": source[: len(source) - len(name)] + str(folder.resolve() / name)
        }
    own = config.coordinator
    changed["coordinator"] = {
        key: str((folder / value).resolve())
        for key, value in (("certificate", own.certificate), ("key", own.key))
        if value and (folder / value).exists()
    }
    changed["serve"] = {
        key: str((folder / value).resolve())
        for key in ("registry", "held_out", "canaries")
        if (value := getattr(config.serve, key))
    }
    return config.replace(**changed)


def write(config: Config, about: bool = False, options: Mapping[str, str] | None = None) -> str:
    """The config as TOML; with `about`, each key beside the comment that explains it; `options`
    has the comments of the strategy's own keys."""
    lines = [f"format = {FORMAT}"]
    for part in dataclasses.fields(Config):
        section = getattr(config, part.name)
        lines += ["", *([f"# {type(section).__doc__}"] if about else []), f"[{part.name}]"]
        for key in dataclasses.fields(section):
            value = getattr(section, key.name)
            if isinstance(value, dict):
                for name, option in value.items():
                    comment = f"  # {options[name]}" if options and name in options else ""
                    lines.append(f"{name} = {_toml(option)}{comment}")
                continue
            comment = f"  # {key.metadata['about']}" if about else ""
            lines.append(f"{key.name} = {_toml(value)}{comment}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for surrogate pairs, and TOML wants one more: DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def options_of(kind: type) -> list[tuple[str, Any, str]]:
    """(name, default, about) of a dataclass's keys, for help texts."""
    rows = []
    for part in dataclasses.fields(kind):
        default = part.default
        if default is MISSING and part.default_factory is not MISSING:
            default = part.default_factory()
        rows.append((part.name, default, part.metadata.get("about", "")))
    return rows
