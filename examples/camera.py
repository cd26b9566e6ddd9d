"""A camera that asks a device about every frame, and drops those that are not answered before the next one.

    python examples/camera.py FLEET --pictures photos/ --fps 20

FLEET is a fleet's folder, and one of its devices is serving: `nmoe-edge serve FLEET/device-00`. Pictures repeat without
end; without --pictures, frames are drawn. One line a second says what was seen, until Ctrl-C.
"""

import itertools
import math
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

import click
import numpy as np

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.image import read_rows
from nmoe_edge.bundle.manifest import InputSpec
from nmoe_edge.client import Client
from nmoe_edge.common.command import SETTINGS, run_program
from nmoe_edge.common.schema import from_plain
from nmoe_edge.errors import CallError, EdgeError, InputError
from nmoe_edge.keys import keys_to


def frames_of(folder, spec):
    """The pictures of a folder as frames (1, …), again and again."""
    paths = sorted(path for path in folder.glob("*") if path.is_file())
    if not paths:
        raise InputError(f"{folder}: not a folder with pictures")
    rows = np.concatenate([read_rows(path, spec) for path in paths])
    return (row[None] for row in itertools.cycle(rows))


def drawings(spec):
    """Moving waves as frames (1, …), in the range of the model's inputs."""
    low, high = spec.range
    phases = np.linspace(0, 6, math.prod(spec.shape)).reshape(spec.shape)
    for number in itertools.count():
        frame = low + (high - low) * (0.5 + 0.5 * np.sin(phases + number / 10))
        yield frame.clip(low, high).astype(spec.dtype)[None]


def ask(client, frame, deadline_s, next_at):
    """The class of a frame; None if it is not known when the next frame comes."""
    if time.monotonic() >= next_at:
        return None  # the camera was still waiting for the frame before this one
    try:
        answers = client.infer(frame, deadline_s)
    except CallError:
        return None
    return int(answers.outputs[0].argmax()) if time.monotonic() < next_at else None


def watch(client, frames, labels, fps, deadline_s, seconds):
    """Ask about each frame when it comes, and print a line every second."""
    seen = Counter()
    latencies_ms = []
    answered = dropped = reported_s = 0
    started = time.monotonic()
    try:
        for number, frame in enumerate(frames):
            taken_at = started + number / fps
            if taken_at >= started + seconds:
                break
            time.sleep(max(0.0, taken_at - time.monotonic()))
            elapsed_s = int(time.monotonic() - started)
            if elapsed_s > reported_s:
                reported_s = elapsed_s
                what = ", ".join(f"{label} {count}×" for label, count in seen.most_common(3)) or "nothing"
                median = f", median {statistics.median(latencies_ms):.1f} ms" if latencies_ms else ""
                total = answered + dropped
                print(f"{elapsed_s:4} s  saw {what}{median}; {dropped} of {total} frames dropped so far", flush=True)
                seen.clear()
                latencies_ms.clear()
            found = ask(client, frame, deadline_s, next_at=taken_at + 1 / fps)
            if found is None:
                dropped += 1
            else:
                answered += 1
                seen[labels[found] if labels else str(found)] += 1
                latencies_ms.append(1000 * (time.monotonic() - taken_at))
    except KeyboardInterrupt:
        pass
    print(f"{answered + dropped} frames: {answered} answered, {dropped} dropped")


@click.command(context_settings=SETTINGS, epilog="Example: python examples/camera.py bundles/digits --fps 20")
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--device", help="The device to ask.  [default: the first of the fleet]")
@click.option("--pictures", type=click.Path(path_type=Path), help="A folder of pictures.  [default: frames are drawn]")
@click.option("--fps", type=click.FloatRange(0.1, 1000), default=10.0, show_default=True, help="Frames per second.")
@click.option("--deadline-ms", type=float, help="For one frame.  [default: 80 % of the time of a frame]")
@click.option("--seconds", type=click.FloatRange(0), default=math.inf, help="How long to run.  [default: until Ctrl-C]")
def cli(fleet, device, pictures, fps, deadline_ms, seconds):
    """Send frames to a device of FLEET as a camera would, and print what it saw."""
    deadline_s = 0.8 / fps if deadline_ms is None else deadline_ms / 1000
    if not 0 < deadline_s < 1 / fps:
        raise InputError(f"--deadline-ms must be over 0 and under {1000 / fps:g}, the time of a frame at --fps {fps:g}")
    fleet_file = fleet / FLEET_FILE
    members = read_fleet(fleet_file)
    asked = members.device[0] if device is None else members.named(device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C
    with Client(asked.address, *keys_to(asked.name, fleet_file, None)) as client:
        status = client.status()
        spec = from_plain(InputSpec, status["input"])
        frames = drawings(spec) if pictures is None else frames_of(pictures, spec)
        watch(client, frames, status["labels"], fps, deadline_s, seconds)


if __name__ == "__main__":
    run_program(cli, "camera", EdgeError, "edge", ("onnxruntime", "zmq", "PIL"))
