import pytest
import torch

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
