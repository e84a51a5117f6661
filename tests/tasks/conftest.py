import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices are faster on one thread than on two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
