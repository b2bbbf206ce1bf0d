"""Errors are counted over all ranks, one of which may have no utterance."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo.tasks.transcribe.train import Spoken

SHARES = [([5], []), ([], [5, 6]), ([5], [6, 7]), ([], [])]  # the speakers of each rank


def count(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for shares in SHARES:
        spoken = Spoken()
        for speaker in shares[rank]:
            spoken.update(torch.tensor([[speaker, 1, 2, 3, 4]]))
        spoken.update(torch.zeros(0, 5, dtype=torch.int64))
        found = spoken.compute()
        assert found.dtype == torch.int64 and found.shape == (len(shares[0] + shares[1]), 5)
        assert found[:, 0].tolist() == shares[0] + shares[1]
    dist.destroy_process_group()


@pytest.mark.slow
def test_rows_of_all_ranks(tmp_path: Path):
    mp.spawn(count, (str(tmp_path / "meeting"),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
