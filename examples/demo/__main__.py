"""The whole way, from nothing to a fleet that loses two devices and answers all the same: `make demo`.

    python examples/demo

Trains ten clients on digits, compares them with what they are to be compared with, exports a bundle for each, serves
each in a process of its own with CURVE keys, asks them their test sets, kills two with SIGKILL, brings them back, and
draws a page of what happened: runs/demo-fleet/report.html. Every step is printed as the command that one would type.
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
from figures import alone, busiest, story, worth
from page import page
from processes import (
    DemoError,
    Processes,
    Row,
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
from nmoe_edge.errors import EdgeError
from nmoe_train.errors import TrainError

OURS = r"run(-baselines)?(\.partial)?|\.(run|fleet)\..*\.staged|fleet(-keys)?|logs|state|report.html|measurements.json"
"""What a demo leaves in its folder, as a regular expression."""


@click.command(context_settings=SETTINGS, epilog="Example: python examples/demo --recipe paper --seconds 30")
@click.option("--out", type=click.Path(path_type=Path), default="runs/demo-fleet", show_default=True, help="Results.")
@click.option(
    "--devices", type=click.IntRange(2, 50), default=10, show_default=True, help="Under 5: --set data.held_out=0.3 too."
)
@click.option("--seconds", type=click.FloatRange(1, 3600), default=15.0, show_default=True, help="Of traffic, or more.")
@click.option("--rate", type=click.FloatRange(1, 1000), default=30.0, show_default=True, help="Rows/s and device.")
@click.option("--recipe", default="best", show_default=True, help="Of the training: best or paper.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the training; see nmoe-train settings.")
def cli(out: Path, devices: int, seconds: float, rate: float, recipe: str, settings: tuple[str, ...]) -> None:
    """Train, export and serve a fleet on this machine, kill a fifth of it, and draw a page of what happened."""
    swept(out)
    steps: dict[str, float] = {}
    with Processes(out / "logs") as processes:
        made(processes, steps, out, ("--recipe", recipe, "--clients", str(devices), *(f"--set={s}" for s in settings)))
        names, tests = served(processes, steps, out)
        with clients(out / "fleet") as asked:
            with step(steps, "python: every test row is asked of its device, through nmoe_edge.client.Client"):
                for name in names:
                    wait_until_seen({n: c for n, c in asked.items() if n != name}, name, alive=True)
                answered = ask_everything(list(asked.values()), tests)
            victims = [names[device] for device in busiest(answered, max(1, devices // 5))]
            with step(steps, f"python: {seconds:g} s of traffic; kill -9 {' '.join(victims)}; back again"):
                rows, moments = deaths(
                    processes, out, asked, Traffic(list(asked.values()), tests, rate), victims, seconds
                )
        memory = processes.memory_mib()
        failed = [f"{name} died although nobody killed it" for name in processes.died()]
        failed += [f"{name} did not end well when it was asked to" for name in processes.leave()]
    unanswered = sum(row.way == "unanswered" for row in rows + answered)
    failed += [f"{unanswered} rows went unanswered"] if unanswered else []
    measured = {
        "settings": {"devices": devices, "seconds": seconds, "rate": rate, "recipe": recipe, "set": list(settings)},
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()},
        "steps": steps,
        **worth(out / "run", answered, alone(out / "fleet", names, tests)),
        "export": json.loads((out / "fleet" / "report.json").read_bytes()),
        "memory_mib": memory,
        **story(rows, moments, names),
        "failed": failed,
    }
    (out / "measurements.json").write_text(json.dumps(measured, indent=1, allow_nan=False) + "\n")
    (out / "report.html").write_text(page(measured), encoding="utf-8")
    for line in summary(measured):
        click.echo(line)
    click.echo(f"look at {out / 'report.html'}")
    if failed:
        raise DemoError("; ".join(failed))


def swept(out: Path) -> None:
    """An empty folder for the results: what an earlier demo left goes, and nobody else's files do."""
    try:
        found = list(out.iterdir()) if out.exists() else []
        for path in found:
            if not re.fullmatch(OURS, path.name):
                raise DemoError(f"{out} holds {path.name}, which no demo wrote; choose another place with --out")
        for path in found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (out / "logs").mkdir(parents=True)
    except OSError as error:
        raise DemoError(f"{out}: {error.strerror}; choose another place with --out") from error


@contextmanager
def step(steps: dict[str, float], command: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    click.echo(click.style(f"\n$ {command}" if command.startswith("nmoe") else f"\n# {command}", bold=True))
    began = time.monotonic()
    yield
    steps[command] = time.monotonic() - began


def made(processes: Processes, steps: dict[str, float], out: Path, settings: tuple[str, ...]) -> None:
    """Train, compare, export, make keys: the commands that one would type."""
    run, fleet = str(out / "run"), str(out / "fleet")
    for command in (
        ("nmoe-train", "run", *settings, "--out", run),
        ("nmoe-train", "baselines", run),
        ("nmoe-export", run, "--int8", "--out", fleet),
        ("nmoe-edge", "keygen", fleet),
    ):
        with step(steps, " ".join(command)):
            processes.run(*command)


def served(processes: Processes, steps: dict[str, float], out: Path) -> tuple[list[str], Tests]:
    """Every device in a process of its own, ready; their names, and what to ask them."""
    fleet = out / "fleet"
    names = [device.name for device in read_fleet(fleet / FLEET_FILE).device]
    with step(steps, f"{' '.join(serve(out, names[0]))}   # and {len(names) - 1} more, on ports that are free"):
        on_free_ports(fleet)
        for name in names:
            processes.serve(name, *serve(out, name))
        tests = tests_of(out / "run")  # while they start
        for name in names:
            processes.ready(name)
    return names, tests


def serve(out: Path, name: str) -> tuple[str, ...]:
    """What serves a device. It will be asked two kinds of traffic in one sitting: it had better adapt to neither."""
    return "nmoe-edge", "serve", str(out / "fleet" / name), "--no-adapt", "--state", str(out / "state")


def tests_of(run: Path) -> Tests:
    """The test sets as the training dealt them out."""
    from nmoe_train.pipeline import trainer_of
    from nmoe_train.run import read_run

    clients_ = trainer_of(read_run(run))[0].clients
    own = [(x.numpy(), y.numpy()) for x, y in clients_.own_test]
    return Tests(own, (clients_.test[0].numpy(), clients_.test[1].numpy()))


def deaths(
    processes: Processes, out: Path, asked: dict[str, Client], traffic: Traffic, victims: list[str], seconds: float
) -> tuple[list[Row], dict[str, Any]]:
    """Under traffic kill, wait, bring back, wait: every row, and when what happened, in seconds of the traffic."""
    others = {name: client for name, client in asked.items() if name not in victims}
    moments: dict[str, Any] = {"noticed": {}, "ready": {}, "known": {}}
    with traffic:
        traffic.until(0.3 * seconds)
        moments["killed"] = traffic.now_s
        for name in victims:
            processes.kill(name)
        for name in victims:
            wait_until_seen(others, name, alive=False)
            moments["noticed"][name] = traffic.now_s
        click.echo(f"{', '.join(victims)} killed after {moments['killed']:.1f} s")
        traffic.until(0.6 * seconds)
        moments["restarted"] = traffic.now_s
        for name in victims:
            processes.serve(name, *serve(out, name))
        for name in victims:
            processes.ready(name)
            moments["ready"][name] = traffic.now_s
        for name in victims:
            wait_until_seen(others, name, alive=True)
            moments["known"][name] = traffic.now_s
        moments["back"] = traffic.now_s
        click.echo(f"{', '.join(victims)} back after {moments['back']:.1f} s")
        traffic.until(max(seconds, moments["back"] + 0.3 * seconds))
    return traffic.rows, moments


def summary(measured: dict[str, Any]) -> Iterator[str]:
    """The page in five lines."""
    own, iid = (measured["accuracy"][part] for part in ("own", "iid"))
    named = {"local": "local only", "alone": "own expert alone", "fleet": "as the fleet answered"}
    yield f"\n{'':<24}{'own distribution':>18}{'balanced':>10}"
    for key, name in (named | {"centralised": "centralised"}).items():
        yield f"{name:<24}{own[key]:>18.1%}{iid[key]:>10.1%}"
    ways, rows = measured["ways"], measured["rows"]
    yield (
        f"{rows:,} rows of traffic, {ways['unanswered']} unanswered; {len(measured['deaths'])} of"
        f" {measured['settings']['devices']} devices killed: {ways['neighbour']} rows went to a neighbour,"
        f" {ways['degraded']} were degraded"
    )


if __name__ == "__main__":
    failures: Any = (DemoError, EdgeError, TrainError)
    run_program(cli, "demo", failures, "all", ("onnxruntime", "zmq", "torch", "sklearn"))
