import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

import r2kit
from r2kit.errors import RunError
from r2kit.train.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from r2kit.train.lock import hold
import os
with hold(Path(sys.argv[1])):
    child = os.fork()  # a loader process, which outlives it
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def live(tmp_path):
    """A live process that holds a folder."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        yield folder, process
        for pid in (child, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_folder_in_use_is_refused_until_its_run_ends_however_it_ends(live):
    folder, process = live
    with (
        pytest.raises(RunError, match=rf"in use by a live run \(process {process.pid} on \S+, since \d") as caught,
        hold(folder),
    ):
        pass
    assert len(str(caught.value).splitlines()) == 1
    process.kill()
    process.wait()
    with hold(folder):  # the child of the killed process lives on, and does not hold it
        assert (folder / ".lock").exists()
    assert not (folder / ".lock").exists()


def test_no_command_that_trains_touches_a_live_run(live, finished_run, quick_recipe):
    import shutil

    folder, _ = live
    shutil.copytree(finished_run.path, folder, dirs_exist_ok=True)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match="in use by a live run"):
            r2kit.finetune(quick_recipe, out=folder, quiet=True, **options)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match="cannot be written: Not a directory; give another --out"),
        hold(tmp_path / "file" / "run"),
    ):
        pass
