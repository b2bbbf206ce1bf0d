"""Causal models: what a token gives depends on itself and those before it alone. A new row is tested by being there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from helpers import SPECS, randomise, relative
from zoo.channels import CHANNELS
from zoo.layer import Context, Order
from zoo.mixers import MIXERS, scored
from zoo.mixers.attention import Softmax
from zoo.positions import POSITIONS
from zoo.spec import check, parse

MORE = ("topk(k=3)", "conv_projection(kernels=(2, 4), of='qk')", "relational(symmetric=True)", "mla(rotary=8)")
MORE += ("blend(of=('softmax', 'power(power=4)'), weights='learned')", "blend(of=('tra', 'shaw'))")
SIZES: dict[str, Any] = {"image": 32, "patch": 8, "dim": 32, "depth": 2, "heads": 2, "classes": 3}
PREFIX: dict[str, Any] = {"class_token": True, "pool": "token", "registers": 1}


def of_row(what: str, spec: str) -> Any:
    return getattr(MIXERS[parse(spec)[0]], f"{what}_of")(**check(MIXERS, spec))


ON_IMAGES = [spec for spec in dict.fromkeys([*MIXERS, *SPECS, *MORE]) if 2 in of_row("dimensions", spec)]
ORDERED = [spec for spec in ON_IMAGES if "order" in of_row("reads", spec)]
ONLY_CAUSAL = [spec for spec in ON_IMAGES if of_row("causal", spec)]
PUBLISHED = ("causal", "causal(until=0.0)")  # later tokens still count in their softmax


def test_rows_that_keep_the_order_are_not_lost():
    assert {"softmax", "differential", "mla", "shaw", "moh", "shared_scores", "gqa", "kv_shift", "rela"} <= {*ORDERED}
    assert {"causal", "selective", "tra", "cope(positions=4, causal=True)"} <= {*ONLY_CAUSAL} <= {*ORDERED}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["grid", "prefix"])
@pytest.mark.parametrize("spec", [spec for spec in ORDERED if spec not in PUBLISHED])
def test_no_token_depends_on_later_ones(spec, prefix, training, monkeypatch):
    """Nor on prefix tokens, which see all. In inference three queries at a time, at most, see the keys."""
    monkeypatch.setattr(scored, "LEAST_ROWS", 3)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)
    position = "rope" if "rotary" in of_row("reads", spec) else "none"
    model = zoo.create_model("vit_micro", **SIZES, **prefix, causal=True, mixer=spec, position=position)
    model: Any = randomise(model).double().train(training)
    zoo.advance(model, 1.0)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    changed = images.clone()
    changed[..., 8:16, 16:24] += 1.0  # the patch in row 1 and column 2
    outputs = []
    for each in (images, changed):
        torch.manual_seed(1)  # for heads that training masks
        with torch.set_grad_enabled(training):
            x, context = model.embed(each, None)
            outputs.append(model.run(model.blocks, x, context))
    apart = (outputs[0] - outputs[1]).abs().amax((0, 2))
    place = context.prefix + 6
    assert bool((apart[context.prefix : place] < 1e-12).all())
    assert bool((apart[place + 1 :] > 1e-6).any())
    assert not prefix or bool((apart[: context.prefix] > 1e-6).any())


def test_without_prefix_tokens_it_is_the_causal_mask_of_pytorch():
    layer: Any = randomise(Softmax(32, 2)).double()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    q, k, v = (part.transpose(1, 2) for part in layer.project(x, Context(grid=(3, 4))))
    wanted = layer.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    assert relative(layer(x, Context(grid=(3, 4), order=Order())), wanted) < 1e-12


@pytest.mark.parametrize("spec", [spec for spec in ON_IMAGES if spec not in ORDERED and MIXERS[parse(spec)[0]].mixes])
def test_rows_that_do_not_keep_the_order_are_refused(spec):
    with pytest.raises(ValueError, match=r"^mixer '.*' does not read order, which causal=True sets"):
        zoo.create_model("vit_micro", **SIZES, causal=True, mixer=spec, position="none")


@pytest.mark.parametrize("spec", ONLY_CAUSAL)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_micro", {}),
        ("conformer_ctc_s", {}),
        ("conformer_ctc_s", {"subsampling": "depthwise4(channels=8, padding='causal')", "chunk": 1, "left": 8}),
        ("dit_micro", {}),
    ],
    ids=["vit", "conformer", "streaming", "dit"],
)
def test_causal_rows_are_refused_where_tokens_see_later_ones(spec, name, fields):
    with pytest.raises(ValueError, match=r"^mixer '.*' (needs a causal model; set causal=True|does not read visible)"):
        zoo.create_model(name, **fields, mixer=spec, position="none")


OTHERS = [("channel", name) for name in CHANNELS if name != "none"]
OTHERS += [("position", name) for name, row in POSITIONS.items() if row.mixes]


@pytest.mark.parametrize(("field", "name"), OTHERS, ids=lambda each: each)
def test_other_choices_that_mix_tokens_are_refused_in_causal_models(field, name):
    with pytest.raises(ValueError, match=f"^{field} '{name}' does not read order, which causal=True sets"):
        zoo.create_model("vit_micro", **SIZES, causal=True, **{field: name})
