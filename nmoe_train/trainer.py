"""The clients and their networks, stage by stage: extractor -> experts -> gate.

The trainer turns a Checkpoint into the next one. It reads and writes no folder: the caller passes a function that saves
a checkpoint. pipeline.py is that caller; assessment.py evaluates what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nmoe_train.checkpoint import Checkpoint
from nmoe_train.config import Config
from nmoe_train.data.clients import Clients, Part
from nmoe_train.data.datasets import Dataset
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.meter import StageMeter, usage_of
from nmoe_train.nets import NetSpec, build, probe
from nmoe_train.run import Networks, Run
from nmoe_train.stages.experts import train_experts
from nmoe_train.stages.extractor import ENCODE_BATCH, Headed, MatrixNoise, fedce_round, fedsc_round
from nmoe_train.stages.federation import Round, State, generator, size_bytes
from nmoe_train.stages.gate import Gate, composed_gate, fedgate_round, gate_samples, rollgate_stop
from nmoe_train.stages.scaffold import scaffold_round, zero_variates
from nmoe_train.stages.statgate import statgate_round
from nmoe_train.stages.statistics import client_statistics, to_state
from nmoe_train.stages.weights import copy_state, select_part, to_device

VARIATES = "variates"
"""Where a checkpoint holds SCAFFOLD's control variates during stage 1"""
STAGES = ("extractor", "experts", "gate", "evaluate")
STATISTICS = "statistics"
"""Key of what StatGate's clients publish, in a checkpoint's states."""

Progress = Callable[[Round], None]
"""Called after every round."""
FinishRound = Callable[[Checkpoint, Sequence[State], Round], Checkpoint]
"""(checkpoint, the stage's new states, the round) -> the next checkpoint, saved and reported."""


@dataclass(frozen=True, slots=True, eq=False)
class FrozenOutputs:
    """What the frozen extractor and experts compute for one part of the data."""

    latents: Tensor
    """(n, d)"""
    expert_outputs: Tensor
    """Every expert's outputs for every latent (n, N, K)"""
    y: Tensor
    """True classes (n,)"""


class Trainer:
    """Trains the networks of all clients.

    The constructor builds every network and tries the extractor on two images. Raises ConfigError or NetError when the
    settings do not fit the data or the networks.
    """

    def __init__(self, config: Config, dataset: Dataset, clients: Clients, device: torch.device) -> None:
        self.config = config
        self.dataset = dataset
        self.clients = clients
        self.device = device
        self.classes = len(dataset.labels)
        self.count = len(clients.train)
        """Number of clients, which is the number of experts."""
        torch.manual_seed(config.seed)  # first weights come from this seed, so keep the order below
        fedce = config.extractor.method == "fedce"
        head = config.head_net(self.classes)
        self.specs = Networks(
            self._extractor_spec(),
            config.gate_net(self.classes),
            config.expert_net(self.classes),
            head if fedce else None,
        )
        self.classifier = Headed(build(self.specs.extractor), build(head))
        probe(self.classifier.extractor, dataset.shape, config.extractor.dim)
        self.expert = build(self.specs.expert)
        own = config.gate.own if config.gate.method == "fedgate" else "nothing"
        self.gate = Gate(build(self.specs.gate), config.extractor.dim, self.count, own)
        self.classifier.to(device)
        self.matrix_noise = MatrixNoise([len(y) for _, y in clients.train], config.extractor, config.fedsc)
        self.extractor_rounds = config.extractor.rounds if fedce else self.matrix_noise.rounds
        """Rounds of the extractor stage; a privacy budget can end it early."""
        self._check_privacy()
        self._check_batch_norm()

    def _check_privacy(self) -> None:
        if not self.extractor_rounds:
            raise ConfigError(
                "fedsc.epsilon: a single release with this fedsc.sigma exceeds the budget;"
                " raise fedsc.epsilon or fedsc.sigma"
            )
        if self.matrix_noise.epsilon_after(self.extractor_rounds) == math.inf:
            raise ConfigError(
                f"fedsc.sigma is {self.config.fedsc.sigma}: so little noise gives no privacy (ε is infinite); raise it"
            )

    def _check_batch_norm(self) -> None:
        has_batch_norm = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.classifier.modules())
        smallest_client = min(len(y) for _, y in self.clients.train)
        if has_batch_norm and min(self.config.extractor.batch, smallest_client) < 2:
            raise ConfigError(
                "BatchNorm needs two samples in a batch: raise extractor.batch, lower data.clients, or use another norm"
            )

    def _extractor_spec(self) -> NetSpec:
        """A backbone from the registry gets the images' shape and statistics; any other gets only its own arguments."""
        extractor = self.config.extractor
        if ":" in extractor.backbone:
            return NetSpec(extractor.backbone, dict(extractor.arguments))
        channels, height, width = self.dataset.shape
        if height != width:
            raise ConfigError(
                f"images are {height} × {width}, but {extractor.backbone} takes square ones;"
                " crop them, or name your own backbone: package.module:factory"
            )
        mean, std = self.dataset.statistics()
        given = {"channels": channels, "size": height, "dim": extractor.dim, "mean": mean, "std": std}
        return NetSpec(extractor.backbone, given | dict(extractor.arguments))

    def initial_checkpoint(self, empty: Checkpoint, again: tuple[Run, str] | None) -> Checkpoint:
        """`empty` with the states that a training starts from.

        A new training starts from the fresh extractor. With `again` = (run, stage), weights, history and usage of the
        stages before `stage` come from the run. Raises RunError when the run's data has changed.
        """
        checkpoint = replace(empty, fingerprint=self.clients.fingerprint)
        fresh = {"extractor": [copy_state(self.classifier)] * self.count}
        if again is None:
            return replace(checkpoint, states=fresh)
        run, stage = again
        if run.record.data.fingerprint != self.clients.fingerprint:
            raise RunError(
                f"{run.folder}: its data or the split has changed since it was trained, so no stage can be kept;"
                " restore the data, or train a new run"
            )
        kept = STAGES[: STAGES.index(stage)]
        history = run.metrics.get("history", [])
        usage = usage_of(run.metrics)
        return replace(
            checkpoint,
            stage=stage,
            states=self._kept_states(run, kept) or fresh,
            history=[entry for entry in history if entry.get("stage") in kept],
            usage={name: value for name, value in usage.items() if name in kept},
        )

    def _kept_states(self, run: Run, kept: Sequence[str]) -> dict[str, Sequence[State]]:
        """The states of stages that are not trained again, from a run's files."""
        states: dict[str, Sequence[State]] = {name: self._states_of(run, name) for name in kept}
        published = run.statistics()
        return {**states, STATISTICS: [to_state(one) for one in published]} if "gate" in kept and published else states

    def _states_of(self, run: Run, stage: str) -> list[State]:
        """A stage's states of all clients, from a run's files."""
        devices = range(self.count)
        if stage == "extractor":
            return self._extractor_states_of(run)
        if stage == "experts":
            return [run.expert(i).state_dict() for i in devices]
        fresh_gate = copy_state(self.gate)
        own = {key: value for key, value in fresh_gate.items() if key.startswith("own.")}
        return [composed_gate(run.gate(i).state_dict(), own) for i in devices]

    def _extractor_states_of(self, run: Run) -> list[State]:
        extractor = {f"extractor.{key}": value for key, value in run.extractor().state_dict().items()}
        heads_are_local = "heads/00.safetensors" in run.record.files
        states: list[State] = []
        for i in range(self.count if heads_are_local else 1):
            head = run.head(i)
            head_state = head.state_dict() if head else {}
            states.append(extractor | {f"head.{key}": value for key, value in head_state.items()})
        return states if heads_are_local else states * self.count

    def train_stages(
        self, checkpoint: Checkpoint, save: Callable[[Checkpoint], None], progress: Progress
    ) -> Checkpoint:
        """Train every stage that `checkpoint` has not finished, and return the last checkpoint.

        After every round, `save` gets the new checkpoint, and then `progress` the round.
        """
        train_stage = {"extractor": self._train_extractor, "experts": self._train_experts, "gate": self._train_gate}
        first = STAGES.index(checkpoint.stage)
        for name, following in zip(STAGES[first:-1], STAGES[first + 1 :], strict=True):
            meter = StageMeter(checkpoint.usage, name)

            def finish_round(
                c: Checkpoint, states: Sequence[State], finished: Round, meter: StageMeter = meter
            ) -> Checkpoint:
                c = replace(
                    c,
                    round=finished.round,
                    states={**c.states, finished.stage: states},
                    history=[*c.history, _history_entry(finished)],
                    usage=meter.usage(),
                )
                save(c)
                progress(finished)
                return c

            if name != "extractor":
                self._freeze_extractor(checkpoint)
            checkpoint = train_stage[name](checkpoint, finish_round, progress)
            checkpoint = replace(checkpoint, stage=following, round=0, usage=meter.usage())
        self._freeze_extractor(checkpoint)
        return checkpoint

    def _freeze_extractor(self, checkpoint: Checkpoint) -> None:
        """Load the extractor that stage 1 trained."""
        self.classifier.extractor.load_state_dict(select_part(checkpoint.states["extractor"][0], "extractor."))
        self.classifier.eval()

    def _train_extractor(self, c: Checkpoint, finish_round: FinishRound, _progress: Progress) -> Checkpoint:
        """Stage 1."""
        config = replace(self.config.extractor, rounds=self.extractor_rounds)
        seed = self.config.seed
        data = [(x.to(self.device), y.to(self.device)) for x, y in self.clients.train]
        for round_ in range(c.round, self.extractor_rounds):
            states = to_device(c.states["extractor"], self.device)
            if config.correction == "scaffold":
                before = c.states.get(VARIATES) or zero_variates(self.classifier, self.count)
                variates: Sequence[State] = to_device(before, self.device)
                states, variates, finished = scaffold_round(
                    self.classifier, states, variates, data, round_, seed, config
                )
                c = replace(c, states={**c.states, VARIATES: to_device(variates, torch.device("cpu"))})
            elif config.method == "fedce":
                states, finished = fedce_round(self.classifier, states, data, round_, seed, config)
            else:
                states, finished = fedsc_round(self.classifier, states, data, round_, seed, config, self.config.fedsc)
            c = finish_round(c, to_device(states, torch.device("cpu")), finished)
        return replace(c, states={name: each for name, each in c.states.items() if name != VARIATES})

    def _train_experts(self, c: Checkpoint, finish_round: FinishRound, progress: Progress) -> Checkpoint:
        """Stage 2, with a single checkpoint at its end: the whole stage takes seconds."""
        if c.round:
            return c
        data = [(encode(self.classifier.extractor, x), y) for x, y in self.clients.train]
        epochs: list[Round] = []

        def finish_epoch(epoch: Round) -> None:
            epochs.append(epoch)
            progress(epoch)

        config = self.config
        states, last = train_experts(
            self.expert, self._expert_starts(c), data, self.classes, config.seed, config.experts, finish_epoch
        )
        c = replace(c, history=[*c.history, *map(_history_entry, epochs)])
        if config.gate.method == "fedgate":  # FedGate needs every expert on every device
            sent = size_bytes(states[0])
            last = replace(last, up=self.count * sent, down=self.count * (self.count - 1) * sent)
        return finish_round(c, states, last)

    def _expert_starts(self, c: Checkpoint) -> Sequence[State]:
        """The state that each expert starts from: stage 1's head, or new weights."""
        if self.config.experts.start == "head":
            return [select_part(state, "head.") for state in c.states["extractor"]]
        starts = []
        for i in range(self.count):
            torch.manual_seed(generator(self.config.seed, "expert", i).initial_seed())
            starts.append(build(self.specs.expert).state_dict())
        return starts

    def _train_gate(self, c: Checkpoint, finish_round: FinishRound, _progress: Progress) -> Checkpoint:
        """Stage 3. RanGate trains nothing, and StatGate is assembled in one round."""
        config = self.config.gate
        if config.method == "statgate":
            return self._assemble_gate(c, finish_round)
        if "gate" not in c.states:
            c = replace(c, states={**c.states, "gate": [copy_state(self.gate)] * self.count})
        rounds = {"rangate": 0, "rollgate": config.laps * self.count, "fedgate": config.rounds}[config.method]
        if c.round >= rounds:
            return c
        step = fedgate_round if config.method == "fedgate" else rollgate_stop
        frozen = [self.frozen_outputs(c, part) for part in self.clients.train]
        data = [gate_samples(f.latents, f.expert_outputs, f.y, config.loss) for f in frozen]
        for round_ in range(c.round, rounds):
            states, finished = step(self.gate, c.states["gate"], data, round_, self.config.seed, config)
            c = finish_round(c, states, finished)
        return c

    def _assemble_gate(self, c: Checkpoint, finish_round: FinishRound) -> Checkpoint:
        """Stage 3 for StatGate."""
        if c.round:
            return c
        config = self.config
        parts = [(encode(self.classifier.extractor, x), y) for x, y in self.clients.train]
        published = [
            client_statistics(h, y, self.classes, config.gate, config.seed, i) for i, (h, y) in enumerate(parts)
        ]
        held_out = [encode(self.classifier.extractor, x) for x, _ in self.clients.held_out]
        state, finished = statgate_round(published, held_out, config.gate)
        c = replace(c, states={**c.states, STATISTICS: [to_state(one) for one in published]})
        return finish_round(c, [composed_gate(state, {})] * self.count, finished)

    def frozen_outputs(self, c: Checkpoint, part: Part) -> FrozenOutputs:
        """The latents and the experts' outputs of a part of the data."""
        x, y = part
        h = encode(self.classifier.extractor, x)
        experts = c.states["experts"]
        stacked = {key: torch.stack([state[key] for state in experts]) for key in experts[0]}
        every_expert = vmap(lambda state, h: functional_call(self.expert, state, (h,)), in_dims=(0, None), out_dims=1)
        with torch.no_grad():
            outputs = torch.cat([every_expert(stacked, rows) for rows in h.split(ENCODE_BATCH)])
        return FrozenOutputs(h, outputs, y)

    def heads(self, c: Checkpoint) -> list[State]:
        """Stage 1's heads for the run: a single shared one, one per client, or none."""
        if self.specs.head is None:
            return []
        states = c.states["extractor"]
        if self.config.extractor.heads == "shared":
            states = states[:1]
        return [select_part(state, "head.") for state in states]


def _history_entry(finished: Round) -> dict[str, Any]:
    """A round as metrics.json lists it: without fields that are empty."""
    return {key: value for key, value in asdict(finished).items() if value not in (None, ())}


def encode(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) in eval mode, in batches, on the network's device. The result is on the CPU."""
    net.eval()
    device = next(iter(net.state_dict().values()), torch.empty(0)).device
    with torch.no_grad():
        return torch.cat([net(part.to(device)).cpu() for part in x.split(ENCODE_BATCH)])
