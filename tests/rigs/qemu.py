"""A Raspberry Pi that is not there: Debian for arm64 under qemu, for tests/rigs/arm.py.

The tree is made once, under ~/.cache/nmoe, and never written to again: each command in it has mounts of its own, and a
folder of the run at /mnt. Knows nothing of what is tried there.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

SUITE, PYTHON = "bookworm", "3.11"
"""Raspberry Pi OS's of 2023 to 2025, and the Python that it has."""
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_26_aarch64", "manylinux_2_28_aarch64")
"""Wheels that this Debian's C library, 2.36, can load."""
NEEDED = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "update-binfmts": "binfmt-support"}
"""Program -> package of Debian and Ubuntu."""
MOUNTING = ("unshare", "--mount", "--propagation", "private")
"""Before a command: its mounts are its own, and go when it ends, however it ends."""
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
"""The same, and what it starts ends with it."""
INSIDE = """
set -e
tree=$0 work=$1
shift
mount --bind "$tree" "$tree"
mount -o remount,bind,ro "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/sys"
mkdir -p "$tree/sys/devices/system/cpu"
for file in possible present online; do echo 0-3 > "$tree/sys/devices/system/cpu/$file"; done
mount --bind "$work/$QEMU_CPU" "$tree/proc/cpuinfo"
mount -t tmpfs tmpfs "$tree/tmp"
mount --bind "$work" "$tree/mnt"
exec chroot "$tree" "$@"
"""
"""Goes before a command in the tree; the command has this shell's pid."""
OLDER, NEWER = "cortex-a53", "cortex-a76"
"""A Raspberry Pi Zero 2 W's cores and a Pi 5's: without and with instructions for dot products of bytes, for which
onnxruntime has kernels of their own."""
CPUINFO = {
    OLDER: ("fp asimd evtstrm crc32 cpuid", "0x0", "0xd03", 4),
    NEWER: (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0x4",
        "0xd0b",
        1,
    ),
}
"""Features, variant, part and revision, as /proc/cpuinfo has them there: qemu would show the host's."""
began = time.monotonic()


class Skipped(Exception):
    """Such a test cannot be had on the machine at hand."""


def say(what):
    """Progress, on stderr."""
    print(f"[{time.monotonic() - began:4.0f} s] {what}", file=sys.stderr, flush=True)


def run(*command, **options):
    """A command that must succeed; what it prints goes to stderr, unless it is asked for."""
    return subprocess.run(command, check=True, text=True, **({"stdout": sys.stderr} | options))


class Arm:
    """The tree, and the folder of this run in it."""

    def __init__(self, tree, work):
        self.tree, self.work = tree, work
        for cpu, (features, variant, part, revision) in CPUINFO.items():
            facts = f"Features\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {variant}\n"
            facts += f"CPU part\t: {part}\nCPU revision\t: {revision}\n\n"
            (work / cpu).write_text("".join(f"processor\t: {core}\nBogoMIPS\t: 108.00\n{facts}" for core in range(4)))

    def __call__(self, *command, cpu=NEWER, alone=False):
        """What to execute here so that a command is executed there; alone: whatever that starts ends with it."""
        environment = (
            f"QEMU_CPU={cpu}",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/mnt",
            "LC_ALL=C.UTF-8",
            "PYTHONDONTWRITEBYTECODE=1",
        )
        shell = (*(ALONE if alone else MOUNTING), "sh", "-c", INSIDE, self.tree, self.work)
        return [str(part) for part in ("env", f"QEMU_CPU={cpu}", *shell, "env", "-i", *environment, *command)]

    def there(self, path):
        """Where a path of this run's folder is in the tree."""
        return Path("/mnt") / Path(path).relative_to(self.work)


def prepare():
    """What makes and runs such a tree, installed where that can be."""
    if platform.machine() != "x86_64":
        raise Skipped(f"qemu is for an x86-64 machine, and this one is {platform.machine()}")
    if os.geteuid():
        raise Skipped("only root may mount and chroot; try sudo")
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        if shutil.which("apt-get") is None:
            raise Skipped(f"there is no apt-get to install {', '.join(missing)} with")
        say(f"installing {', '.join(missing)}")
        try:
            run("apt-get", "update", "--quiet")
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            keyring = "debian-archive-keyring"  # which Ubuntu has not by itself
            run("apt-get", "install", "--yes", "--no-install-recommends", *missing, keyring, env=environment)
        except subprocess.CalledProcessError:
            raise Skipped(f"apt-get could not install {', '.join(missing)}") from None
    subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True, check=False)
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        raise Skipped("the kernel hands no Arm programs to qemu: binfmt_misc is not to be had")
    if subprocess.run([*MOUNTING, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode:
        raise Skipped("root may not mount in here, as in most containers")


def mirror():
    """Where this machine has its own packages from; debootstrap's default where that is no such Debian."""
    asked = ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}")
    lines = run(*asked, stdout=subprocess.PIPE).stdout.split()
    return lines[:1]


def debian():
    """The tree: made when it is missing, in another place until it is whole."""
    home = os.environ.get("XDG_CACHE_HOME")
    tree = (Path(home) if home else Path.home() / ".cache") / "nmoe" / "arm64" / SUITE
    tree.parent.mkdir(parents=True, exist_ok=True)
    with (tree.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs do not make it at once
        if not tree.exists():
            partial = tree.with_suffix(".partial")
            say(f"making a Debian {SUITE} for arm64 in {tree}: minutes, once")
            shutil.rmtree(partial, ignore_errors=True)
            options = ("--foreign", "--arch=arm64", "--variant=minbase", "--include=python3-venv")
            try:
                run(*ALONE, "debootstrap", *options, SUITE, partial, *mirror())
            except subprocess.CalledProcessError:
                raise Skipped("debootstrap could not fetch a Debian for arm64") from None
            say("configuring it, as an Arm machine")
            run(*ALONE, "chroot", partial, "/debootstrap/debootstrap", "--second-stage")
            run(*ALONE, "chroot", partial, "apt-get", "clean")
            (partial / "etc" / "hosts").write_text("127.0.0.1 localhost\n")  # debootstrap leaves that to an installer
            partial.rename(tree)
    return tree


@contextmanager
def capped(megabytes):
    """A control group whose members are killed when they take more: what stands before a command."""
    version_1 = Path("/sys/fs/cgroup/memory")
    if version_1.is_dir():
        limit, swap = "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", megabytes << 20)
    else:
        limit, swap = "memory.max", ("memory.swap.max", 0)
    group = (version_1 if version_1.is_dir() else version_1.parent) / f"nmoe-arm-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Skipped(f"{group}: {error.strerror}") from None
    try:
        if not (group / limit).exists():
            raise Skipped("control groups do not count memory here")
        (group / limit).write_text(str(megabytes << 20))
        with suppress(OSError):  # a kernel without swap accounting
            (group / swap[0]).write_text(str(swap[1]))
        within = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group))
        too_much = (sys.executable, "-c", f"bytearray({megabytes} << 20)")
        greedy = subprocess.run([*within, *too_much], check=False, capture_output=True)
        if greedy.returncode != -signal.SIGKILL:
            raise Skipped("control groups do not stop who takes too much here")
        yield within
    finally:
        group.rmdir()
