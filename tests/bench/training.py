"""Times training: stages 2 and 3, and the overhead of a FedCE round. Part of `make bench`.

Stages 2 and 3 train on latents of a ResNet18's size, with ten and with a hundred clients that share the same amount of
data. The FedCE round takes no optimiser step: it samples clients, averages and writes the checkpoint.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.func import functional_call, vmap

from nmoe_train.checkpoint import Checkpoint
from nmoe_train.config import ExpertsConfig, ExtractorConfig, GateConfig
from nmoe_train.nets import NetSpec, build
from nmoe_train.stages.experts import train_experts
from nmoe_train.stages.extractor import Headed, fedce_round
from nmoe_train.stages.gate import Gate, fedgate_round, gate_samples

SAMPLES = 25_000
DIM = 512
CLASSES = 10
ROUNDS = 30


def stages_2_and_3(clients):
    """Seconds for experts, their answers and the gate: 25,000 latents of 512 numbers, split among `clients`."""
    g = torch.Generator().manual_seed(0)
    n = SAMPLES // clients
    centres = torch.randn(CLASSES, DIM, generator=g)
    labels = [torch.randint(0, CLASSES, (n,), generator=g) for _ in range(clients)]
    data = [(centres[y] + 3 * torch.randn(n, DIM, generator=g), y) for y in labels]
    expert = build(NetSpec("mlp", {"dim": DIM, "outputs": CLASSES, "widths": [256, 128, 64]}))
    began = time.perf_counter()
    # Batches of 50, as for CIFAR-10.
    states, _ = train_experts(
        expert, [expert.state_dict()] * clients, data, CLASSES, 0, ExpertsConfig(epochs=10, batch=50)
    )
    experts_s = time.perf_counter() - began
    began = time.perf_counter()
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    every = vmap(lambda state, h: functional_call(expert, state, (h,)), in_dims=(0, None), out_dims=1)
    with torch.no_grad():
        said = [torch.cat([every(stacked, rows) for rows in h.split(512)]) for h, _ in data]
    samples = [gate_samples(h, outputs, y, "probabilities") for (h, y), outputs in zip(data, said, strict=True)]
    outputs_s = time.perf_counter() - began
    began = time.perf_counter()
    net, config = Gate(torch.nn.Linear(DIM, clients), DIM, clients, "bias"), GateConfig()
    gates = [{key: value.detach() for key, value in net.state_dict().items()}] * clients
    for round_ in range(config.rounds):
        gates, _ = fedgate_round(net, gates, samples, round_, 0, config)
    return experts_s, outputs_s, time.perf_counter() - began


def orchestration():
    """Median milliseconds of a FedCE round of the small network with ten clients and no step, checkpoint included."""
    net = Headed(
        build(NetSpec("small", {"channels": 1, "size": 8})), build(NetSpec("mlp", {"dim": 64, "outputs": CLASSES}))
    )
    state = {key: value.detach() for key, value in net.state_dict().items()}
    data = [(torch.zeros(105, 1, 8, 8, dtype=torch.uint8), torch.zeros(105, dtype=torch.long))] * 10
    config = ExtractorConfig(local_epochs=0, rounds=ROUNDS)
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(ROUNDS):
            began = time.perf_counter()
            states, _ = fedce_round(net, [state] * 10, data, round_, 0, config)
            Checkpoint({}, "extractor", round_, {"extractor": states}).write(Path(folder) / "checkpoint.safetensors")
            took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def main():
    """Measure and print the table."""
    torch.set_num_threads(2)
    print(f"training with two threads, torch {torch.__version__}")
    print(f"{'clients':>8} {'experts s':>10} {'answers s':>10} {'gate s':>8} {'all s':>8}")
    for clients in (10, 100):
        took = stages_2_and_3(clients)
        print(f"{clients:>8} {took[0]:>10.1f} {took[1]:>10.1f} {took[2]:>8.1f} {sum(took):>8.1f}")
    print(f"a FedCE round of ten clients, without forward pass, backward pass and step: {orchestration():.1f} ms")


if __name__ == "__main__":
    main()
