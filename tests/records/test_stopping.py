"""The stop flag: SIGTERM, Ctrl-C once and twice, other threads, and that handlers are put back."""

import os
import signal
import threading

import pytest

from stairstep.records import StopFlag


def test_sigterm_raises_the_flag_and_handlers_come_back():
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM", "who asked first"
    assert {one: signal.getsignal(one) for one in before} == before
    assert stop, "the flag stays up after the block"


def test_the_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and stop.reason == "SIGINT"
        assert "Ctrl-C once more stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_off_the_main_thread_nothing_is_installed_and_the_flag_works():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopFlag() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) == before)
            stop.set("the controller")
            stop.set("another")
            seen.append((bool(stop), stop.reason))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, (True, "the controller")]


def test_it_nests():
    with StopFlag() as outer:
        with StopFlag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner and not outer
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer
