"""A camera beside a device: frames at a steady rate, each answered before the next one is due, or dropped.

    python examples/camera.py FLEET --pictures photos/ --fps 20

FLEET is a fleet's folder with one of its devices serving, as `nmoe-edge serve FLEET/device-00` does. Pictures are shown
again and again; without any, frames are drawn. Once a second a line says what was seen. Ctrl-C ends it.
"""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from demo.processes import clients
from numpy.typing import NDArray

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.image import read_rows
from nmoe_edge.bundle.manifest import InputSpec
from nmoe_edge.client import Client
from nmoe_edge.common.command import SETTINGS, run_program
from nmoe_edge.common.schema import from_plain
from nmoe_edge.errors import CallError, EdgeError, InputError


@click.command(context_settings=SETTINGS, epilog="Example: python examples/camera.py bundles/digits --fps 20")
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--device", help="Whom to ask.  [default: the fleet's first]")
@click.option("--pictures", type=click.Path(path_type=Path), help="A folder of them.  [default: frames are drawn]")
@click.option("--fps", type=click.FloatRange(0.1, 1000), default=10.0, show_default=True, help="Frames a second.")
@click.option("--deadline-ms", type=float, help="Of a frame.  [default: eight tenths of a frame's time]")
@click.option("--seconds", type=click.FloatRange(0), default=math.inf, help="To go on.  [default: until Ctrl-C]")
def cli(
    fleet: Path, device: str | None, pictures: Path | None, fps: float, deadline_ms: float | None, seconds: float
) -> None:
    """Send frames to a device of FLEET as a camera would, and say what it saw."""
    deadline_s = 0.8 / fps if deadline_ms is None else deadline_ms / 1000
    if not 0 < deadline_s < 1 / fps:
        raise InputError(f"--deadline-ms must be over 0 and under {1000 / fps:g}, the time of a frame at --fps {fps:g}")
    devices = read_fleet(fleet / FLEET_FILE)
    name = devices.device[0].name if device is None else devices.named(device).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with clients(fleet) as asked:
        facts = asked[name].status()
        frames = frames_of(pictures, from_plain(InputSpec, facts["input"]))
        labels = facts["labels"] or [str(number) for number in range(1000)]
        watch(asked[name], frames, labels, fps, deadline_s, seconds)


def frames_of(pictures: Path | None, spec: InputSpec) -> Iterator[NDArray[np.generic]]:
    """One row after another, without end."""
    if pictures is not None:
        paths = sorted(path for path in pictures.iterdir() if path.is_file()) if pictures.is_dir() else []
        if not paths:
            raise InputError(f"{pictures}: no folder with pictures in it")
        rows = np.concatenate([read_rows(path, spec) for path in paths])
        return (row[None] for row in itertools.cycle(rows))
    low, high = spec.range
    waves = np.linspace(0, 6, math.prod(spec.shape)).reshape(spec.shape)
    drawn = (low + (high - low) * (0.5 + 0.5 * np.sin(waves + number / 10)) for number in itertools.count())
    return (frame.clip(low, high).astype(spec.dtype)[None] for frame in drawn)


def watch(
    client: Client,
    frames: Iterator[NDArray[np.generic]],
    labels: list[str],
    fps: float,
    deadline_s: float,
    seconds: float,
) -> None:
    """Answer what can be answered in time; a frame that is over before its turn comes is dropped."""
    seen: Counter[str] = Counter()
    total: Counter[str] = Counter()
    took: list[float] = []
    began, said_at = time.monotonic(), 0

    def say() -> None:
        what = ", ".join(f"{label} {count}×" for label, count in seen.most_common(3)) or "nothing"
        median = f", median {1000 * statistics.median(took):.1f} ms" if took else ""
        click.echo(f"{said_at:4} s  saw {what}{median}; {total['dropped']} of {total.total()} frames dropped so far")
        seen.clear()
        took.clear()

    try:
        for number, frame in enumerate(frames):
            due = began + number / fps
            if due >= began + seconds:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() >= began + said_at + 1:
                said_at = int(time.monotonic() - began)
                say()
            label = seen_in_time(client, frame, labels, due + 1 / fps, deadline_s)
            total["answered" if label else "dropped"] += 1
            if label:
                seen[label] += 1
                took.append(time.monotonic() - due)
    except KeyboardInterrupt:
        pass  # the way to end it
    click.echo(f"{total.total()} frames: {total['answered']} answered, {total['dropped']} dropped")


def seen_in_time(
    client: Client, frame: NDArray[np.generic], labels: list[str], until: float, deadline_s: float
) -> str | None:
    """What is on a frame; None where that is not known before the next frame comes."""
    if time.monotonic() >= until:
        return None  # it came while another was waited for: nobody is asked
    try:
        answers = client.infer(frame, deadline_s)
    except CallError:
        return None
    return labels[int(answers.outputs[0].argmax())] if time.monotonic() < until else None


if __name__ == "__main__":
    run_program(cli, "camera", EdgeError, "edge", ("onnxruntime", "zmq", "PIL"))
