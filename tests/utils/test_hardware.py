"""The description of a machine, if torch's build does not match the machine."""

import torch

from coral_hf.commands.loading import resolve_device
from coral_hf.utils.hardware import default_device, native_bfloat16, synchronized_clock


def test_a_cuda_build_without_a_gpu(monkeypatch):
    """Plain `pip install torch` on Linux: the build names an accelerator that is not there."""

    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert default_device() == resolve_device(None) == torch.device("cpu")
    assert native_bfloat16() == native_bfloat16("cpu")


def test_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    assert default_device() == torch.device("xpu") and native_bfloat16()


def test_the_clock_waits_for_every_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = {torch.device(name) for name in ("cpu", "cuda:0", "xpu:1")}
    assert synchronized_clock(devices) <= synchronized_clock([])
    assert set(waited) == {torch.device("cuda:0"), torch.device("xpu:1")} and len(waited) == 2
