"""`python -m tests.avx512.bochs`: the doctor on a CPU with AVX-512, which Bochs emulates.

The rest of this folder stands in for AVX-512's intrinsics; this runs the machine code that the compiler made of them.
A CD with Linux, this checkout, its Python and this machine's libraries boots in the emulator. The doctor takes some
23 G instructions there, of which Debian 12's Bochs runs 40 M a second on a free core.

`python -m tests.avx512.bochs COMMAND` runs another command, in the checkout, which cannot be written to:
`python -m pytest -p no:cacheprovider tests/ops -k "avx512 and cpu and not emulated"`, say.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.build import ROOT

INSTALL = "apt-get install bochs grub-pc-bin xorriso mtools cpio busybox-static"
TOOLS = ("bochs", "grub-mkrescue", "xorriso", "mformat", "cpio", "busybox", "apt-get")
WORK = ROOT / "build" / "bochs"
KERNEL = "linux-image-amd64"  # the cloud kernel has no driver for the CD
MOUNTS = ("dev", "proc", "sys", "tmp")
MODULES = ("scsi_common", "scsi_mod", "libata", "ata_piix", "cdrom", "sr_mod", "isofs")  # as they need one another
# What Python and the tests need, g++ and its headers with them.
LIBRARIES = ("/usr/lib64", "/usr/lib/gcc", "/usr/lib/x86_64-linux-gnu")
MACHINE = ("/bin", "/lib", "/lib64", "/usr/bin", "/usr/include", *LIBRARIES)

# Bochs 2.7 reports the wrong size for registers saved in compact form: neither Linux nor glibc may use it.
GRUB = """
linux /boot/vmlinuz console=ttyS0 mitigations=off nokaslr clearcpuid=xsaves,xsavec
initrd /boot/first.cpio
boot
"""
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in {" ".join(MODULES)}; do insmod /$module.ko; done
mount -t iso9660 -o ro /dev/sr0 /disc
mount -t devtmpfs dev /disc/dev
mount -t proc proc /disc/proc
mount -t sysfs sys /disc/sys
mount -t tmpfs tmp /disc/tmp
echo; echo "=== begin"
chroot /disc /bin/bash /run.sh < /dev/null
echo "=== exit code $?"
poweroff -f
"""
RUN = """
grep -m 1 '^model name' /proc/cpuinfo
export LD_BIND_NOW=1 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 COLUMNS=120 PATH={path} HOME=/tmp
cd {folder} && {command}
"""
BOCHS = f"""
display_library: rfb, options="timeout=0"
cpu: model=corei7_skylake_x, ips=50000000
memory: guest=2048, host=2048
ata0-master: type=cdrom, path={WORK}/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={WORK}/output
log: {WORK}/log
"""


def kernel() -> Path:
    """Debian's kernel and its modules, unpacked."""
    unpacked = WORK / "kernel"
    if not unpacked.exists():
        depends = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True).stdout
        package = re.search(r"Depends: (linux-image\S+)", depends)[1]
        subprocess.run(["apt-get", "download", "-q", package], cwd=WORK, check=True)
        subprocess.run(["dpkg", "-x", *WORK.glob(f"{package}_*.deb"), unpacked], check=True)
    return unpacked


def make_disc(folder: Path, command: str) -> None:
    """A CD that runs `command` in `folder`: files of this machine at their places, and the package alone in /llmsys."""
    first, disc = WORK / "first", WORK / "disc"
    for path in (*(first / name for name in ("bin", "dev", "disc")), *(disc / name for name in MOUNTS)):
        path.mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", first / "bin")
    for module in MODULES:
        shutil.copy(next(kernel().rglob(f"{module}.ko")), first)
    (first / "init").write_text(INIT)
    (first / "init").chmod(0o755)
    subprocess.run("find . | cpio --quiet -o -H newc > ../first.cpio", shell=True, cwd=first, check=True)
    path = f"{sys.prefix}/bin:/usr/bin:/bin"
    (disc / "run.sh").write_text(RUN.format(path=path, folder=folder, command=command))
    (WORK / "grub.cfg").write_text(GRUB)
    places = {"/boot/vmlinuz": next(kernel().glob("boot/vmlinuz*")), "/boot/first.cpio": WORK / "first.cpio"}
    places |= {"/boot/grub/grub.cfg": WORK / "grub.cfg", "/llmsys": ROOT / "llmsys"}
    places |= {file: file for file in (*MACHINE, sys.base_prefix, sys.prefix, ROOT)}
    left_out = (WORK, *Path(sys.prefix).glob("lib/*/site-packages/triton"))  # its interpreter would take hours here
    options = [word for file in left_out for word in ("-x", file)]
    grafts = [f"{place}={file}" for place, file in places.items()]
    with (WORK / "disc.log").open("w") as log:
        make = ["grub-mkrescue", "-o", WORK / "disc.iso", *options, "-graft-points", disc, *grafts]
        subprocess.run(make, stdout=log, stderr=log, check=True)


def boot() -> str:
    """What the machine wrote to its serial port until it was off."""
    (WORK / "bochsrc").write_text(BOCHS)
    (WORK / "continue").write_text("c\n")
    (WORK / "output").unlink(missing_ok=True)
    usage = subprocess.run(["bochs", "--help"], capture_output=True, text=True)
    debugger = ["-rc", f"{WORK}/continue"] if "-rc " in usage.stdout + usage.stderr else []  # Debian's stops in one
    with (WORK / "messages").open("w") as messages:
        emulate = ["bochs", "-q", "-f", WORK / "bochsrc", *debugger]
        subprocess.run(emulate, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
    return (WORK / "output").read_text(errors="replace")


def main() -> None:
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise SystemExit(f"tests.avx512.bochs: {', '.join(missing)} not found, expected what `{INSTALL}` installs")
    WORK.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        make_disc(ROOT, " ".join(sys.argv[1:]))
    else:
        make_disc(Path("/"), "python -m llmsys doctor")  # without tests/simt, which takes hours here
    print(f"tests.avx512.bochs: the machine writes to {WORK}/output", flush=True)
    output = boot()
    shown = re.search(r"=== begin\s(.*)=== exit code (\d+)", output, re.DOTALL)
    if shown is None:
        raise SystemExit(f"tests.avx512.bochs: the command did not end, see {WORK}/output and {WORK}/log")
    print(shown[1])
    raise SystemExit(int(shown[2]))


if __name__ == "__main__":
    main()
