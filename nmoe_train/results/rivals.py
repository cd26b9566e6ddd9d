"""Federated methods that give every client a network of its own, on the same network, split and epochs as the run.

Fine-tuning   each client trains FedAvg's classifier for some more epochs on its own samples
FedRep        the lower layers are averaged, the upper ones stay with their client. In every round a client first trains
              its own layers, then the others (Collins et al. 2021)
Ditto         beside FedAvg's classifier every client trains one of its own, pulled towards the average by
              λ/2 ‖v - w‖² (Li et al. 2021)

Each method has a few candidates for its own setting. All are trained, and the accuracy on the clients' held-out rows
chooses: no test sample does. Among equal ones it is the one closest to the average. Other settings are FedCE's. A step
of a method is a function of states and round, so that baselines.py can stop between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nmoe_train.config import ExtractorConfig
from nmoe_train.data.clients import Part
from nmoe_train.results.evaluation import accuracy
from nmoe_train.stages.extractor import AdjustGradients, Headed, fedce_round, fedce_update
from nmoe_train.stages.federation import Round, State, Update, average, cosine, generator, report, require_finite
from nmoe_train.trainer import encode

States = Mapping[str, Sequence[State]]
"""Name -> one state per client: the candidates of a method, and what else it needs between two rounds."""

FEDREP = {"last 1": ("last", 1), "last 5": ("last", 5), "head 1": ("head", 1)}
"""FedRep: candidates for the layers that stay with their client ("head": all above the extractor; "last": the last one)
and for their epochs in a round."""
PULLS = (3.0, 0.3, 0.03)
"""Ditto: candidates for λ."""
TUNING_RATES = (0.03, 0.3)
"""Fine-tuning: candidates for the learning rate, as shares of the peak rate of FedAvg."""
TUNING_EPOCHS = 10
"""Fine-tuning: the most epochs; every number up to it is a candidate."""


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """The clients of one training, and what they train."""

    net: Headed
    train: Sequence[Part]
    """Each client's training images and labels, on the device that trains"""
    held_out: Sequence[Part]
    """Each client's held-out images and labels, on the CPU"""
    config: ExtractorConfig
    seed: int

    def rate(self, round_: int) -> float:
        """FedCE's learning rate in this round."""
        return self.config.rate * cosine(round_, self.config.rounds, self.config.warm_rounds)

    def update(
        self,
        state: State,
        client: int,
        rate: float,
        config: ExtractorConfig,
        key: Sequence[object],
        adjust_gradients: AdjustGradients = lambda _: None,
    ) -> Update:
        """One client's local epochs of cross-entropy. `key`: what its randomness depends on, beside seed and client"""
        x, y = self.train[client]
        g = generator(self.seed, *key, client)
        return fedce_update(self.net, state, client, x, y, rate, config, g, adjust_gradients)

    def held_out_accuracy(self, states: Sequence[State]) -> float:
        """Mean over clients of the accuracy on the client's own held-out rows."""
        accuracies = []
        for state, (x, y) in zip(states, self.held_out, strict=True):
            self.net.load_state_dict(state)
            accuracies.append(accuracy(encode(self.net, x), y))
        return sum(accuracies) / len(accuracies)

    def held_out_accuracies(self, states: States, candidates: Sequence[object]) -> dict[str, float]:
        """The same for each of these candidates."""
        return {str(name): self.held_out_accuracy(states[str(name)]) for name in candidates}


def local_round(f: Federation, states: States, round_: int) -> tuple[States, Round]:
    """FedCE without the averaging. states: `local`"""
    key = ("extractor", round_)
    updates = [f.update(state, i, f.rate(round_), f.config, key) for i, state in enumerate(states["local"])]
    require_finite("extractor", round_, updates)
    return {"local": [update.state for update in updates]}, report("local", round_, f.config.rounds, updates)


def fedavg_round(f: Federation, states: States, round_: int) -> tuple[States, Round]:
    """FedCE with every client in every round. states: `fedavg`"""
    after, finished = fedce_round(f.net, states["fedavg"], f.train, round_, f.seed, f.config)
    return {"fedavg": after}, replace(finished, stage="fedavg")


def ditto_round(f: Federation, states: States, round_: int) -> tuple[States, Round]:
    """A round of FedAvg and, for each λ, of every client's own classifier. states: `fedavg`, and one name per λ"""
    shared = states["fedavg"]
    averaged, _ = fedavg_round(f, states, round_)
    after = dict(averaged)
    for pull in PULLS:
        updates = []
        for i, state in enumerate(states[str(pull)]):
            towards = _pull_towards(f.net, shared[i], pull)
            updates.append(f.update(state, i, f.rate(round_), f.config, ("ditto", round_), towards))
        require_finite("extractor", round_, updates)
        after[str(pull)] = [update.state for update in updates]
    return after, report("ditto", round_, f.config.rounds, updates)


def _pull_towards(net: nn.Module, anchor: State, strength: float) -> AdjustGradients:
    """Adds the gradient of strength/2 ‖weights - anchor‖²."""
    anchors = [anchor[key] for key, p in net.named_parameters() if p.requires_grad]

    def adjust(trained: Sequence[Tensor]) -> None:
        for weight, anchor in zip(trained, anchors, strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - anchor, alpha=strength)

    return adjust


def fedrep_round(f: Federation, states: States, round_: int) -> tuple[States, Round]:
    """Each client trains its own layers, then the others, which the server averages. states: one name per candidate

    FedCE's rate falls to 0 over the rounds, so a client's layers need no last training on the last average.
    """
    after = {}
    for name, (part, epochs) in FEDREP.items():
        own = "head." if part == "head" else _last_layer(f.net)
        updates = []
        for i, state in enumerate(states[name]):
            with _frozen(f.net, lambda key, own=own: not key.startswith(own)):
                config = replace(f.config, local_epochs=epochs)
                upper = f.update(state, i, f.rate(round_), config, ("fedrep", "own", round_)).state
            with _frozen(f.net, lambda key, own=own: key.startswith(own)):
                updates.append(f.update(upper, i, f.rate(round_), f.config, ("fedrep", "shared", round_)))
        require_finite("extractor", round_, updates)
        shared = {key: value for key, value in average(updates).items() if not key.startswith(own)}
        after[name] = [{**update.state, **shared} for update in updates]
    return after, report("fedrep", round_, f.config.rounds, updates)


def _last_layer(net: nn.Module) -> str:
    """What the names of the last layer's parameters begin with."""
    *_, last = [key for key, _ in net.named_parameters()]
    return last.rpartition(".")[0] + "."


@contextmanager
def _frozen(net: nn.Module, is_frozen: Callable[[str], bool]) -> Iterator[None]:
    """Freeze the parameters with these names, and restore afterwards what could be trained before."""
    frozen = [p for key, p in net.named_parameters() if p.requires_grad and is_frozen(key)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def tuning_start(fedavg: Sequence[State]) -> dict[str, Sequence[State]]:
    """The states before the first epoch of fine-tuning."""
    return {"fedavg": fedavg, "best": fedavg, **{str(share): fedavg for share in TUNING_RATES}}


def tuning_epoch(
    f: Federation, states: States, epoch: int, history: Sequence[Mapping[str, float]]
) -> tuple[States, Round, dict[str, float]]:
    """One more epoch for every rate; `best` keeps the best classifiers of any epoch.

    history: the entries of earlier epochs

    Returns the states, the record of the epoch and its entry for `history`: its best rate, with held-out accuracy.
    """
    after = dict(states)
    config = replace(f.config, local_epochs=1)
    accuracies = {}
    for share in TUNING_RATES:
        rate = share * f.config.rate
        updates = [f.update(state, i, rate, config, ("tuning", epoch)) for i, state in enumerate(states[str(share)])]
        require_finite("extractor", epoch, updates)
        after[str(share)] = [update.state for update in updates]
        accuracies[share] = f.held_out_accuracy(after[str(share)])
    best = max(TUNING_RATES, key=lambda share: accuracies[share])
    if accuracies[best] > max((entry["accuracy"] for entry in history), default=-1.0):
        after["best"] = after[str(best)]
    entry = {"rate": best * f.config.rate, "epochs": epoch + 1, "accuracy": accuracies[best]}
    return after, report("tuning", epoch, TUNING_EPOCHS, updates), entry
