"""The clients and their networks, stage by stage: extractor -> experts -> gate -> what they are worth.

Knows no folder and no clock but its own: where a training stands is a Checkpoint, and what becomes of it is the
caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nmoe_edge.common.schema import to_plain
from nmoe_train.checkpoint import Checkpoint
from nmoe_train.config import Config
from nmoe_train.data.clients import Clients, Part
from nmoe_train.data.datasets import Dataset
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.nets import NetSpec, build, probe
from nmoe_train.results.evaluation import DeviceRows, adapted, choose_threshold, evaluate, measure
from nmoe_train.run import DataRecord, Inference, Networks, Run, RunRecord
from nmoe_train.stages.experts import train_experts
from nmoe_train.stages.extractor import ENCODE_BATCH, Headed, Shield, fedce_round, fedsc_round
from nmoe_train.stages.federation import Round, State, generator, size
from nmoe_train.stages.gate import Gate, fedgate_round, gate_samples, imported, rollgate_stop

STAGES = ("extractor", "experts", "gate", "evaluate")

Progress = Callable[[Round], None]


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
    """The clients and their networks, stage by stage."""

    def __init__(self, config: Config, dataset: Dataset, clients: Clients, device: torch.device) -> None:
        """Builds every network, and tries the extractor."""
        self.config, self.dataset, self.clients, self.device = config, dataset, clients, device
        self.classes, self.count = len(dataset.labels), len(clients.train)
        torch.manual_seed(config.seed)
        head = config.head_net(self.classes)
        self.networks = Networks(
            self._extractor_net(),
            config.gate_net(),
            config.expert_net(self.classes),
            head if config.extractor.method == "fedce" else None,
        )
        self.net = Headed(build(self.networks.extractor), build(head))
        probe(self.net.extractor, dataset.shape, config.extractor.dim)
        self.expert = build(self.networks.expert)
        own = config.gate.own if config.gate.method == "fedgate" else "nothing"
        self.gate = Gate(build(self.networks.gate), config.extractor.dim, self.count, own)
        self.net.to(device)
        self.shield = Shield([len(y) for _, y in clients.train], config.extractor, config.fedsc)
        self.rounds = config.extractor.rounds if config.extractor.method == "fedce" else self.shield.rounds
        if not self.rounds:
            raise ConfigError("fedsc.epsilon: one release with this fedsc.sigma costs more; raise either")
        if self.shield.spent(self.rounds) == math.inf:
            raise ConfigError(f"fedsc.sigma is {config.fedsc.sigma}: so little noise protects nothing; raise it")
        normed = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.net.modules())
        if normed and min(config.extractor.batch, *(len(y) for _, y in clients.train)) < 2:
            raise ConfigError(
                "BatchNorm needs two samples: a larger extractor.batch, fewer data.clients, or another norm"
            )

    def _extractor_net(self) -> NetSpec:
        """Ours get the images' shape and statistics; anybody's own gets what the configuration says."""
        extractor = self.config.extractor
        if ":" in extractor.backbone:
            return NetSpec(extractor.backbone, dict(extractor.arguments))
        channels, height, width = self.dataset.shape
        if height != width:
            raise ConfigError(
                f"images of {height} × {width}: {extractor.backbone} takes square ones; bring a backbone of your own"
            )
        mean, std = self.dataset.statistics()
        given = {"channels": channels, "size": height, "dim": extractor.dim, "mean": mean, "std": std}
        return NetSpec(extractor.backbone, given | dict(extractor.arguments))

    def begun(self, c: Checkpoint, again: tuple[Run, str] | None) -> Checkpoint:
        """The first checkpoint: fresh networks, or those of a run up to the stage that is trained again."""
        fresh = {"extractor": [_detached(self.net)] * self.count}
        if again is None:
            return replace(c, states=fresh)
        run, stage = again
        if run.record.data.fingerprint != self.clients.fingerprint:
            raise RunError(
                f"{run.folder}: its data has changed since, or is split otherwise: nothing of it can be kept"
            )
        kept = STAGES[: STAGES.index(stage)]
        states = {"extractor": lambda: self._extractors(run), "experts": lambda: self._experts(run)}
        states["gate"] = lambda: [imported(run.gate(i).state_dict(), _own(self.gate)) for i in range(self.count)]
        return replace(
            c,
            stage=stage,
            states={name: states[name]() for name in kept} or fresh,
            history=[entry for entry in run.metrics.get("history", []) if entry.get("stage") in kept],
            seconds={name: s for name, s in run.metrics.get("seconds", {}).items() if name in kept},
        )

    def _extractors(self, run: Run) -> list[State]:
        extractor = {f"extractor.{key}": value for key, value in run.extractor().state_dict().items()}
        heads = [run.head(i) for i in range(self.count if "heads/00.safetensors" in run.record.files else 1)]
        states = [
            {**extractor, **({f"head.{k}": v for k, v in head.state_dict().items()} if head else {})} for head in heads
        ]
        return states * (self.count // len(states))

    def _experts(self, run: Run) -> list[State]:
        return [run.expert(i).state_dict() for i in range(self.count)]

    def trained(self, c: Checkpoint, save: Callable[[Checkpoint], None], progress: Progress) -> Checkpoint:
        """Every stage that is left, one after another."""
        stages = {"extractor": self._train_extractor, "experts": self._train_experts, "gate": self._train_gate}
        for name in STAGES[STAGES.index(c.stage) : -1]:
            clock = _Clock(c, name)

            def after(c: Checkpoint, states: Sequence[State], told: Round, clock: _Clock = clock) -> Checkpoint:
                c = replace(
                    c,
                    round=told.round,
                    states={**c.states, told.stage: states},
                    history=[*c.history, _entry(told)],
                    seconds=clock.seconds(),
                )
                save(c)
                progress(told)
                return c

            if name != "extractor":
                self._settle(c)
            c = stages[name](c, after, progress)
            c = replace(c, stage=STAGES[STAGES.index(name) + 1], round=0, seconds=clock.seconds())
        self._settle(c)
        return c

    def _settle(self, c: Checkpoint) -> None:
        """Take the extractor that stage 1 left."""
        state = c.states["extractor"][0]
        self.net.extractor.load_state_dict(
            {key.removeprefix("extractor."): value for key, value in state.items() if key.startswith("extractor.")}
        )
        self.net.eval()

    def _train_extractor(self, c: Checkpoint, after: Callable[..., Checkpoint], _progress: Progress) -> Checkpoint:
        """Stage 1."""
        config, fedsc, seed = replace(self.config.extractor, rounds=self.rounds), self.config.fedsc, self.config.seed
        data = [(x.to(self.device), y.to(self.device)) for x, y in self.clients.train]
        for round_ in range(c.round, self.rounds):
            states = moved(c.states["extractor"], self.device)
            if config.method == "fedce":
                states, told = fedce_round(self.net, states, data, round_, seed, config)
            else:
                states, told = fedsc_round(self.net, states, data, round_, seed, config, fedsc)
            c = after(c, moved(states, torch.device("cpu")), told)
        return c

    def _train_experts(self, c: Checkpoint, after: Callable[..., Checkpoint], progress: Progress) -> Checkpoint:
        """Stage 2: in one go, since it takes seconds."""
        if c.round:
            return c
        data = [(self._encoded(x), y) for x, y in self.clients.train]
        epochs: list[Round] = []

        def epoch(told: Round) -> None:
            epochs.append(told)
            progress(told)

        states, told = train_experts(
            self.expert, self._expert_starts(c), data, self.classes, self.config.seed, self.config.experts, epoch
        )
        c = replace(c, history=[*c.history, *map(_entry, epochs)])
        if self.config.gate.method == "fedgate":  # which needs every expert on every device
            told = replace(told, up=self.count * size(states[0]), down=self.count * (self.count - 1) * size(states[0]))
        return after(c, states, told)

    def _expert_starts(self, c: Checkpoint) -> Sequence[State]:
        if self.config.experts.start == "head":
            return [_part(state, "head.") for state in c.states["extractor"]]
        starts = []
        for i in range(self.count):
            torch.manual_seed(generator(self.config.seed, "expert", i).initial_seed())
            starts.append(build(self.networks.expert).state_dict())
        return starts

    def _train_gate(self, c: Checkpoint, after: Callable[..., Checkpoint], _progress: Progress) -> Checkpoint:
        """Stage 3."""
        config, seed = self.config.gate, self.config.seed
        if "gate" not in c.states:
            c = replace(c, states={**c.states, "gate": [_detached(self.gate)] * self.count})
        rounds = {"rangate": 0, "rollgate": config.laps * self.count, "fedgate": config.rounds}[config.method]
        step = fedgate_round if config.method == "fedgate" else rollgate_stop
        frozen = [self.frozen_outputs(c, part) for part in self.clients.train] if c.round < rounds else []
        data = [gate_samples(s.latents, s.expert_outputs, s.y, config.loss) for s in frozen]
        for round_ in range(c.round, rounds):
            states, told = step(self.gate, c.states["gate"], data, round_, seed, config)
            c = after(c, states, told)
        return c

    def frozen_outputs(self, c: Checkpoint, part: Part) -> FrozenOutputs:
        """The latents and the experts' outputs of a part of the data."""
        h = self._encoded(part[0])
        stacked = {key: torch.stack([state[key] for state in c.states["experts"]]) for key in c.states["experts"][0]}
        every = vmap(lambda state, h: functional_call(self.expert, state, (h,)), in_dims=(0, None), out_dims=1)
        with torch.no_grad():
            return FrozenOutputs(h, torch.cat([every(stacked, rows) for rows in h.split(ENCODE_BATCH)]), part[1])

    def evaluated(self, c: Checkpoint) -> tuple[RunRecord, dict[str, Any]]:
        """Choose what a device does, measure it, describe the run."""
        config, clients = self.config, self.clients
        rules = Inference(config.inference.top_k, config.gate.loss, None, config.inference.adapt)
        if config.inference.local_first:
            held_out = [self.frozen_outputs(c, part) for part in clients.held_out]
            everybody = FrozenOutputs(
                *(torch.cat([getattr(part, name) for part in held_out]) for name in ("latents", "expert_outputs", "y"))
            )
            threshold = choose_threshold(self.rows(c, held_out), self.rows(c, [everybody] * self.count), rules)
            rules = replace(rules, local_first=threshold)
        metrics: dict[str, Any] = {}
        for name, parts in (("own", clients.own_test), ("iid", [clients.test])):
            frozen = [self.frozen_outputs(c, part) for part in parts]
            metrics[name] = evaluate(self.rows(c, frozen * (self.count // len(frozen))), rules)
            if self.networks.head is not None:
                metrics[name]["fedce"] = self._classifier(c, frozen * (self.count // len(frozen)), rules)
        metrics["split"] = clients.split(self.classes)
        metrics["bytes"] = {
            stage: {way: sum(e[way] for e in c.history if e["stage"] == stage) for way in ("up", "down")}
            for stage in STAGES[:-1]
        }
        shielded = [entry["epsilon"] for entry in c.history if "epsilon" in entry]
        if shielded:
            metrics["privacy"] = {
                "epsilon": shielded[-1],
                "delta": config.fedsc.delta,
                "sigma": max(self.shield.sigmas),
                "releases": len(shielded),
            }
        return self._record(c, rules), metrics

    def _classifier(self, c: Checkpoint, frozen: Sequence[FrozenOutputs], rules: Inference) -> dict[str, Any]:
        """Stage 1's classifier, with the head that each device has, and the same class mix."""
        heads = [_part(state, "head.") for state in c.states["extractor"]]
        self.net.head.cpu()
        # A head that stayed with its client carries the client's class mix already.
        rules = replace(rules, adapt=rules.adapt and self.config.extractor.heads == "shared")
        with torch.no_grad():
            p = [
                functional_call(self.net.head, head, (part.latents,)).softmax(1)
                for head, part in zip(heads, frozen, strict=True)
            ]
        return measure([adapted(q, rules) for q in p], [part.y for part in frozen])

    def rows(self, c: Checkpoint, frozen: Sequence[FrozenOutputs]) -> list[DeviceRows]:
        """What each device makes of its part."""
        with torch.no_grad():
            return [
                DeviceRows(functional_call(self.gate, gate, (s.latents,)), s.expert_outputs, s.y)
                for gate, s in zip(c.states["gate"], frozen, strict=True)
            ]

    def heads(self, c: Checkpoint) -> list[State]:
        """Stage 1's heads: one, one a client, or none."""
        if self.networks.head is None:
            return []
        states = c.states["extractor"]
        return [_part(state, "head.") for state in (states if self.config.extractor.heads == "local" else states[:1])]

    def _record(self, c: Checkpoint, rules: Inference) -> RunRecord:
        config = self.config
        samples = sum(len(y) for _, y in self.clients.train)
        return RunRecord(
            schema=1,
            config=to_plain(config),
            seed=config.seed,
            data=DataRecord(self.dataset.name, c.fingerprint, samples, "uint8", self.dataset.shape, "CHW"),
            networks=self.networks,
            latent_dim=config.extractor.dim,
            experts=self.count,
            outputs=self.classes,
            personal_gates=config.gate.method == "fedgate" and config.gate.own != "nothing",
            answers_carry_prior=config.experts.loss == "plain",
            inference=rules,
            labels=self.dataset.labels,
        )

    def _encoded(self, x: Tensor) -> Tensor:
        return encoded(self.net.extractor, x)


class _Clock:
    """Seconds of one stage, on top of what earlier sittings took."""

    def __init__(self, c: Checkpoint, stage: str) -> None:
        self._earlier, self._stage, self._began = c.seconds, stage, time.perf_counter()

    def seconds(self) -> dict[str, float]:
        took = self._earlier.get(self._stage, 0.0) + time.perf_counter() - self._began
        return {**self._earlier, self._stage: took}


def _entry(told: Round) -> dict[str, Any]:
    """A round as the history has it."""
    return {key: value for key, value in asdict(told).items() if value not in (None, ())}


def _detached(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}


def _part(state: State, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _own(gate: Gate) -> dict[str, Tensor]:
    return {key: value for key, value in _detached(gate).items() if key.startswith("own.")}


def encoded(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) in batches, as it is at inference and where the network is; the result is on the CPU."""
    net.eval()
    device = next(iter(net.state_dict().values()), torch.empty(0)).device
    with torch.no_grad():
        return torch.cat([net(part.to(device)).cpu() for part in x.split(ENCODE_BATCH)])


def moved(states: Sequence[State], device: torch.device) -> list[State]:
    """States on another device; what clients share stays shared."""
    once = {
        id(state): {key: value.to(device, memory_format=_layout(value, device)) for key, value in state.items()}
        for state in states
    }
    return [once[id(state)] for state in states]


def _layout(value: Tensor, device: torch.device) -> torch.memory_format:
    """Convolutions on a GPU want their channels last."""
    return torch.channels_last if device.type == "cuda" and value.ndim == 4 else torch.contiguous_format
