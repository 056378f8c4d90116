import torch

from titan_quant.device import nvidia_capability


def test_capability_is_nvidias_only(monkeypatch):
    assert nvidia_capability("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert nvidia_capability("cuda") == (9, 4)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD: an MI300X says 9.4
    assert nvidia_capability("cuda") is None
