"""A federation without a model: each client pulls the product towards a matrix of its own.

Client k answers `Sgd` by gradient descent with momentum on the sum, over the layers, of
|B A + side - W_k|^2 / 2 (its momentum stands for AdamW's kept state), `Loss` by that sum and
`Probe` by that sum at either side of the state.  Cores lie between their pool's signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from meadow.client.task import drive
from meadow.peft_adapters.bank import core_stack
from meadow.peft_adapters.layout import Site, Tree, modules_of
from meadow.peft_adapters.pool import Pool
from meadow.strategies.base import (
    Answer,
    Loss,
    Measured,
    Probe,
    Probed,
    Request,
    Sgd,
    State,
    Strategy,
    Trained,
    Turn,
    Update,
)
from meadow.strategies.messages import (
    INTEGERS,
    SENT,
    check_contribution,
    pack_state,
    pack_update,
    unpack_state,
    unpack_update,
)

SITES = (Site("block.one", 7, 5), Site("block.two", 4, 6))
RANK = 3
NAMES = ("ada", "bob", "eve")


def adapter(seed: int, rank: int = RANK, sites: Sequence[Site] = SITES) -> Tree:
    """A random adapter, both factors of it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{factor}": torch.randn(site.shape(factor, rank), generator=generator)
        for site in sites
        for factor in ("lora_A", "lora_B")
    }


def dense(*trees: Tree) -> Tree:
    """The sum of the adapters' products, in float64, by module."""
    sums = {site.name: torch.zeros(site.rows, site.columns).double() for site in SITES}
    for tree in trees:
        for name in modules_of(tree):
            sums[name] += tree[f"{name}.lora_B"].double() @ tree[f"{name}.lora_A"].double()
    return sums


def mean_product(updates: Sequence[Update]) -> Tree:
    """The weighted mean of the updates' products, in float64, by module."""
    whole = sum(update.weight for update in updates)
    parts = [(dense(update.tensors), update.weight / whole) for update in updates]
    return {s.name: sum(share * part[s.name] for part, share in parts) for s in SITES}  # type: ignore[misc]


def between_signs(pool: Pool, cores: torch.Tensor, scale: float = 1.0) -> Tree:
    """scale U C V^T of every site as an adapter."""
    tree = {}
    for index, site in enumerate(pool.sites):
        core = cores[index if pool.cores == "per_layer" else 0]
        left, right = _signs(pool, index)
        tree[f"{site.name}.lora_A"] = right.to(core)
        tree[f"{site.name}.lora_B"] = scale * left.to(core).T @ core
    return tree


@cache
def _signs(pool: Pool, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pool.left(index), pool.right(index)


def apart(first: Tree, second: Tree) -> float:
    """The largest difference of equally named tensors; infinite where names differ."""
    if first.keys() != second.keys():
        return float("inf")
    return max(float((first[n].double() - second[n].double()).abs().max()) for n in first)


@dataclass(frozen=True)
class ToyClient:
    """One participant: its matrices come from its name."""

    name: str
    examples: int
    lr: float = 0.05

    @property
    def targets(self) -> Tree:
        """What all want, and a third as much that only this one wants."""
        both = [torch.Generator().manual_seed(seed) for seed in (0, sum(self.name.encode()))]
        shared, own = ([torch.randn(s.rows, s.columns, generator=g) for s in SITES] for g in both)
        return {s.name: a + b / 3 for s, a, b in zip(SITES, shared, own, strict=True)}

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Loss):
            return Measured(float(self._loss(request.adapter, request.side)), 7)
        if isinstance(request, Probe):
            return self._probe(request)
        return self._train(request)

    def _probe(self, request: Probe) -> Probed:
        pool, losses = request.pool, []
        for k in request.directions:
            step = pool.zero().double().view(-1, pool.size)
            step[:, k] = request.epsilon
            at = request.q.double() * 2.0**-pool.unit
            both = (at + sign * step.view(at.shape) for sign in (1, -1))
            losses.append([float(self._loss(between_signs(pool, c), None)) for c in both])
        return Probed(torch.tensor(losses, dtype=torch.float64), self.examples, 11)

    def _loss(self, tree: Tree, side: Tree | None) -> torch.Tensor:
        losses = []
        for name, target in self.targets.items():
            got = tree[f"{name}.lora_B"] @ tree[f"{name}.lora_A"]
            target = target.to(got)
            if side is not None:
                got = got + side[f"{name}.lora_B"] @ side[f"{name}.lora_A"]
            losses.append((got - target).square().sum() / 2)
        return torch.stack(losses).sum()

    def _train(self, request: Sgd) -> Trained:
        tree = {name: tensor.clone() for name, tensor in request.adapter.items()}
        moving = [name for name in sorted(tree) if name.endswith(request.train)]
        momentum = {f"exp_avg/{name}": torch.zeros_like(tree[name]) for name in moving}
        momentum |= request.optimizer or {}
        losses = []
        for _ in range(request.steps):
            leaves = {n: t.detach().requires_grad_(n in moving) for n, t in tree.items()}
            adapter = leaves
            if request.pool:
                cores = core_stack(request.pool, leaves)
                adapter = between_signs(request.pool, cores, request.scale)
            loss = self._loss(adapter, request.side)
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, [leaves[name] for name in moving])
            for name, gradient in zip(moving, gradients, strict=True):
                momentum[f"exp_avg/{name}"] = 0.5 * momentum[f"exp_avg/{name}"] + gradient
                tree[name] = tree[name] - self.lr * momentum[f"exp_avg/{name}"]
        return Trained(tree, momentum, sum(losses) / len(losses), self.examples, 11)


@dataclass
class ToyFederation:
    """Runs a strategy round by round as client and coordinator do, everything through bytes.

    With `restart`, state and memories too are packed and read back after every round.
    """

    strategy: Strategy
    clients: Sequence[ToyClient] = (ToyClient("ada", 3), ToyClient("bob", 5), ToyClient("eve", 2))
    steps: int = 3
    restart: bool = False
    joined: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state: State = self.strategy.init(1)
        self.memories = {client.name: State() for client in self.clients}
        self.updates: list[Update] = []  # of the last round
        self.sent = Update({})
        self.figures: dict[str, float] = {}

    def turn(self, number: int, client: str = "") -> Turn:
        cohort = tuple(person.name for person in self.clients)
        joined = self.joined.get(client, 1)
        return Turn(number, 6, 1, self.steps, 6 * self.steps, client, cohort, joined)

    def run(self, rounds: int) -> ToyFederation:
        for number in range(1, rounds + 1):
            self.round(number)
        return self

    def round(self, number: int) -> None:
        turn = self.turn(number)
        self.sent = self.strategy.broadcast(self.state, turn)
        self.updates = [self._contribution(client, number) for client in self.clients]
        reducer = self.strategy.reducer(turn)
        for update in self.updates:
            reducer.fold(update)
        total = reducer.total()
        self.figures = self.strategy.report(total, turn)
        self.state = self.strategy.step(self.state, total, turn)
        if self.restart:
            self.state = unpack_state(pack_state(self.state))
            self.memories = {n: unpack_state(pack_state(m)) for n, m in self.memories.items()}

    def _contribution(self, client: ToyClient, number: int) -> Update:
        turn = self.turn(number, client.name)
        received, _ = unpack_update(pack_update(self.sent))
        work = self.strategy.work(received, self.memories[client.name], turn)
        update, self.memories[client.name] = drive(work, client.answer)
        expect = self.strategy.template(self.sent, turn)
        types = INTEGERS if self.strategy.integers else SENT
        update = check_contribution(pack_update(update), expect, client.name, types)
        self.strategy.validate(update, turn)
        return update

    def loss(self, number: int) -> float:
        """The mean of what each client would measure after round `number`."""
        turns = [self.turn(number, client.name) for client in self.clients]
        received = self.strategy.broadcast(self.state, turns[0])
        losses = []
        for client, turn in zip(self.clients, turns, strict=True):
            measured = client.answer(self.strategy.own(received, self.memories[client.name], turn))
            assert isinstance(measured, Measured)
            losses.append(measured.loss)
        return sum(losses) / len(losses)
