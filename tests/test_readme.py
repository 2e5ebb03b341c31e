"""The README's generated parts are current."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "update_readme.py"


def test_the_flags_table_is_current() -> None:
    found = subprocess.run([sys.executable, SCRIPT, "--check"], check=False)
    assert found.returncode == 0, "run python scripts/update_readme.py"
