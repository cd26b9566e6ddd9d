"""A camera that asks a device about every frame, and drops those that are not answered before the next one.

    python examples/camera.py FLEET --pictures photos/ --fps 20

FLEET is a fleet's folder, and one of its devices is serving: `nmoe-edge serve FLEET/device-00`. Pictures repeat without
end; without --pictures, frames are drawn. One line a second says what was seen, until Ctrl-C.
"""

import argparse
import itertools
import math
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.image import read_rows
from nmoe_edge.bundle.manifest import InputSpec
from nmoe_edge.client import Client
from nmoe_edge.common.schema import from_plain
from nmoe_edge.errors import CallError, EdgeError
from nmoe_edge.keys import keys_to


def pictures(folder, spec):
    """The pictures of a folder as frames (1, …), again and again."""
    paths = sorted(path for path in folder.glob("*") if path.is_file())
    if not paths:
        sys.exit(f"{folder}: not a folder with pictures")
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


def main(options):
    """Connect to the device, and learn from its status which inputs it takes."""
    deadline_s = 0.8 / options.fps if options.deadline_ms is None else options.deadline_ms / 1000
    if not 0 < deadline_s < 1 / options.fps:
        frame_ms = 1000 / options.fps
        sys.exit(f"--deadline-ms must be over 0 and under {frame_ms:g}, the time of a frame at --fps {options.fps:g}")
    fleet_file = options.fleet / FLEET_FILE
    fleet = read_fleet(fleet_file)
    device = fleet.device[0] if options.device is None else fleet.named(options.device)
    with Client(device.address, *keys_to(device.name, fleet_file, None)) as client:
        status = client.status()
        spec = from_plain(InputSpec, status["input"])
        frames = drawings(spec) if options.pictures is None else pictures(options.pictures, spec)
        watch(client, frames, status["labels"], options.fps, deadline_s, options.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", metavar="FLEET", type=Path)
    parser.add_argument("--device", help="the device to ask (default: the first of the fleet)")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures (default: frames are drawn)")
    parser.add_argument("--fps", type=float, default=10.0, help="frames per second (default: 10)")
    parser.add_argument("--deadline-ms", type=float, help="for one frame (default: 80%% of the time of a frame)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="how long to run (default: until Ctrl-C)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C
    arguments = parser.parse_args()
    if not 0.1 <= arguments.fps <= 1000:
        parser.error("--fps must be from 0.1 to 1000")
    try:
        main(arguments)
    except EdgeError as error:
        sys.exit(str(error))
