"""`eff list-plugins` with 90 installed plugins, beside importing typer and rich.table alone.

    python benchmarks/list_plugins.py [--json]

Makes 90 dummy distributions in a temporary folder on PYTHONPATH; runs take turns; medians. Both find their modules compiled,
as after an installation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLUGINS = 90
RUNS = 15


def make_plugins(folder: Path) -> None:
    """Write the metadata of 90 distributions."""
    for index in range(PLUGINS):
        info = folder / f"eff_quant_dummy{index}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: eff-quant-dummy{index}", "Version: 1.0", f"Summary: dummy method {index}",
                 "Keywords: eff,eff-api-1", "Requires-Dist: eff-core>=0.1,<1", "Requires-Dist: torch>=2.6"]  # fmt: skip
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(
            f"[eff.plugins]\nquant_dummy{index} = eff_quant_dummy{index}.plugin:Dummy\n"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    commands = {
        "list_plugins": [sys.executable, "-m", "eff", "list-plugins"],
        "imports_alone": [sys.executable, "-c", "import typer, rich.table"],
    }
    with tempfile.TemporaryDirectory() as name:
        make_plugins(Path(name))
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONPYCACHEPREFIX": str(Path(name, "compiled"))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times: dict[str, list[float]] = {key: [] for key in commands}
        for _ in range(RUNS + 1):
            for key, command in commands.items():
                start = time.perf_counter()
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                times[key].append(time.perf_counter() - start)
                if key == "list_plugins":
                    assert done.stdout.count("quant_dummy") >= PLUGINS
        probe = "import sys\nfrom eff.cli import main\ntry: main(['list-plugins'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True
        )
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}
    result = {
        **{f"{key}_s": round(value, 3) for key, value in medians.items()},
        "ratio": round(medians["list_plugins"] / medians["imports_alone"], 2),
        "torch_imported": done.stderr.strip() == "True",
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
