"""plan_check.py: the plan beside three counts of a real step."""
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "benchmark" / "plan_check.py"


def test_at_the_smallest_size_the_plan_is_within_10_percent_of_what_python_and_the_system_count():
    done = subprocess.run([sys.executable, str(PROGRAM), "--sizes", "d64"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("d64")]
    assert [row[1] for row in rows] == ["LoRA", "full"] and "every plan of a step is within 10%" in done.stdout
    for row in rows:
        plan, python = float(row[3]), float(row[4])
        assert abs(plan / python - 1) < 0.1 and plan < python     # Python counts its own objects as well
