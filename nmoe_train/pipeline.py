"""A whole training: data -> extractor -> experts -> gate -> evaluate -> run.

Every round leaves a checkpoint; whatever is random is drawn from (seed, stage, round, client). So a training that was
killed at any moment goes on to the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nmoe_edge.folders import check_replaceable
from nmoe_edge.schema import from_plain, to_plain
from nmoe_train.checkpoint import Checkpoint, difference
from nmoe_train.config import Config
from nmoe_train.data import Dataset, load
from nmoe_train.errors import ConfigError, NetError, RunError
from nmoe_train.evaluate import Rows, Rules, choose_threshold, evaluate, measure
from nmoe_train.experts import train_experts
from nmoe_train.extractor import Classifier, fedce_round
from nmoe_train.federation import State
from nmoe_train.gate import exported, fedgate_round, fresh_gate, random_gate, rollgate_stop, scores
from nmoe_train.nets import NetSpec, build
from nmoe_train.partition import class_counts, largest_size, split
from nmoe_train.run import FILES, RUN_FILE, DataRecord, Inference, Networks, Run, RunRecord, write_run

PAPER_SIZES = {"cifar10": (2500, 1000)}
ENCODE_BATCH = 512

Part = tuple[Tensor, Tensor]
"""Images or latents (n, …), and labels (n,)."""
Progress = Callable[[str, int, int, float], None]
"""(stage, rounds done, rounds in all, loss)"""


@dataclass(frozen=True, slots=True, eq=False)
class Clients:
    """Who has what. No list but `test` holds a sample of another."""

    train: list[Part]
    held_out: list[Part]
    own_test: list[Part]
    """For each client, distributed like its training samples."""
    test: Part
    """Everybody's: the whole test set."""


def deal(dataset: Dataset, config: Config) -> Clients:
    """Split a data set among the clients."""
    data, classes = config.data, len(dataset.labels)
    paper = PAPER_SIZES.get(data.name, (None, None))

    def parts(x: np.ndarray, y: np.ndarray, wanted: int | None, seed: int) -> list[Part]:
        size = wanted or largest_size(y, data.partition, data.clients, classes, config.seed)
        counts = class_counts(data.partition, data.clients, classes, size, config.seed)
        return [(torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in split(y, counts, seed)]

    train = parts(dataset.x_train, dataset.y_train, data.train_size or paper[0], config.seed)
    test = parts(dataset.x_test, dataset.y_test, data.test_size or paper[1], config.seed + 1)
    cut = [max(1, round(len(y) * data.held_out)) for _, y in train]
    if min(len(y) - n for (_, y), n in zip(train, cut, strict=True)) < 1:
        raise ConfigError("a client has too few samples to hold one out and train on another")
    return Clients(
        train=[(x[n:], y[n:]) for (x, y), n in zip(train, cut, strict=True)],
        held_out=[(x[:n], y[:n]) for (x, y), n in zip(train, cut, strict=True)],
        own_test=test,
        test=(torch.from_numpy(dataset.x_test), torch.from_numpy(dataset.y_test)),
    )


def train(config: Config, out: Path, *, resume: bool = False, progress: Progress = lambda *_: None) -> Run:
    """Train, and write the run to `out`; its checkpoint lies beside it until then."""
    out, path = Path(os.path.abspath(out)), checkpoint_path(out)
    checkpoint = _begin(config, out, path, resume)
    torch.set_num_threads(config.threads)
    began = time.perf_counter()
    dataset = load(config.data.name)
    clients = deal(dataset, config)
    checkpoint = _of_this_data(checkpoint, _fingerprint(dataset, clients), path)
    fleet = _Fleet(config, dataset, clients)
    seconds = {}
    for stage in (fleet.train_extractor, fleet.train_experts, fleet.train_gate):
        start = time.perf_counter()
        checkpoint = stage(checkpoint, lambda c: c.write(path), progress)
        seconds[stage.__name__.removeprefix("train_")] = time.perf_counter() - start
    record, metrics = fleet.finish(checkpoint)
    metrics |= {"history": checkpoint.history, "seconds": seconds | {"all": time.perf_counter() - began}}
    run = write_run(
        out,
        record,
        extractor=fleet.net.extractor.state_dict(),
        gates=[exported(gate) for gate in checkpoint.states["gate"]],
        experts=checkpoint.states["experts"],
        calibration={
            "inputs": torch.cat([x for x, _ in clients.held_out]).numpy(),
            "labels": torch.cat([y for _, y in clients.held_out]).numpy(),
            "clients": np.repeat(np.arange(len(clients.held_out)), [len(y) for _, y in clients.held_out]),
        },
        metrics=metrics,
    )
    path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
    return run


def checkpoint_path(out: Path) -> Path:
    """Where the training whose run will be `out` keeps its checkpoint."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial") / "checkpoint.safetensors"


def _check_unfinished(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise RunError(f"{out}: holds a finished run; choose another --out")


def _begin(config: Config, out: Path, path: Path, resume: bool) -> Checkpoint:
    _check_unfinished(out)
    if out in (Path.cwd(), *Path.cwd().parents):
        raise RunError(f"{out}: the current folder would be replaced; choose another place")
    try:
        check_replaceable(out, RUN_FILE, FILES)
    except (OSError, ValueError) as error:
        raise RunError(f"{out}: {error}") from error
    plain = to_plain(config)
    if not resume:
        if path.exists():
            raise RunError(f"{path.parent}: a training stopped there; go on with --resume, or remove it")
        return Checkpoint(plain)
    checkpoint = Checkpoint.read(path)
    differs = difference(checkpoint.config, plain)
    if differs:
        raise RunError(f"{path}: cannot go on with other settings: {differs}")
    return checkpoint


def _of_this_data(checkpoint: Checkpoint, fingerprint: str, path: Path) -> Checkpoint:
    """The checkpoint, once it is known that it comes of the same samples."""
    if checkpoint.fingerprint not in ("", fingerprint):
        raise RunError(f"{path}: cannot go on with other data: what was trained on has changed since")
    return replace(checkpoint, fingerprint=fingerprint)


def _fingerprint(dataset: Dataset, clients: Clients) -> str:
    """sha256 of the samples and of who has which."""
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for x, y in clients.train + clients.held_out:
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()


def stopped_config(out: Path) -> Config:
    """The configuration of the training that stopped at `out`."""
    _check_unfinished(out)
    path = checkpoint_path(out)
    try:
        return from_plain(Config, Checkpoint.read(path).config)
    except ValueError as error:
        raise RunError(f"{path}: of another version: {error}") from error


class _Fleet:
    """The clients and their networks, stage by stage."""

    def __init__(self, config: Config, dataset: Dataset, clients: Clients) -> None:
        self.config, self.dataset, self.clients = config, dataset, clients
        self.classes = len(dataset.labels)
        torch.manual_seed(config.seed)
        self.networks = Networks(self._extractor_net(), config.gate_net(), config.expert_net(self.classes))
        self.net = Classifier(build(self.networks.extractor), build(self.networks.expert))
        latents = _encoded(self.net.extractor, clients.test[0][:1])
        if latents.shape != (1, config.extractor.dim):
            raise NetError(
                f"{config.extractor.backbone} makes latents of {tuple(latents.shape[1:])}, not {config.extractor.dim}"
            )

    def _extractor_net(self) -> NetSpec:
        """Ours get the images' shape and statistics; anybody's own gets what the configuration says."""
        extractor = self.config.extractor
        if ":" in extractor.backbone:
            return NetSpec(extractor.backbone, dict(extractor.arguments))
        channels, size, width = self.dataset.shape
        if size != width:
            raise ConfigError(
                f"images of {size} × {width}: {extractor.backbone} takes square ones; bring a backbone of your own"
            )
        pixels = self.dataset.x_train / 255
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        given = {"channels": channels, "size": size, "dim": extractor.dim}
        given |= {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
        return NetSpec(extractor.backbone, given | dict(extractor.arguments))

    def train_extractor(self, c: Checkpoint, save: Callable[[Checkpoint], None], progress: Progress) -> Checkpoint:
        """Stage 1."""
        config, clients = self.config.extractor, self.clients
        if not c.states:
            first = {key: value.detach() for key, value in self.net.state_dict().items()}
            c = replace(c, states={"extractor": [first] * len(clients.train)})
        for round_ in range(c.round if c.stage == "extractor" else config.rounds, config.rounds):
            states, loss = fedce_round(self.net, c.states["extractor"], clients.train, round_, self.config.seed, config)
            c = _after(c, "extractor", round_, states, loss)
            save(c)
            progress("extractor", round_ + 1, config.rounds, loss)
        self.net.load_state_dict(c.states["extractor"][0])
        self.net.eval()
        return c

    def train_experts(self, c: Checkpoint, save: Callable[[Checkpoint], None], progress: Progress) -> Checkpoint:
        """Stage 2: in one go, since it takes seconds."""
        if "experts" in c.states:
            return c
        data = [(_encoded(self.net.extractor, x), y) for x, y in self.clients.train]
        config = self.config.experts
        states, loss = train_experts(
            self.net.head, self._expert_starts(c), data, self.classes, self.config.seed, config
        )
        c = _after(c, "experts", 0, states, loss)
        save(c)
        progress("experts", 1, 1, loss)
        return c

    def _expert_starts(self, c: Checkpoint) -> list[State]:
        clients = range(len(self.clients.train))
        if self.config.experts.start == "fresh":
            torch.manual_seed(self.config.seed + 1)
            return [build(self.networks.expert).state_dict() for _ in clients]
        heads = [c.states["extractor"][i] for i in clients]
        return [{k.removeprefix("head."): v for k, v in h.items() if k.startswith("head.")} for h in heads]

    def train_gate(self, c: Checkpoint, save: Callable[[Checkpoint], None], progress: Progress) -> Checkpoint:
        """Stage 3."""
        config, seed, n = self.config.gate, self.config.seed, len(self.clients.train)
        if "gate" not in c.states:
            dim = self.config.extractor.dim
            first = random_gate(dim, n, seed) if config.method == "rangate" else fresh_gate(dim, n)
            c = replace(c, stage="gate", round=0, states={**c.states, "gate": [first] * n})
        rounds = {"rangate": 0, "rollgate": config.laps * n, "fedgate": config.rounds}[config.method]
        data = [self._seen(c, x, y) for x, y in self.clients.train] if c.round < rounds else []
        for round_ in range(c.round, rounds):
            step = fedgate_round if config.method == "fedgate" else rollgate_stop
            states, loss = step(c.states["gate"], data, round_, seed, config)
            c = _after(c, "gate", round_, states, loss)
            save(c)
            progress("gate", round_ + 1, rounds, loss)
        return c

    def _seen(self, c: Checkpoint, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (n, d), what every expert says to them (n, N, K), labels."""
        h = _encoded(self.net.extractor, x)
        with torch.no_grad():
            outputs = [torch.func.functional_call(self.net.head, expert, (h,)) for expert in c.states["experts"]]
        return h, torch.stack(outputs, 1), y

    def finish(self, c: Checkpoint) -> tuple[RunRecord, dict[str, Any]]:
        """Choose what a device does, evaluate it, describe the run."""
        config, clients = self.config, self.clients
        everybody = tuple(torch.cat(column) for column in zip(*clients.held_out, strict=True))
        rules = Rules(config.inference.top_k, config.gate.loss, None, config.inference.adapt)
        if config.inference.local_first:
            threshold = choose_threshold(self._rows(c, clients.held_out), self._rows(c, [everybody]), rules)
            rules = replace(rules, local_first=threshold)
        metrics = evaluate(self._rows(c, clients.own_test), self._rows(c, [clients.test]), rules)
        for name, parts in (("own", clients.own_test), ("iid", [clients.test])):
            p = [_encoded(self.net, x).softmax(1) for x, _ in parts]
            metrics[name]["fedavg"] = measure(p, [y for _, y in parts])
        record = RunRecord(
            schema=1,
            config=to_plain(config),
            seed=config.seed,
            data=DataRecord(
                self.dataset.name,
                c.fingerprint,
                sum(len(y) for _, y in clients.train),
                "uint8",
                self.dataset.shape,
                "CHW",
            ),
            networks=self.networks,
            latent_dim=config.extractor.dim,
            experts=len(clients.train),
            outputs=self.classes,
            personal_gates=True,
            answers_carry_prior=config.experts.loss == "plain",
            inference=Inference(rules.top_k, config.gate.loss, rules.local_first, rules.adapt),
            labels=self.dataset.labels,
        )
        return record, metrics

    def _rows(self, c: Checkpoint, parts: Sequence[Part]) -> list[Rows]:
        """What each device sees of its part, or of the one part that is everybody's."""
        seen = [self._seen(c, x, y) for x, y in parts]
        seen = seen * len(self.clients.train) if len(seen) == 1 else seen
        return [Rows(scores(gate, h), o, y) for gate, (h, o, y) in zip(c.states["gate"], seen, strict=True)]


def _after(c: Checkpoint, stage: str, round_: int, states: Sequence[State], loss: float) -> Checkpoint:
    entry = {"stage": stage, "round": round_ + 1, "loss": loss}
    return replace(c, stage=stage, round=round_ + 1, states={**c.states, stage: states}, history=[*c.history, entry])


def _encoded(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) in batches, as it is at inference."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(ENCODE_BATCH)])
