"""Every mixer that reads chunks: a stream gives what the whole recording gives. A new row is tested by being there."""

import pytest
import torch

from helpers import SPECS, randomise, relative
from zoo import create_model
from zoo.mixers import MIXERS, scored
from zoo.spec import check, parse

MORE = ("topk(k=3)", "nap", "conv_projection(kernels=(2, 4), of='qk')", "relational(symmetric=True)", "mla(rotary=8)")
MORE += ("irpe(method='euclidean', on='qk', ratio=1.2)", "shared_scores(every=2, first=1, residual=True)")
MORE += ("blend(of=('softmax', 'power(power=4)'), weights='learned')", "moa(experts=4, top=2)")


def reads(spec: str) -> frozenset[str]:
    return MIXERS[parse(spec)[0]].reads_of(**check(MIXERS, spec))


STREAMED = [spec for spec in dict.fromkeys([*MIXERS, *SPECS, *MORE]) if "visible" in reads(spec)]


def test_rows_that_have_a_chunk_form_are_not_lost():
    assert {"softmax", "relative", "differential", "mla", "shaw", "moh", "shared_scores", "gqa"} <= {*STREAMED}


REFUSED = [name for name, row in MIXERS.items() if name not in STREAMED and 1 in row.dimensions and not row.causal]


@pytest.mark.parametrize("spec", REFUSED)
def test_rows_without_a_chunk_form_are_refused(spec):
    with pytest.raises(ValueError, match=rf"^mixer '{spec}' .*chunk"):
        create_model("conformer_ctc_s", mixer=spec, position="none", dim=32, depth=1, heads=4, chunk=4, left=8)


@pytest.mark.parametrize("left", [8, 0])
@pytest.mark.parametrize("spec", STREAMED)
def test_a_stream_is_the_whole_recording(spec, left, monkeypatch):
    compare(spec, "rope" if "rotary" in reads(spec) else "none", left, monkeypatch)


@pytest.mark.parametrize("spec", [spec for spec in STREAMED if "bias" in reads(spec)])
def test_a_stream_with_distances_is_the_whole_recording(spec, monkeypatch):
    compare(spec, "alibi", 8, monkeypatch)


def compare(spec: str, position: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries at a time, at most, see the keys."""
    monkeypatch.setattr(scored, "LEAST_ROWS", 3)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)
    choices = {"dim": 32, "depth": 3, "heads": 4, "vocabulary": 5, "mels": 16, "conv_norm": "layernorm", "mixer": spec}
    choices |= {"position": position, "chunk": 4, "left": left}
    model = create_model("conformer_ctc_s", subsampling="depthwise4(channels=8, padding='causal')", **choices)
    randomise(model).eval()
    features = torch.randn(1, 99, 16)
    with torch.inference_mode():
        whole, _ = model(features, torch.tensor([99]))
        stream = model.stream()
        parts = [stream.push(part) for part in features.split(16, 1)] + [stream.finish()]
    assert relative(torch.cat(parts, 1), whole) < 1e-5
