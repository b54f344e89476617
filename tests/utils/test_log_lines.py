"""Progress bars in a log file become occasional lines."""

import io
import sys

from tqdm.auto import tqdm

from coral_hf.utils.log_lines import LineStream, log_lines


def test_a_bar_leaves_its_last_state_and_those_that_were_due():
    for seconds, expected in ((3600.0, 1), (0.0, 6)):
        stream = io.StringIO()
        lines = LineStream(stream, seconds)
        for _ in tqdm(range(5), file=lines, mininterval=0, miniters=1, ncols=60):
            pass
        lines.finish()
        written = stream.getvalue()
        assert "\r" not in written and written.endswith("\n")
        assert len(written.splitlines()) >= expected and "5/5" in written.splitlines()[-1]
        assert seconds == 0.0 or len(written.splitlines()) == 1


def test_ordinary_text_is_left_as_it_is():
    stream = io.StringIO()
    lines = LineStream(stream)
    for text in ("one\n", "two ", "three\nfour\n", "no end"):
        lines.write(text)
    lines.finish()
    assert stream.getvalue() == "one\ntwo three\nfour\nno end\n"


def test_a_terminal_is_left_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, changed in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with log_lines():
            assert (sys.stderr is not stream) is changed
        assert sys.stderr is stream
