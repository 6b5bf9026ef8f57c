"""The tests of `on_counted_device`, in a process of their own.

Autograd makes a queue for each device at the first backward pass of a process, so that the device has to be registered
before it; and no other test is to find a device there.
"""

import subprocess
import sys
from pathlib import Path


def test_how_often_the_host_waits_for_the_device():
    file = Path(__file__).with_name("on_counted_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "11 passed" in done.stdout or "skipped" in done.stdout, done.stdout[-2000:]
