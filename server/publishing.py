"""A run's adapters on their way into the registry: every so many rounds, and at the end.

Nothing is remembered here.  Which versions a run has published, and whether one was promoted or
refused, the registry itself knows; so a run that is started again after a crash at any point
publishes what is missing, decides what was not decided, and repeats nothing that shows.
"""

from __future__ import annotations

from pathlib import Path

from ..closeable import Closeable
from ..config import Config, precision
from ..errors import ConfigError, IdentityError, PromotionError
from ..events import Event, Observer
from ..identity import Identity
from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.manifest import ADAPTER, MANIFEST
from ..store import Disk
from .canaries import read_canaries
from .measured_gate import MeasuredGate, Serving, require_rows
from .registry import Registry, default_folder
from .registry_gates import AllOf, Gate, LineageGate, LossGate
from .registry_names import adapter_name, alias_name
from .registry_rows import Version

_DECIDED = ("moved", "rolled back", "refused")


class Publishing(Closeable):
    """What `[serve]` asks for, of one run.  Made by `open_publishing`."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        blueprint: Blueprint,
        gate: Gate,
        observer: Observer,
    ) -> None:
        self._serve, self._count = config.serve, config.rounds.count
        self._registry, self._blueprint, self._gate = registry, blueprint, gate
        self._observer = observer

    def close(self) -> None:
        self._registry.close()

    def due(self, number: int) -> bool:
        """Whether the adapter after this round is published."""
        return self._serve.due(number, self._count)

    def parents(self, run_id: str, number: int) -> tuple[str, ...]:
        """The version that this run published before round `number`: what that one goes on from."""
        own = [
            version
            for version in self._registry.versions(self._serve.name)
            if version.facts["run_id"] == run_id and version.facts["rounds"] < number
        ]
        newest = max(own, key=lambda version: int(version.facts["rounds"]), default=None)
        return () if newest is None else (newest.id,)

    def publish(self, folder: Path, number: int) -> Version:
        """Publish `folder/adapter`, signed by `folder/manifest.json`, and move the alias to it.

        What a gate refuses stays published; its reasons are told.  Raises what
        `Registry.publish` raises.
        """
        version = self._registry.publish(
            self._serve.name, folder / ADAPTER, folder / MANIFEST, self._blueprint
        )
        promoted = bool(self._serve.alias) and self._promote(version, number)
        facts = {"version": str(version), "id": version.id}
        alias = self._serve.alias if promoted else ""
        self._observer(Event("published", number, {**facts, "alias": alias}))
        return version

    def _promote(self, version: Version, number: int) -> bool:
        """Whether the alias points to a version now.  It is decided once: what was refused then,
        or rolled back since, is not tried again."""
        name, alias = version.name, self._serve.alias
        if not self._is_decided(version):
            why = f"published after {number} rounds"
            try:
                self._registry.promote(version, alias, self._gate, why)
            except PromotionError as error:
                self._observer(Event("notice", number, {"text": str(error)}))
        points = [found.version for found in self._registry.aliases(name) if found.alias == alias]
        return points == [version]

    def _is_decided(self, version: Version) -> bool:
        return any(
            entry.kind in _DECIDED and entry.after == version.id
            for entry in self._registry.history(version.name, self._serve.alias)
        )


def open_publishing(
    config: Config, blueprint: Blueprint, who: Identity, observer: Observer, disk: Disk
) -> Publishing | None:
    """None where the run publishes nothing.

    Mistakes show here, before the work: raises what `check_serve` and `Registry.open` raise, and
    IdentityError where the registry does not trust the run's key.
    """
    serve = config.serve
    if not serve.name:
        return None
    check_serve(config)
    folder = Path(serve.registry) if serve.registry else default_folder()
    registry = Registry.open(folder, who, disk)
    try:
        _check_trusted(registry, who)
        return Publishing(config, registry, blueprint, gate_of(config, registry), observer)
    except BaseException:
        registry.close()
        raise


def check_serve(config: Config) -> None:
    """Refuse, before anybody is invited, what could not be published or gated.

    Raises RegistryError for names, ConfigError for files and settings.
    """
    serve = config.serve
    if not serve.name:
        return
    adapter_name(serve.name)
    if serve.canaries:
        read_canaries(Path(serve.canaries))
    if serve.held_out:
        require_rows(serve.held_out)
    if serve.alias:
        alias_name(serve.alias)
        _check_measured(config)


def gate_of(config: Config, registry: Registry) -> Gate:
    """What a run's version has to pass, in the precision in which it is served."""
    serve, how = config.serve, serving_of(config)
    gates: list[Gate] = [LineageGate()]
    if not serve.held_out:
        gates.append(LossGate(serve.max_loss_increase, how.precision))
    if serve.held_out or serve.canaries:
        gates.append(
            MeasuredGate(registry, how, serve.held_out, serve.canaries, serve.max_loss_increase)
        )
    return AllOf(gates)


def serving_of(config: Config) -> Serving:
    """How a run's adapters are served: as they are trained, where `[serve]` does not say."""
    model, serve = config.model, config.serve
    dtype, quantize = serve.dtype or model.dtype, serve.quantize or model.quantize
    return Serving(model.base, dtype, quantize, model.device, config.data.max_length)


def _check_measured(config: Config) -> None:
    """Refuse settings under which a gate would have nothing to go by."""
    serve, model, rounds = config.serve, config.model, config.rounds
    if serve.held_out:
        return
    trained, served = precision(model.dtype, model.quantize), serving_of(config).precision
    if trained != served:
        raise ConfigError(
            f"[serve] the run's losses are measured in {trained}, and it is served in {served}",
            "name rows to measure it on as it is served: [serve] held_out",
        )
    if serve.publish_every % rounds.evaluate_every:
        raise ConfigError(
            f"[serve] publish_every = {serve.publish_every} publishes rounds without a loss",
            f"a multiple of [rounds] evaluate_every = {rounds.evaluate_every}, or [serve] held_out",
        )


def _check_trusted(registry: Registry, who: Identity) -> None:
    if who.key_id not in registry.trusted():
        raise IdentityError(
            f"the registry {registry.folder} does not trust this run's key {who.key_id[:16]}",
            "its owner says: `meadow adapters trust KEY.pem`",
        )
