"""Training with compiled blocks on inputs of several sizes, against plain blocks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import zoo
from helpers import randomise, relative
from zoo.block import Block
from zoo.models.base import compile_blocks

pytestmark = [
    pytest.mark.all,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # which PyTorch asks for
]


def gradients(model: Any, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    outputs = model(*inputs)
    scores = outputs[0] if isinstance(outputs, tuple) else outputs
    (scores * torch.linspace(-1, 1, scores.shape[-1])).square().mean().backward()
    return [part.grad for part in model.parameters() if part.grad is not None]


def compiled_and_plain(model: Any, *sizes: tuple[Tensor, ...]) -> int:
    """The number of compilations for these inputs; gradients are compared with those of plain blocks."""
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled, torch.device("cpu"))
    for inputs in sizes:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            found = gradients(compiled, *inputs)
        for got, wanted in zip(found, gradients(model, *inputs), strict=True):
            assert relative(got, wanted) < 1e-3 or (got - wanted).abs().max() < 1e-6
    return counters["frames"]["ok"]


def test_speech_is_compiled_once_more_for_all_other_lengths():
    model = zoo.create_model("conformer_ctc_s", depth=1, dim=32, heads=2, mels=16, vocabulary=9, dropout=0.0)
    clips = [(torch.randn(3, frames, 16), torch.tensor([frames, frames - 3, frames // 2])) for frames in (90, 131, 203)]
    assert compiled_and_plain(randomise(model).train(), *clips) == 2


def test_stages_of_convolutions_are_compiled():
    model = zoo.create_model("convformer_s18", depth=(1, 1, 1, 1), dim=(16, 24, 32, 48), heads=(1, 1, 1, 1), classes=3)
    images = [(torch.randn(2, 3, side, side),) for side in (64, 96)]
    assert compiled_and_plain(randomise(model).train(), *images) <= 2 * 4  # at most two programs a stage


def test_blocks_between_which_time_is_halved_share_their_programs():
    model = zoo.create_model("squeezeformer_xs", depth=4, dim=16, heads=2, mels=16, vocabulary=9).train()
    counter = CompileCounter()
    torch._dynamo.reset()
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=counter)
    for frames in (90, 131, 203):
        model(torch.randn(2, frames, 16), torch.tensor([frames, frames // 2]))
    assert counter.frame_count == 2  # for the first sizes and for all others
