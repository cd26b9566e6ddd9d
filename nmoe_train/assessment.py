"""What a training is worth: chooses how devices answer, on held-out rows, and measures the fleet on test rows.

The trainer has the networks and the data; results/rules.py chooses and results/evaluation.py measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from nmoe_edge.common.schema import to_plain
from nmoe_edge.protocol.familiar import Familiar
from nmoe_train.checkpoint import Checkpoint
from nmoe_train.record import SCHEMA, DataRecord, Inference, RunRecord
from nmoe_train.results.evaluation import DeviceRows, evaluate, measure, measure_both
from nmoe_train.results.rules import Chosen, HeldOut, choose_rules
from nmoe_train.stages.calibration import bytes_of_step
from nmoe_train.stages.familiarity import familiar_latents
from nmoe_train.stages.federation import size_bytes
from nmoe_train.stages.weights import select_part
from nmoe_train.trainer import STAGES, FrozenOutputs, Trainer, encode


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """What a finished training adds to its weights."""

    record: RunRecord
    """run.json without its files"""
    metrics: dict[str, Any]
    """metrics.json without `history` and `seconds`"""
    chosen: Chosen
    familiar: list[Familiar]
    """Of each client"""


def assess(trainer: Trainer, c: Checkpoint) -> Assessment:
    """Choose the rules, measure the fleet under them, and describe the run. `c` has finished every stage."""
    familiar = [
        familiar_latents(encode(trainer.classifier.extractor, x).numpy(), y.numpy()) for x, y in trainer.clients.train
    ]
    prior = trainer.config.experts.loss == "plain"
    chosen = _choose(trainer, c, familiar, prior)
    prior = prior and chosen.calibration.changes_nothing
    metrics: dict[str, Any] = {}
    for name, parts in trainer.clients.tests().items():
        frozen = [trainer.frozen_outputs(c, part) for part in parts]
        frozen *= trainer.count // len(frozen)  # the balanced test set is the same for every device
        rows = _device_rows(trainer, c, frozen, familiar, chosen)
        metrics[name] = evaluate(rows, chosen.inference, prior, _seen(trainer))
        if trainer.specs.head is not None:
            metrics[name]["fedce"] = _measure_classifier(trainer, c, frozen, chosen)
    metrics["calibration"] = _calibration_facts(trainer, chosen)
    whole_test = torch.bincount(trainer.clients.test[1], minlength=trainer.classes).tolist()
    metrics["split"] = {**trainer.clients.class_counts(trainer.classes), "whole_test": [whole_test]}
    metrics["bytes"] = {stage: _bytes_sent(c, stage) for stage in STAGES[:-1]}
    if chosen.steps:
        metrics["bytes"]["calibration"] = _bytes_of_calibration(trainer, c, chosen.steps)
    epsilons = [entry["epsilon"] for entry in c.history if "epsilon" in entry and entry["stage"] == "extractor"]
    if epsilons:
        metrics["privacy"] = {
            "epsilon": epsilons[-1],
            "delta": trainer.config.fedsc.delta,
            "sigma": max(trainer.matrix_noise.sigmas),
            "releases": len(epsilons),
        }
    return Assessment(_record(trainer, c, chosen.inference, prior), metrics, chosen, familiar)


def _choose(trainer: Trainer, c: Checkpoint, familiar: Sequence[Familiar], prior: bool) -> Chosen:
    """The rules of the configuration, with what held-out rows decide."""
    config = trainer.config
    rules = Inference(config.inference.top_k, config.gate.combination)
    parts = [trainer.frozen_outputs(c, part) for part in trainer.clients.held_out]
    latents = torch.cat([part.latents for part in parts])
    has_shared_head = trainer.specs.head is not None and config.extractor.heads == "shared"
    held = HeldOut(
        y=torch.cat([part.y for part in parts]).numpy(),
        clients=np.repeat(np.arange(len(parts)), [len(part.y) for part in parts]),
        scores=np.stack([_scores(trainer, c, device, latents).numpy() for device in range(trainer.count)]),
        outputs=torch.cat([part.expert_outputs for part in parts]).numpy(),
        distances=np.stack([one.distances(latents.numpy()) for one in familiar]),
        seen=_seen(trainer).numpy(),
        head=_head_outputs(trainer, c, 0, latents).numpy() if has_shared_head else None,
    )
    return choose_rules(held, rules, config.inference, prior, config.seed)


def _device_rows(
    trainer: Trainer,
    c: Checkpoint,
    frozen: Sequence[FrozenOutputs],
    familiar: Sequence[Familiar],
    chosen: Chosen,
) -> list[DeviceRows]:
    """Each device's part of the data, with the scores of its gate and calibrated answers."""
    found = []
    for device, part in enumerate(frozen):
        outputs = torch.from_numpy(chosen.calibration.apply(part.expert_outputs.numpy()))
        distances = torch.from_numpy(familiar[device].distances(part.latents.numpy()))
        found.append(DeviceRows(_scores(trainer, c, device, part.latents), outputs, part.y, distances))
    return found


def _scores(trainer: Trainer, c: Checkpoint, device: int, latents: Tensor) -> Tensor:
    """A device's gate: (n, d) -> (n, N)"""
    with torch.no_grad():
        scores: Tensor = functional_call(trainer.gate, c.states["gate"][device], (latents,))
    return scores


def _head_outputs(trainer: Trainer, c: Checkpoint, device: int, latents: Tensor) -> Tensor:
    """Stage 1's head of a device: (n, d) -> (n, K)"""
    head = trainer.classifier.head.cpu()
    with torch.no_grad():
        outputs: Tensor = functional_call(head, select_part(c.states["extractor"][device], "head."), (latents,))
    return outputs


def _measure_classifier(
    trainer: Trainer, c: Checkpoint, frozen: Sequence[FrozenOutputs], chosen: Chosen
) -> dict[str, Any]:
    """Figures of stage 1's classifier with each device's head, calibrated and given the class mix as the fleet is."""
    truth = [part.y for part in frozen]
    outputs = [_head_outputs(trainer, c, device, part.latents) for device, part in enumerate(frozen)]
    if chosen.head is None:  # heads that stayed with their clients already carry their client's class mix
        return measure([z.softmax(1) for z in outputs], truth)
    calibrated = [torch.from_numpy(chosen.head.apply(z[:, None].numpy())[:, 0]) for z in outputs]
    return measure_both([z.softmax(1) for z in calibrated], truth, chosen.inference.adapt)


def _seen(trainer: Trainer) -> Tensor:
    """(N, K): whether a client has training samples of a class"""
    counts = [torch.bincount(y, minlength=trainer.classes) for _, y in trainer.clients.train]
    return torch.stack(counts) > 0


def _calibration_facts(trainer: Trainer, chosen: Chosen) -> dict[str, Any]:
    """What the page and readers of metrics.json need to know about the calibration."""
    counts = sum(torch.bincount(y, minlength=trainer.classes) for _, y in trainer.clients.held_out)
    missing = [k for k in range(trainer.classes) if not counts[k]]
    facts: dict[str, Any] = {
        "used": not chosen.calibration.changes_nothing,
        "rows": int(counts.sum()),
        "classes_without_rows": missing,
    }
    return facts | ({"note": chosen.note} if chosen.note else {})


def _record(trainer: Trainer, c: Checkpoint, rules: Inference, prior: bool) -> RunRecord:
    config = trainer.config
    samples = sum(len(y) for _, y in trainer.clients.train)
    dataset = trainer.dataset
    return RunRecord(
        schema=SCHEMA,
        config=to_plain(config),
        seed=config.seed,
        data=DataRecord(dataset.name, c.fingerprint, samples, "uint8", dataset.shape, "CHW"),
        networks=trainer.specs,
        latent_dim=config.extractor.dim,
        experts=trainer.count,
        outputs=trainer.classes,
        personal_gates=config.gate.method == "fedgate" and config.gate.own != "nothing",
        answers_carry_prior=prior,
        inference=rules,
        labels=dataset.labels,
    )


def _bytes_of_calibration(trainer: Trainer, c: Checkpoint, steps: int) -> dict[str, int]:
    """Sums of held-out rows, and first the experts, unless FedGate has sent them to every client already."""
    up, down = bytes_of_step(trainer.count, trainer.classes)
    sent = 0 if trainer.config.gate.method == "fedgate" else trainer.count * size_bytes(c.states["experts"][0])
    return {"up": steps * up + sent, "down": steps * down + sent * (trainer.count - 1)}


def _bytes_sent(c: Checkpoint, stage: str) -> dict[str, int]:
    """Bytes that all clients sent (`up`) and received (`down`) in a stage."""
    entries = [entry for entry in c.history if entry["stage"] == stage]
    return {"up": sum(entry["up"] for entry in entries), "down": sum(entry["down"] for entry in entries)}
