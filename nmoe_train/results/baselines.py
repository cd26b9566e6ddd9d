"""What a run is compared with: baselines on the same data, split and network.

All of them train with as many epochs as FedCE, with plain cross-entropy, and without dropped clients. Each classifier
is the extractor with the layers of an expert on top.

local         every client trains a whole classifier on its own samples; nothing is averaged
fedavg        one classifier for all clients; taken from the run when its stage 1 trained it
fedavg_prior  the same classifier; its answers are multiplied by a class mix (see _answers_with_prior)
fedavg_tuned  the same classifier, trained further by every client on its own samples
fedrep        lower layers are averaged, every client keeps its upper ones
ditto         every client has a classifier of its own that is pulled towards the average
lda           a linear classifier on the run's frozen extractor, from statistics that clients send once
lda_prior     the same classifier, with a class mix like fedavg_prior
centralised   all samples in one place: an extractor, experts and a gate of the same shapes, trained as a plain mixture

rivals.py has the methods that personalise, with their papers; held-out rows choose their settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe_edge.common.schema import parse_json
from nmoe_train.checkpoint import Checkpoint, claim_folder
from nmoe_train.config import ExtractorConfig
from nmoe_train.data.clients import Part
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.nets import NetSpec, build
from nmoe_train.pipeline import torch_settings, trainer_of
from nmoe_train.recipes import configure
from nmoe_train.results import lda
from nmoe_train.results.centralised import measure_mixture, train_mixture
from nmoe_train.results.evaluation import apply_class_mix, measure
from nmoe_train.results.pages.run_page import page
from nmoe_train.results.rivals import (
    FEDREP,
    PULLS,
    TUNING_EPOCHS,
    Federation,
    States,
    ditto_round,
    fedavg_round,
    fedrep_round,
    local_round,
    tuning_epoch,
    tuning_start,
)
from nmoe_train.run import Run, write_unlisted
from nmoe_train.stages.extractor import Headed
from nmoe_train.stages.federation import Round, State
from nmoe_train.stages.losses import class_prior
from nmoe_train.stages.weights import copy_state, select_part, to_device
from nmoe_train.trainer import Progress, Trainer, encode

METHODS = ("local", "fedavg", "centralised")
"""The paper's own baselines."""
RIVALS = ("fedavg_prior", "fedavg_tuned", "fedrep", "ditto", "lda", "lda_prior")
"""Baselines that the paper does not have."""
FILE = "baselines.json"

Step = Callable[[Federation, States, int], tuple[States, Round]]
Figures = dict[str, Any]
"""Figures of one method: `own`, `iid` and `iid_rows` as in metrics.json; `chosen`: the settings that held-out rows
chose, and the accuracy of every candidate on them"""


def baselines(
    run: Run, progress: Progress = lambda _: None, methods: Sequence[str] = (*METHODS, *RIVALS)
) -> dict[str, Figures]:
    """Train and measure the baselines that the run's baselines.json does not hold yet, and return all that it holds.

    After each training, baselines.json and report.html are updated. A training that is interrupted continues with the
    next call. The result maps a method to its figures on `own` and `iid`, as in metrics.json.

    methods: some of METHODS and RIVALS. Others that need no further training are measured too

    Raises TrainError.
    """
    unknown = [name for name in methods if name not in (*METHODS, *RIVALS)]
    if unknown:
        raise ConfigError(f"unknown baseline {unknown[0]!r}; expected one of {', '.join((*METHODS, *RIVALS))}")
    out = run.folder.with_name(f"{run.folder.name}-baselines")
    with claim_folder(out) as path, torch_settings(run.record.config.get("threads", 1)):
        trainer, checkpoint = trainer_of(run)
        contest = _Contest(trainer, run, checkpoint.states["extractor"], path, progress, frozenset(methods))
        found = read_baselines(run)
        for names, train_and_measure in TRAININGS.items():
            if any(name in methods and name not in found for name in names):
                found |= train_and_measure(contest)
                write_unlisted(run, FILE, json.dumps(found, indent=2, allow_nan=False) + "\n")
                path.unlink(missing_ok=True)
        text = page(run.folder.name, run.record.config, run.metrics, run.record.labels or (), by_part(found))
        write_unlisted(run, "report.html", text)
        return found


def read_baselines(run: Run) -> dict[str, Figures]:
    """What baselines.json holds so far, by method; empty when there is no such file."""
    path = run.folder / FILE
    try:
        plain = parse_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; remove it to measure again") from error
    if not isinstance(plain, dict):
        raise RunError(f"{path}: not a JSON object; remove it to measure again")
    return plain


def by_part(found: Mapping[str, Figures]) -> dict[str, Figures]:
    """The same figures, by test set first and then by method, as in metrics.json."""
    return {part: {name: figures[part] for name, figures in found.items()} for part in ("own", "iid")}


@dataclass(frozen=True, slots=True, eq=False)
class _Contest:
    """What every baseline of a run needs."""

    trainer: Trainer
    run: Run
    extractors: Sequence[State]
    """The run's extractor, with its head if it has one; one state per client"""
    path: Path
    """The checkpoint of the training in progress"""
    progress: Progress
    methods: frozenset[str]
    """The wanted methods"""

    @property
    def head(self) -> NetSpec:
        """The head of every classifier: the layers of an expert."""
        return self.trainer.config.expert_net(self.trainer.classes)

    def federation(self) -> Federation:
        """The clients with a fresh classifier, which is the same for every baseline."""
        trainer = self.trainer
        torch.manual_seed(trainer.config.seed)
        net = Headed(build(trainer.specs.extractor), build(self.head)).to(trainer.device)
        data = [(x.to(trainer.device), y.to(trainer.device)) for x, y in trainer.clients.train]
        return Federation(net, data, trainer.clients.held_out, _settings(trainer), trainer.config.seed)

    def begin_or_resume(self, stage: str) -> Checkpoint:
        """The checkpoint when it belongs to this run and stage, else an empty one."""
        empty = Checkpoint(dict(self.run.record.config), stage, fingerprint=self.run.record.data.fingerprint)
        if not self.path.exists():
            return empty
        stored = Checkpoint.read(self.path)
        belongs = (stored.config, stored.stage, stored.fingerprint) == (empty.config, stage, empty.fingerprint)
        return stored if belongs else empty

    def train(self, f: Federation, stage: str, step: Step, names: Sequence[object]) -> States:
        """The states after all rounds of `step`, which starts from a fresh classifier for every name and client."""
        checkpoint = self.begin_or_resume(stage)
        fresh = [copy_state(f.net)] * len(f.train)
        states = self.on_device(checkpoint.states or {str(name): fresh for name in names})
        for round_ in range(checkpoint.round, f.config.rounds):
            states, finished = step(f, states, round_)
            self.save(replace(checkpoint, round=round_ + 1, states=states))
            self.progress(replace(finished, stage=stage))
        return states

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, with its states on the CPU."""
        cpu = torch.device("cpu")
        states = {name: to_device(each, cpu) for name, each in checkpoint.states.items()}
        replace(checkpoint, states=states).write(self.path)

    def on_device(self, states: States) -> States:
        """The same states where the training runs."""
        return {name: to_device(each, self.trainer.device) for name, each in states.items()}

    def test_sets(self) -> dict[str, list[Part]]:
        """Each device's test set, by the names of Clients.tests."""
        tests = self.trainer.clients.tests()
        return {name: parts * (self.trainer.count // len(parts)) for name, parts in tests.items()}


def _settings(trainer: Trainer) -> ExtractorConfig:
    """FedCE's settings with every client in every round: the run's own, or the defaults for its data."""
    config = trainer.config.extractor
    if config.method != "fedce":
        usual = configure(flags={"data": {"name": trainer.config.data.name}}).extractor
        config = replace(usual, backbone=config.backbone, arguments=config.arguments, dim=config.dim)
    return replace(config, heads="shared", loss="plain", correction="none", share=1.0, drop=0.0, step_limit=None)


def _local(contest: _Contest) -> dict[str, Figures]:
    f = contest.federation()
    states = contest.train(f, "local", local_round, ["local"])
    return {"local": _figures(contest, _answers(contest, f, states["local"]))}


def _fedavg(contest: _Contest) -> dict[str, Figures]:
    """FedAvg's classifier: as it is, with a class mix, and after fine-tuning."""
    f = contest.federation()
    tuning = contest.begin_or_resume("tuning")
    states = tuning.states.get("fedavg") or _fedavg_states(contest, f)
    shared = to_device(states, contest.trainer.device)
    p = _answers(contest, f, shared)
    found = {
        "fedavg": _figures(contest, p),
        "fedavg_prior": _figures(contest, _answers_with_prior(contest, p, _pooled_mix(contest))),
    }
    if "fedavg_tuned" not in contest.methods:
        return found
    tuned, chosen = _fine_tune(contest, f, shared, tuning)
    return found | {"fedavg_tuned": _figures(contest, _answers(contest, f, tuned), chosen)}


def _fedavg_states(contest: _Contest, f: Federation) -> Sequence[State]:
    extractor = contest.trainer.config.extractor
    is_fedavg = (extractor.heads, extractor.loss, extractor.correction) == ("shared", "plain", "none")
    if contest.trainer.specs.head == contest.head and is_fedavg:
        return contest.extractors
    return contest.train(f, "fedavg", fedavg_round, ["fedavg"])["fedavg"]


def _fine_tune(
    contest: _Contest, f: Federation, shared: Sequence[State], checkpoint: Checkpoint
) -> tuple[Sequence[State], Mapping[str, Any]]:
    """The best classifiers of any rate and number of epochs, and that rate and number."""
    states: States = contest.on_device(checkpoint.states or tuning_start(shared))
    history = list(checkpoint.history)
    for epoch in range(checkpoint.round, TUNING_EPOCHS):
        states, finished, entry = tuning_epoch(f, states, epoch, history)
        history.append(entry)
        contest.save(replace(checkpoint, round=epoch + 1, states=states, history=history))
        contest.progress(finished)
    chosen = max(history, key=lambda entry: entry["accuracy"])  # the first of equals, which has the fewest epochs
    tried = {str(entry["epochs"]): entry["accuracy"] for entry in history}
    return states["best"], {"rate": chosen["rate"], "epochs": chosen["epochs"], "held_out": tried}


def _fedrep(contest: _Contest) -> dict[str, Figures]:
    f = contest.federation()
    states = contest.train(f, "fedrep", fedrep_round, tuple(FEDREP))
    tried = f.held_out_accuracies(states, tuple(FEDREP))
    best = max(tried, key=lambda name: tried[name])  # the first of equals
    layers, epochs = FEDREP[best]
    chosen = {"own_layers": layers, "epochs": epochs, "held_out": tried}
    return {"fedrep": _figures(contest, _answers(contest, f, states[best]), chosen)}


def _ditto(contest: _Contest) -> dict[str, Figures]:
    f = contest.federation()
    states = contest.train(f, "ditto", ditto_round, ["fedavg", *PULLS])
    tried = f.held_out_accuracies(states, PULLS)
    best = max(tried, key=lambda name: tried[name])  # the first of equals
    chosen = {"lambda": float(best), "held_out": tried}
    return {"ditto": _figures(contest, _answers(contest, f, states[best]), chosen)}


def _lda(contest: _Contest) -> dict[str, Figures]:
    f = contest.federation()
    f.net.extractor.load_state_dict(select_part(contest.extractors[0], "extractor."))
    classes = contest.trainer.classes
    each = [lda.statistics(encode(f.net.extractor, x), y, classes) for x, y in contest.trainer.clients.train]
    held_out = [(encode(f.net.extractor, x), y) for x, y in f.held_out]
    classifier, shrinkage = lda.best_fit(sum(each[1:], start=each[0]), held_out)
    p = {}
    for part, parts in contest.test_sets().items():
        p[part] = [classifier.scores(encode(f.net.extractor, x)).softmax(1) for x, _ in parts]
    uniform = torch.full((classes,), 1 / classes)
    chosen = {"shrinkage": shrinkage}
    return {
        "lda": _figures(contest, p, chosen),
        "lda_prior": _figures(contest, _answers_with_prior(contest, p, uniform), chosen),
    }


def _centralised(contest: _Contest) -> dict[str, Figures]:
    trainer = contest.trainer
    f = contest.federation()
    pooled = (torch.cat([x for x, _ in f.train]), torch.cat([y for _, y in f.train]))
    states = contest.train(replace(f, train=[pooled]), "centralised", _centralised_round, ["centralised"])
    f.net.load_state_dict(states["centralised"][0])
    mixture = train_mixture(trainer, encode(f.net.extractor, pooled[0]), pooled[1].cpu(), contest.progress)
    return {"centralised": measure_mixture(trainer, f.net.extractor, mixture)}


def _centralised_round(f: Federation, states: States, round_: int) -> tuple[States, Round]:
    after, finished = fedavg_round(f, {"fedavg": states["centralised"]}, round_)
    return {"centralised": after["fedavg"]}, finished


TRAININGS: dict[tuple[str, ...], Callable[[_Contest], dict[str, Figures]]] = {
    ("local",): _local,
    ("fedavg", "fedavg_prior", "fedavg_tuned"): _fedavg,
    ("fedrep",): _fedrep,
    ("ditto",): _ditto,
    ("lda", "lda_prior"): _lda,
    ("centralised",): _centralised,
}
"""The methods that one training yields, and the function that trains and measures them."""

Answers = Mapping[str, Sequence[Tensor]]
"""Test set -> every device's class probabilities (n, K)."""


def _answers(contest: _Contest, f: Federation, states: Sequence[State]) -> Answers:
    """The answers of every client's classifier, without any class mix."""
    p: dict[str, list[Tensor]] = {}
    for name, parts in contest.test_sets().items():
        p[name] = []
        for state, (x, _) in zip(states, parts, strict=True):
            f.net.load_state_dict(state)
            p[name].append(encode(f.net, x).softmax(1))
    return p


def _answers_with_prior(contest: _Contest, p: Answers, carried: Tensor) -> Answers:
    """The same answers with a class mix in place of the one that they carry (K,).

    On a device's own distribution it is the mix of the client's training labels. The balanced rows come from another
    distribution, so there it is the mix that a device estimates from its unlabelled rows, as our devices do. The method
    is told which of the two it needs, which our devices are not.
    """
    classes = contest.trainer.classes
    rules = replace(contest.run.record.inference, adapt=True)
    own = []
    for answers, (_, y) in zip(p["own"], contest.trainer.clients.train, strict=True):
        weighted = answers / carried * class_prior(y, classes)
        own.append(weighted / weighted.sum(1, keepdim=True))
    found = {"own": own}
    for name in p.keys() - {"own"}:
        neutral = [answers / carried for answers in p[name]]
        found[name] = [apply_class_mix(q / q.sum(1, keepdim=True), rules) for q in neutral]
    return found


def _pooled_mix(contest: _Contest) -> Tensor:
    """The class mix of all training samples, which FedAvg's answers carry. -> (K,)"""
    return class_prior(torch.cat([y for _, y in contest.trainer.clients.train]), contest.trainer.classes)


def _figures(contest: _Contest, p: Answers, chosen: Mapping[str, Any] | None = None) -> Figures:
    figures: Figures = {}
    for name, parts in contest.test_sets().items():
        figures[name] = measure(p[name], [y for _, y in parts])
    return figures | ({"chosen": dict(chosen)} if chosen else {})
