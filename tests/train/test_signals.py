import os
import signal
import sys
import time

import pytest

from r2kit.errors import Interrupted
from r2kit.train.signals import StopSignals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143), ("SIGUSR2", 143)])
def test_outside_training_a_signal_stops_at_once(name, code):
    with StopSignals(), pytest.raises(Interrupted, match=f"stopped by {name}: nothing was saved now") as caught:
        signal.raise_signal(getattr(signal, name))
    assert caught.value.exit_code == code


def test_in_training_the_first_is_noted_and_the_second_stops_at_once(capsys):
    with StopSignals() as signals:
        signals.training = True
        signal.raise_signal(signal.SIGINT)
        assert signals.noted == signal.SIGINT
        assert "Ctrl-C again stops at once" in capsys.readouterr().out
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130


def test_a_stop_that_python_loses_comes_again(monkeypatch):
    monkeypatch.setattr("r2kit.train.signals.AGAIN", 0.05)

    class Loses:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)  # an exception in here is only printed

    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
    with StopSignals():
        Loses()
        with pytest.raises(Interrupted):
            time.sleep(5)
    time.sleep(0.1)  # and not once more when it has arrived


def test_an_error_in_front_of_a_stop_that_python_lost_gives_way_to_it(monkeypatch):
    class Loses:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def load():
        Loses()
        raise RuntimeError("a loader process has ended")

    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught, StopSignals():
        load()
    assert str(caught.value.__cause__) == "a loader process has ended"
    with pytest.raises(RuntimeError, match="nobody asked"), StopSignals():
        raise RuntimeError("nobody asked to stop")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", 0)])
def test_a_process_forked_in_between_leaves_ctrl_c_to_the_first_and_ends_at_other_signals(name, status):
    with StopSignals() as signals:
        signals.training = True
        child = os.fork()
        if child == 0:
            signal.raise_signal(getattr(signal, name))
            os._exit(0)
        _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == status
    assert signals.noted is None


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a library may do
        signals.take_back()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
