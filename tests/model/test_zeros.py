import pytest
import torch
from torch import nn

from moss_rlhf.errors import MossError
from moss_rlhf.model.zeros import Zeros


def test_zeros_are_put_back_and_the_rest_is_left_alone():
    weight = nn.Parameter(torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))
    zeros = Zeros.of([weight])
    with torch.no_grad():
        weight += 0.5
    with pytest.raises(MossError, match="came alive"):
        zeros.verify()
    zeros.restore()
    zeros.verify()
    assert weight.tolist() == [[0.0, 1.5], [-1.5, 0.0]]


def test_a_weight_that_becomes_zero_by_itself_may_live_again():
    weight = nn.Parameter(torch.tensor([1.0, 0.0]))
    zeros = Zeros.of([weight])
    with torch.no_grad():
        weight.zero_()
    zeros.verify()
    with torch.no_grad():
        weight[0] = 3
    zeros.verify()
