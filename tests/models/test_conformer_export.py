"""Speech encoders under the exporters and the compiler: clips of any length."""

import copy
import functools
import warnings

import onnxruntime
import pytest
import torch

from helpers import relative
from speech_cases import LAYOUTS, real_mask, tiny


@functools.cache
def exported(name: str) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    model = tiny(name, depth=2)
    sizes = {"features": {1: torch.export.Dim.AUTO}, "lengths": None}
    return model, torch.export.export(model, (torch.randn(2, 100, 20), torch.tensor([100, 61])), dynamic_shapes=sizes)


@pytest.mark.all
@pytest.mark.parametrize("name", LAYOUTS)
def test_export_takes_clips_of_any_length(name):
    model, program = exported(name)
    for frames in (9, 33, 34, 35, 36, 157, 400):  # odd and even numbers of tokens at either rate
        batch, lengths = torch.randn(2, frames, 20), torch.tensor([frames // 2, frames])
        (got, real), (wanted, same) = program.module()(batch, lengths), model(batch, lengths)
        assert torch.equal(real, same) and got.shape == wanted.shape
        mask = real_mask(wanted, real)
        assert relative(got[mask], wanted[mask]) < 1e-5


@pytest.mark.daily(5)
@pytest.mark.parametrize(
    "mixer", ["relative", "power", "relative(window=8)", "local(window=8)", "local(window=8, tokens=3)"]
)
def test_attention_exports_at_any_length(mixer):
    """A program sees all queries at once, and is not fixed to the number of those that it was traced with."""
    model = tiny("conformer_ctc_s", depth=1, mixer=mixer, position="none")
    arguments = torch.randn(2, 100, 20), torch.tensor([100, 61])
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=({1: torch.export.Dim.AUTO}, None)).module()
        for frames in (33, 61, 65, 157, 800):  # 9, 16, 17, 40 and 200 tokens
            batch, lengths = torch.randn(2, frames, 20), torch.tensor([frames // 2, frames])
            (got, real), (wanted, _) = program(batch, lengths), model(batch, lengths)
            mask = real_mask(wanted, real)
            assert relative(got[mask], wanted[mask]) < 1e-5


@pytest.mark.all
@pytest.mark.parametrize(
    "name", [name if name == "squeezeformer_xs" else pytest.param(name, marks=pytest.mark.all) for name in LAYOUTS]
)
def test_onnxruntime_gives_the_same_at_any_length(name):
    model, program = exported(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    for frames in (34, 157):
        batch, lengths = torch.randn(2, frames, 20), torch.tensor([frames // 2, frames])
        got, real = map(
            torch.from_numpy, session.run(None, dict(zip(names, (batch.numpy(), lengths.numpy()), strict=True)))
        )
        wanted, same = model(batch, lengths)
        assert torch.equal(real, same)
        mask = real_mask(wanted, real)
        assert (got[mask] - wanted[mask]).abs().max() < 1e-4


@pytest.mark.all
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_encoders_compile_whole(name, training):
    torch.compiler.reset()  # recompilations are counted over all models of the process
    model = tiny(name, depth=2, norm="prepbn").train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for frames in (60, 83, 97, 130):
        batch, lengths = torch.randn(2, frames, 20), torch.tensor([frames, 41])
        (got, real), (wanted, same) = compiled(batch, lengths), model(batch, lengths)
        mask = real_mask(wanted, real)
        assert torch.equal(real, same) and relative(got[mask], wanted[mask]) < 1e-4
