"""Run what the documentation says: every fenced block marked `runnable`, in reading order, in one empty folder.

A block starts with ```bash runnable or ```python runnable. Pages build on one another as a reader's session would.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "analyze",
    "plan",
    "stability",
    "convert",
    "heal",
    "evaluate",
    "bench",
    "predict",
    "inspect",
    "export",
    "verify",
    "families",
    "run",
    "report",
)
BLOCK = re.compile(r"^```(bash|python) runnable\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> int:
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
    rest = sorted(set((ROOT / "docs").glob("*.md")) - set(pages))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    with tempfile.TemporaryDirectory() as folder:
        for page in [*pages, *rest]:
            for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
                started = time.monotonic()
                command = (
                    ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
                )
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
                name = f"{page.relative_to(ROOT)}: {code.strip().splitlines()[0]}"
                print(
                    f"{'ok  ' if done.returncode == 0 else 'FAIL'} {time.monotonic() - started:5.1f} s  {name}",
                    flush=True,
                )
                if done.returncode:
                    print(code, done.stdout, done.stderr, sep="\n")
                    return 1
                ran += 1
    print(f"{ran} blocks ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
