"""A process whose event loop hangs ends, and says where it hung; one that is only stopped or slow does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

PROGRAM = """
import asyncio, logging, sys, time
from serve_app import watchdog

watchdog.TICK_S, watchdog.MOST_MISSED = 0.05, 20
logging.basicConfig()

def hang_here():
    time.sleep(60)

async def main():
    running = asyncio.create_task(watchdog.Watchdog().run())
    await asyncio.sleep(0.3)
    print("begun", flush=True)
    if sys.argv[1] == "hangs":
        hang_here()
    for _ in range(10):
        time.sleep(0.2)  # slow, but it comes round
        await asyncio.sleep(0)
    print("done", flush=True)

asyncio.run(main())
time.sleep(2)  # without the loop, as nothing of it is left to hang
"""


def start(how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_loop_that_hangs_is_the_end_of_its_process_which_says_where() -> None:
    process = start("hangs")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the event loop hangs" in told
    assert "hang_here" in told


def test_one_that_is_slow_or_was_stopped_for_a_while_goes_on() -> None:
    process = start("is slow")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (0, "done\n")
