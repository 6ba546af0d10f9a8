"""The comparison with transformers, which is not installed with TSQP itself."""

import sys

import pytest
import torch

from tsqp.bench.baseline import Transformers
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import UsageError


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"install tsqp\[bench\], or choose other modes"):
        Transformers(open_checkpoint("random:tiny"), torch.float32)
