"""Every error that meadow raises on purpose.

    MeadowError              one clear line; `hint` says what to do
    ├── ConfigError          run.toml or a command line option
    ├── DataError            a participant's text
    ├── ModelError           the base model
    ├── AdapterError         a LoRA adapter, on disk or about to be written
    ├── UpdateError          a contribution that cannot be counted
    ├── FormatError          another format version, or bytes that are not what they say
    ├── RecordError          what a peer signed and what cannot count; `reason` names why
    ├── QuorumError          too few contributions in a round
    ├── JournalError         a run's folder that cannot be continued
    ├── IdentityError        a key that cannot be used, or a signature that does not hold
    ├── InvitationError      an invitation that is cut off, expired, used, or unknown
    ├── RosterError          a participant whose state does not allow what is asked
    ├── StorageError         the disk is full or not writable
    ├── PeerError            a peer that cannot be reached, or that refuses
    ├── GatewayError         the coordinator's gateway cannot be reached, or refuses
    ├── RegistryError        a version, alias or signer that does not allow what is asked
    │   ├── UnknownAdapterError   no such adapter, version or alias
    │   └── PromotionError   a gate refuses a version; `reasons` say why
    ├── ServingError         a request that cannot be served
    │   ├── UnknownModelError    no such base, adapter, alias or version
    │   ├── TooLongError         more tokens than `limit`
    │   ├── OverloadedError      too many requests wait; `retry_after` seconds
    │   └── StoppedError         the server is ending, or its engine broke down
    ├── ReplicaError         a server that adapters are published to: away, or it refuses
    ├── PolicyError          a request that a participant's policy does not allow
    └── TrainerError         the resident trainer does not run, or refuses

The command line prints `str(error)` and exits with status 2; anything else is a defect and shows
its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class MeadowError(Exception):
    """A fault that its user can understand and mend."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(MeadowError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class DataError(MeadowError):
    """Text that cannot be read or used; names file and line where there is one."""


class ModelError(MeadowError):
    """A base model that cannot be loaded or adapted."""


class AdapterError(MeadowError):
    """An adapter that is malformed, not finite, or made for another base."""


class UpdateError(MeadowError):
    """A contribution that is refused: wrong names or shapes, not finite, bad weight."""


class FormatError(MeadowError):
    """Another format version, or bytes whose sizes contradict each other."""


class RecordError(MeadowError):
    """Something of a peer that is refused; it is counted under `reason`."""

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


class QuorumError(MeadowError):
    """Fewer contributions than the quorum before the deadline."""


class JournalError(MeadowError):
    """A run's folder that belongs to another run, or is damaged."""


class IdentityError(MeadowError):
    """A key file that is damaged or open to others, or a signature that nobody trusted made."""


class InvitationError(MeadowError):
    """An invitation that is cut off, expired, used or unknown, or names what cannot be."""


class RosterError(MeadowError):
    """No such participant, or one whose state does not allow what is asked of it."""


class StorageError(MeadowError):
    """The disk is full or cannot be written; what was acknowledged is safe."""


class PeerError(MeadowError):
    """A peer that cannot be reached, refuses, or does not keep to what it said."""


class FlowerError(MeadowError):
    """One of Flower's programs refuses or gives no answer."""


class GatewayError(MeadowError):
    """The coordinator's gateway cannot be reached, or refuses."""

    def __init__(self, message: str, hint: str = "", status: int = 0) -> None:
        """`status` is HTTP's; 0 where there was no answer."""
        super().__init__(message, hint)
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered later: now the gateway is away, or too busy."""
        return self.status in (0, 429, 502, 503, 504)


class RegistryError(MeadowError):
    """A name, version or signer of the registry that does not allow what is asked of it."""


class UnknownAdapterError(RegistryError):
    """No such adapter, version or alias in the registry."""


class PromotionError(RegistryError):
    """A gate refuses that an alias moves to a version."""

    def __init__(self, message: str, reasons: Sequence[str], hint: str = "") -> None:
        super().__init__(f"{message}: {'; '.join(reasons)}", hint)
        self.reasons = tuple(reasons)


class ServingError(MeadowError):
    """A request that cannot be served."""


class UnknownModelError(ServingError):
    """No base, adapter, alias or version of this name is served."""


class TooLongError(ServingError):
    """A prompt that, with what was asked for, has more tokens than `limit`."""

    def __init__(self, message: str, limit: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.limit = limit


class OverloadedError(ServingError):
    """Too many requests wait; this one may come again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float, hint: str = "") -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class StoppedError(ServingError):
    """The server is ending and takes nothing new, or its engine broke down."""


class ReplicaError(MeadowError):
    """A server that adapters are published to cannot be reached, or refuses."""

    def __init__(self, message: str, hint: str = "", status: int = 0) -> None:
        """`status` is HTTP's; 0 where there was no answer."""
        super().__init__(message, hint)
        self.status = status


class PolicyError(MeadowError):
    """A request that this participant's own policy does not allow."""


class TrainerError(MeadowError):
    """The resident trainer does not run, or refuses a request; the reason is its own."""


class DeploymentError(MeadowError):
    """A process of a deployment failed, or did not get to where it should."""


def quoted(text: object) -> str:
    """Foreign text for a one-line message: escaped, and not longer than a line."""
    found = repr(text)
    return found if len(found) <= 120 else found[:117] + "..."
