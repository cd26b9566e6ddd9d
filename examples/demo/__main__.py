"""Train a fleet, run it on this machine, kill a fifth of it, and draw a page of the measurements. See `make demo`.

    python examples/demo

Ten clients learn handwritten digits. Each becomes a device: a process of its own with an encrypted connection to its
peers. Clients send their test rows while the demo kills two devices with SIGKILL and starts them again. Every step is
printed as the command that you would type. The page is runs/demo-fleet/report.html.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from figures import busiest, comparison, own_expert_accuracy, story
from page import page
from processes import (
    DemoError,
    Processes,
    Tests,
    Traffic,
    ask_everything,
    clients,
    on_free_ports,
    wait_until_seen,
)

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.client import Client
from nmoe_edge.common.command import SETTINGS, run_program
from nmoe_edge.common.text import counted
from nmoe_edge.errors import EdgeError
from nmoe_train.errors import TrainError

OURS = r"run(-baselines)?(\.partial)?|\.(run|fleet)\..*\.staged|fleet(-keys)?|logs|state|report.html|measurements.json"
"""The names that a demo leaves in its folder, as a regular expression."""

BASELINES = ("local", "fedavg_tuned", "lda_prior", "centralised")
"""The quick ones, and those that come with them."""

Settings = dict[str, Any]
Steps = dict[str, float]
"""Command -> seconds."""


@click.command(context_settings=SETTINGS, epilog="Example: python examples/demo --recipe paper --seconds 30")
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/demo-fleet", show_default=True, help="Folder for results."
)
@click.option(
    "--devices",
    type=click.IntRange(2, 50),
    default=10,
    show_default=True,
    help="Number of devices. With fewer than 5, add --set data.held_out=0.3.",
)
@click.option(
    "--seconds", type=click.FloatRange(1, 3600), default=15.0, show_default=True, help="Shortest time of traffic."
)
@click.option(
    "--rate", type=click.FloatRange(1, 1000), default=30.0, show_default=True, help="Requests/s to each device."
)
@click.option("--recipe", default="apart", show_default=True, help="Recipe of the training: apart, best or paper.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of the training; see nmoe-train settings."
)
def cli(out: Path, devices: int, seconds: float, rate: float, recipe: str, settings: tuple[str, ...]) -> None:
    """Train, export and run a fleet on this machine, kill a fifth of it, and draw a page of the measurements."""
    empty(out)
    chosen: Settings = {
        "devices": devices,
        "seconds": seconds,
        "rate": rate,
        "recipe": recipe,
        "set": list(settings),
    }
    measured = run_demo(out, chosen)
    (out / "measurements.json").write_text(json.dumps(measured, indent=1, allow_nan=False) + "\n")
    (out / "report.html").write_text(page(measured), encoding="utf-8")
    for line in summary(measured):
        click.echo(line)
    click.echo(f"look at {out / 'report.html'}")
    if measured["failed"]:
        raise DemoError("; ".join(measured["failed"]))


def run_demo(out: Path, settings: Settings) -> dict[str, Any]:
    """Every step in order. The content of measurements.json."""
    steps: Steps = {}
    with Processes(out / "logs") as processes:
        prepare(processes, steps, out, settings)
        names, tests = start_devices(processes, steps, out)
        with clients(out / "fleet") as fleet:
            with step(steps, "ask every device all its test rows, through nmoe_edge.client.Client"):
                for name in names:
                    wait_until_seen({n: client for n, client in fleet.items() if n != name}, name, alive=True)
                answered = ask_everything(list(fleet.values()), tests)
            victims = [names[device] for device in busiest(answered, max(1, settings["devices"] // 5))]
            seconds = settings["seconds"]
            with step(steps, f"{seconds:g} s of traffic; kill -9 {' '.join(victims)}; start them again"):
                traffic = Traffic(list(fleet.values()), tests, settings["rate"])
                moments = kill_and_restart(processes, out, fleet, traffic, victims, seconds)
        memory = processes.memory_mib()
        failed = [f"{name} died, but the demo did not kill it" for name in processes.died()]
        failed += [f"{name} did not end cleanly after SIGTERM" for name in processes.stop()]
    unanswered = sum(row.way == "unanswered" for row in traffic.rows + answered)
    if unanswered:
        failed.append(f"{counted(unanswered, 'request')} without an answer")
    return {
        "settings": settings,
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()},
        "steps": steps,
        **comparison(out / "run", answered, own_expert_accuracy(out / "fleet", names, tests)),
        "export": json.loads((out / "fleet" / "report.json").read_bytes()),
        "memory_mib": memory,
        **story(traffic.rows, moments, names),
        "failed": failed,
    }


def empty(out: Path) -> None:
    """Make `out` an empty folder. Removes the results of an earlier demo; refuses a folder with any other file."""
    try:
        found = list(out.iterdir()) if out.exists() else []
        for path in found:
            if not re.fullmatch(OURS, path.name):
                raise DemoError(f"{out} holds {path.name}, which is not from a demo; choose another folder with --out")
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (out / "logs").mkdir(parents=True)
    except OSError as error:
        raise DemoError(f"{out}: {error.strerror}; choose another folder with --out") from error


@contextmanager
def step(steps: Steps, command: str) -> Iterator[None]:
    """Print what is done, and measure how long it takes."""
    prompt = "$" if command.startswith("nmoe") else "#"
    click.echo(click.style(f"\n{prompt} {command}", bold=True))
    began = time.monotonic()
    yield
    steps[command] = time.monotonic() - began


def prepare(processes: Processes, steps: Steps, out: Path, settings: Settings) -> None:
    """Train, train the baselines, export and make keys, each with its command."""
    run = str(out / "run")
    fleet = str(out / "fleet")
    options = ["--recipe", settings["recipe"], "--clients", str(settings["devices"])]
    options += [f"--set={setting}" for setting in settings["set"]]
    for command in (
        ("nmoe-train", "run", *options, "--out", run),
        ("nmoe-train", "baselines", run, *(f"--only={name}" for name in BASELINES)),
        ("nmoe-export", run, "--int8", "--out", fleet),
        ("nmoe-edge", "keygen", fleet),
    ):
        with step(steps, " ".join(command)):
            processes.run(*command)


def start_devices(processes: Processes, steps: Steps, out: Path) -> tuple[list[str], Tests]:
    """Start a process for every device and wait until all are ready. Their names, and the rows to ask them."""
    fleet = out / "fleet"
    names = [device.name for device in read_fleet(fleet / FLEET_FILE).device]
    command = " ".join(serve_command(out, names[0]))
    with step(steps, f"{command}   # and {len(names) - 1} more, on free ports"):
        on_free_ports(fleet)
        for name in names:
            processes.serve(name, *serve_command(out, name))
        tests = tests_of(out / "run")  # while the devices start
        for name in names:
            processes.ready(name)
    return names, tests


def serve_command(out: Path, name: str) -> tuple[str, ...]:
    """The command that serves a device. A device gets own and balanced rows in turn and must not adapt to either."""
    return "nmoe-edge", "serve", str(out / "fleet" / name), "--no-adapt", "--state", str(out / "state")


def tests_of(run: Path) -> Tests:
    """The test sets of the training."""
    from nmoe_train.pipeline import trainer_of
    from nmoe_train.run import read_run

    data = trainer_of(read_run(run))[0].clients
    own = [(x.numpy(), y.numpy()) for x, y in data.own_test]
    return Tests(own, (data.test[0].numpy(), data.test[1].numpy()))


def kill_and_restart(
    processes: Processes, out: Path, fleet: dict[str, Client], traffic: Traffic, victims: list[str], seconds: float
) -> dict[str, Any]:
    """Kill the victims under traffic and start them again. When each event happened, in seconds of the traffic."""
    others = {name: client for name, client in fleet.items() if name not in victims}
    moments: dict[str, Any] = {"noticed": {}, "ready": {}, "known": {}}
    with traffic:
        traffic.until(0.3 * seconds)
        moments["killed"] = traffic.now_s
        for name in victims:
            processes.kill(name)
        for name in victims:
            wait_until_seen(others, name, alive=False)
            moments["noticed"][name] = traffic.now_s
        click.echo(f"{moments['killed']:5.1f} s  killed {', '.join(victims)}")
        click.echo(f"{max(moments['noticed'].values()):5.1f} s  all other devices know that they are gone")

        traffic.until(0.6 * seconds)
        moments["restarted"] = traffic.now_s
        for name in victims:
            processes.serve(name, *serve_command(out, name))
        for name in victims:
            processes.ready(name)
            moments["ready"][name] = traffic.now_s
        for name in victims:
            wait_until_seen(others, name, alive=True)
            moments["known"][name] = traffic.now_s
        moments["back"] = traffic.now_s
        click.echo(f"{moments['restarted']:5.1f} s  started {', '.join(victims)} again")
        click.echo(f"{moments['back']:5.1f} s  all other devices use them again")

        traffic.until(max(seconds, moments["back"] + 0.3 * seconds))
    return moments


def summary(measured: dict[str, Any]) -> Iterator[str]:
    """The page in a few lines."""
    own = measured["accuracy"]["own"]
    balanced = measured["accuracy"]["iid"]
    methods = {
        "local": "trained alone",
        "alone": "own expert alone",
        "fleet": "the running fleet",
        "centralised": "centralised",
    }
    yield f"\n{'accuracy':<24}{'own distribution':>18}{'balanced':>10}"
    for key, name in methods.items():
        yield f"{name:<24}{own[key]:>18.1%}{balanced[key]:>10.1%}"
    ways = measured["ways"]
    killed = f"{len(measured['deaths'])} of {measured['settings']['devices']} devices killed"
    yield f"\n{measured['rows']:,} requests, {killed}:"
    yield f"{ways['unanswered']:>8,} unanswered"
    yield f"{ways['neighbour']:>8,} answered by another device, because their own device was dead"
    yield f"{ways['degraded']:>8,} degraded: answered without the expert that the gate chose"


if __name__ == "__main__":
    failures: Any = (DemoError, EdgeError, TrainError)
    run_program(cli, "demo", failures, "all", ("onnxruntime", "zmq", "torch", "sklearn"))
