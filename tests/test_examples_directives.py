"""examples/memory_checkpoint.py does what it says.

Method: the example itself, made short, in an interpreter of its own; what it prints is compared with what it promises.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_goes_back_from_a_spike_and_tests_learning_rates_without_a_trace():
    command = [sys.executable, "examples/memory_checkpoint.py", "--batches", "160", "--levels", "30"]
    environment = {key: value for key, value in os.environ.items() if key != "FLYBALL_SERVER"}
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    spiked, tested = re.split(r"^tested-", done.stdout, flags=re.MULTILINE)
    assert "for 160 batches, 3 losses that were no numbers" in spiked
    assert re.search(r"asked for restore \(done\): back from step 84 to step 75; 30 batches are skipped", spiked)
    assert "asked for checkpoint (done): step 2 'range_test-0'" in tested
    assert "Range test over, and the job is back where it began. Suggested is" in tested
    assert "0 losses that were no numbers" in tested
