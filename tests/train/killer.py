"""Runs `r2kit` in forked processes and ends them by signals; what a test of interruptions starts as a program.

Each line that it reads is an attempt, {"command": [...], "signal": "SIGKILL", "after": 1.5, "once": "path", "group":
true}: the command line, and, where there is a signal, the seconds after which it is sent, counted from when the path
exists, or from the start, and whether to all processes of the group. It answers with a line: the exit status, the
seconds from the signal to the end, and what was said.

The packages are imported once, by this process, which has no threads; each attempt is a fork of it and a process of its
own, so that kill -9 is kill -9 and still costs no import.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def attempt(command, number=None, after=0.0, once=None, group=False):
    with tempfile.TemporaryFile() as said:
        ready, is_ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.setsid()  # Ctrl-C goes to a group
            try:
                from r2kit.cli import main

                os.write(is_ready, b".")  # what a signal raises in the callbacks of the fork itself would be lost
                main(command)
                status = 0
            except KeyboardInterrupt:  # before the command line has come so far as to handle it
                status = 130
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        os.close(is_ready)
        os.read(ready, 1)
        os.close(ready)
        status, sent = None, None
        begin = time.monotonic() if once is None else None
        while status is None:
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            now = time.monotonic()
            if begin is None and Path(once).exists():
                begin = now
            if number is not None and sent is None and begin is not None and now - begin >= after:
                (os.killpg if group else os.kill)(pid, number)
                sent = now
            time.sleep(0.002)
        said.seek(0)
        return {
            "status": status,
            "seconds": None if sent is None else time.monotonic() - sent,
            "said": said.read().decode(errors="replace"),
        }


def main():
    import r2kit.cli
    import r2kit.train  # noqa: F401  # everything that the attempts need

    for line in sys.stdin:
        plan = json.loads(line)
        number = getattr(signal, plan["signal"]) if "signal" in plan else None
        result = attempt(plan["command"], number, plan.get("after", 0.0), plan.get("once"), plan.get("group", False))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
