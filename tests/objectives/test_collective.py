"""The collective of one, the buckets of a sum, and the choice of device; real groups are in test_gradcache_ranks."""

import pytest
import torch

from stairstep.objectives import Alone
from stairstep.objectives.collective import _buckets, _served_devices


def test_alone_gives_back_what_it_is_given():
    alone, rows = Alone(), torch.randn(3, 2, requires_grad=True)
    gathered = alone.gather_rows(rows, [3])
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    tensor = torch.ones(2)
    alone.sum_([tensor])
    alone.barrier()
    assert tensor.tolist() == [1, 1]
    assert (alone.any(True), alone.any(False), alone.rank, alone.size) == (True, False, 0, 1)
    with pytest.raises(ValueError, match=r"worker 0 gave rows of shape \(3, 2\) where \[2, d\] was agreed"):
        alone.gather_rows(rows, [2])


def test_buckets_keep_the_order_and_split_by_type_and_size():
    mib = [torch.empty(2**18) for _ in range(70)]
    double, heavy = torch.empty(3, dtype=torch.float64), torch.empty(2**24)
    given = [*mib, double, heavy, torch.empty(1)]
    found = list(_buckets(given))
    assert [len(one) for one in found] == [32, 32, 6, 1, 1, 1]
    assert [id(one) for bucket in found for one in bucket] == [id(one) for one in given]
    assert list(_buckets([])) == []


def test_gloo_serves_the_cpu_and_nccl_the_gpu():
    assert _served_devices("cpu:gloo,cuda:gloo") == ("cpu",)
    assert _served_devices("cuda:nccl") == ("cuda",)
    assert _served_devices("cpu:gloo,cuda:nccl") == ("cpu", "cuda")
