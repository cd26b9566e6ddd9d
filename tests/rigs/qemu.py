"""An emulated Raspberry Pi for tests/rigs/arm.py: Debian for arm64 under qemu.

The root file system (the tree) is made once, under ~/.cache/nmoe, and is read-only afterwards. Each command runs in it
with its own mounts, and with the folder of the run at /mnt. What is tested on it is up to the caller.
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

SUITE = "bookworm"
"""The Debian that Raspberry Pi OS of 2023 to 2025 is based on."""
PYTHON = "3.11"
"""Its Python."""
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_26_aarch64", "manylinux_2_28_aarch64")
"""Wheel platforms that work with this Debian's glibc, 2.36."""
NEEDED = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "update-binfmts": "binfmt-support"}
"""Program -> its package in Debian and Ubuntu."""
MOUNTING = ("unshare", "--mount", "--propagation", "private")
"""Command prefix: the command gets its own mounts, which vanish when it ends."""
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
"""The same, and every process it starts ends with it."""
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
"""Shell script that mounts the tree and runs a command in it; the command keeps the shell's pid."""
OLDER = "cortex-a53"
"""The cores of a Raspberry Pi Zero 2 W."""
NEWER = "cortex-a76"
"""The cores of a Pi 5. They have dot products of bytes, for which onnxruntime uses other kernels."""
CPUINFO = {
    OLDER: ("fp asimd evtstrm crc32 cpuid", "0x0", "0xd03", 4),
    NEWER: (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0x4",
        "0xd0b",
        1,
    ),
}
"""Features, variant, part and revision, as in /proc/cpuinfo of the board; qemu would show the host's."""
began = time.monotonic()


class Skipped(Exception):
    """The machine cannot run the test; the text says why."""


def say(progress):
    """Print progress to stderr."""
    print(f"[{time.monotonic() - began:4.0f} s] {progress}", file=sys.stderr, flush=True)


def run(*command, **options):
    """Run a command that must succeed; by default its output goes to stderr."""
    return subprocess.run(command, check=True, text=True, **({"stdout": sys.stderr} | options))


class Arm:
    """The emulated machine: the tree, and the folder of this run mounted in it."""

    def __init__(self, tree, work):
        self.tree = tree
        self.work = work
        for cpu, (features, variant, part, revision) in CPUINFO.items():
            facts = f"Features\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {variant}\n"
            facts += f"CPU part\t: {part}\nCPU revision\t: {revision}\n\n"
            (work / cpu).write_text("".join(f"processor\t: {core}\nBogoMIPS\t: 108.00\n{facts}" for core in range(4)))

    def __call__(self, *command, cpu=NEWER, alone=False):
        """The command line that runs `command` on the emulated machine; alone: its child processes end with it."""
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
        """The path on the emulated machine of a file in this run's folder."""
        return Path("/mnt") / Path(path).relative_to(self.work)


def prepare():
    """Install what is needed to make and run the tree; Skipped where that is impossible."""
    if platform.machine() != "x86_64":
        raise Skipped(f"needs an x86-64 machine, and this one is {platform.machine()}")
    if os.geteuid():
        raise Skipped("needs root to mount and chroot; try sudo")
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        if shutil.which("apt-get") is None:
            raise Skipped(f"{', '.join(missing)} must be installed, and apt-get is missing")
        say(f"installing {', '.join(missing)}")
        try:
            run("apt-get", "update", "--quiet")
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            keyring = "debian-archive-keyring"  # Ubuntu does not install it by default
            run("apt-get", "install", "--yes", "--no-install-recommends", *missing, keyring, env=environment)
        except subprocess.CalledProcessError:
            raise Skipped(f"apt-get could not install {', '.join(missing)}") from None
    subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True, check=False)
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        raise Skipped("the kernel cannot run Arm programs with qemu: binfmt_misc is missing")
    if subprocess.run([*MOUNTING, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode:
        raise Skipped("root cannot mount on this machine, as in most containers")


def mirror():
    """The package mirror of this machine if it runs the same Debian; else empty, for debootstrap's default."""
    command = ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}")
    lines = run(*command, stdout=subprocess.PIPE).stdout.split()
    return lines[:1]


def debian():
    """The tree, made if it is missing: under another name until it is complete."""
    home = os.environ.get("XDG_CACHE_HOME")
    tree = (Path(home) if home else Path.home() / ".cache") / "nmoe" / "arm64" / SUITE
    tree.parent.mkdir(parents=True, exist_ok=True)
    with (tree.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that two runs do not make it at the same time
        if not tree.exists():
            partial = tree.with_suffix(".partial")
            say(f"making a Debian {SUITE} for arm64 in {tree}; this takes minutes, once")
            shutil.rmtree(partial, ignore_errors=True)
            options = ("--foreign", "--arch=arm64", "--variant=minbase", "--include=python3-venv")
            try:
                run(*ALONE, "debootstrap", *options, SUITE, partial, *mirror())
            except subprocess.CalledProcessError:
                raise Skipped("debootstrap could not download Debian for arm64") from None
            say("configuring it on the emulated machine")
            run(*ALONE, "chroot", partial, "/debootstrap/debootstrap", "--second-stage")
            run(*ALONE, "chroot", partial, "apt-get", "clean")
            (partial / "etc" / "hosts").write_text("127.0.0.1 localhost\n")  # debootstrap does not write it
            partial.rename(tree)
    return tree


@contextmanager
def capped(megabytes):
    """Make a control group with a memory limit; yields the command prefix that starts a process in it."""
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
            raise Skipped("control groups do not count memory on this machine")
        (group / limit).write_text(str(megabytes << 20))
        with suppress(OSError):  # a kernel without swap accounting
            (group / swap[0]).write_text(str(swap[1]))
        within = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group))
        too_much = (sys.executable, "-c", f"bytearray({megabytes} << 20)")
        greedy = subprocess.run([*within, *too_much], check=False, capture_output=True)
        if greedy.returncode != -signal.SIGKILL:
            raise Skipped("control groups do not enforce the memory limit on this machine")
        yield within
    finally:
        group.rmdir()
