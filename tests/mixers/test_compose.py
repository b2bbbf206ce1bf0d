"""Mixers side by side against the mixers one by one, and shared attention weights against attention written out."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from helpers import position, randomise, relative
from zoo import create_model, fuse
from zoo.layer import Carry, Context, Place
from zoo.mixers import MIXERS
from zoo.mixers.compose import Blend, SharedScores
from zoo.models.base import noting
from zoo.spec import make

# Blend


@pytest.mark.parametrize("weights", ["sum", "learned", "input"])
def test_blend_is_its_mixers_weighted(weights):
    of = ("softmax(kv_heads=2)", "pool(size=5)", "sla")
    ours: Any = scattered(make(MIXERS, f"blend(of={of}, weights='{weights}')", DIM, HEADS, Place(2)))
    context = GRID._replace(mask=REAL)
    x = tokens(context)
    parts = [mixer(x, context) for mixer in ours.mixers]
    assert [type(mixer) for mixer in ours.mixers] == [MIXERS["softmax"], MIXERS["pool"], MIXERS["sla"]]
    assert ours.mixers[0].kv_heads == 2 and ours.mixers[1].size == 5
    shares = torch.ones(3, 3, dtype=torch.float64)  # of the mixers for each sample
    if weights == "learned":
        shares = (ours.shares.exp() / ours.shares.exp().sum())[:, None].expand(-1, 3)
    if weights == "input":
        mean = torch.stack([sample[real].mean(0) for sample, real in zip(x, REAL, strict=True)])
        hidden = (mean @ ours.squeeze.weight.T + ours.squeeze.bias).clamp(min=0)
        shares = (hidden @ ours.gate.weight.T + ours.gate.bias).softmax(-1).T
    weighted = [share[:, None, None] * part for share, part in zip(shares, parts, strict=True)]
    wanted = torch.stack(weighted).sum(0)
    check(ours(x, context)[REAL], wanted[REAL], (x,))


def test_learned_weights_start_equal():
    ours: Any = make(MIXERS, "blend(of=('softmax', 'sla', 'pool'), weights='learned')", DIM, HEADS)
    assert torch.equal(ours.shares.softmax(0), torch.full((3,), 1 / 3))


QUADRATIC = (("power", "softmax"), ("selective", "softmax"))  # and whether memory grows so, as with one of its mixers


def test_a_blend_reads_what_all_its_mixers_read():
    assert Blend.reads == Blend.reads_of() == MIXERS["softmax"].reads & MIXERS["sepconv"].reads
    both = Blend.reads_of(of=("softmax", "power"))
    assert both == MIXERS["softmax"].reads and {"rotary", "visible", "prefix", "code"} <= both
    assert "rotary" not in Blend.reads_of(of=("softmax", "shaw"))
    assert Blend.reads_of(of=("softmax", "power"), weights="input") == both - {"visible", "order"}
    assert Blend.dimensions_of(of=("softmax", "relative")) == (1,) and Blend.dimensions_of() == (1, 2)
    assert [make(MIXERS, f"blend(of={of})", DIM, HEADS).quadratic for of in QUADRATIC] == [False, True]
    assert Blend.head_width_of(48, 4, of=("softmax(head_dim=6)", "softmax(head_dim=6, kv_heads=1)")) == 6


REFUSED = {
    "blend(of='softmax')": "blend: of must be a tuple of two mixers or more, got 'softmax'",
    "blend(of=('softmax',))": "blend: of must be a tuple of two mixers or more, got ('softmax',)",
    "blend(of=('softmax', 'slo'))": "blend: of 'slo': unknown name 'slo'; did you mean sla?",
    "blend(of=('pool(side=3)', 'sla'))": "blend: of 'pool(side=3)': unknown option of pool 'side'; did you mean size?",
    "blend(of=('pool(size=4)', 'sla'))": "of 'pool(size=4)': pool: size must be odd, got 4",
    "blend(of=('sla', 'blend'))": "blend: of 'blend': it cannot be part of a blend; choose another mixer",
    "blend(of=('sla', 'shared_scores'))": "blend: of 'shared_scores': it cannot be part of a blend",
    "blend(of=('sla', 3))": "option of of 'blend' must be a value like 'softmax', or a tuple of them, got 3",
    "blend(of=('sla', 'relative'))": "blend: its mixers do not all work on images",
    "blend(weights='none')": "unknown weights 'none'; choose from: sum, learned, input",
    "blend(of=('softmax(head_dim=8)', 'softmax'))": "blend: rotary positions need heads of one width, its mixers have "
    "8, 16",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_wrong_blends(spec):
    with pytest.raises(ValueError) as caught:
        make(MIXERS, spec, 32, 2)
    assert str(caught.value).startswith(REFUSED[spec])


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"mixer": "blend(of=('softmax', 'relative'))"}, r"mixer 'blend\(.*' works along time only"),
        ({"mixer": "blend", "class_token": True, "pool": "token"}, "mixer 'blend' does not read prefix"),
        ({"mixer": "blend(of=('softmax', 'shaw'))", "position": "rope"}, "mixer 'blend.*does not read rotary"),
        ({"mixer": "blend(of=('softmax', 'sla'))", "placement": "sub"}, "placement 'sub' needs the site 'inner'"),
    ],
)
def test_a_model_refuses_what_a_blend_ignores(choices, words):
    with pytest.raises(ValueError, match=words):
        create_model("vit_micro", **choices)


# Shared weights


def vit(spec: str, depth: int = 4, **choices: Any) -> Any:
    return randomise(create_model("vit_micro", mixer=spec, dim=32, depth=depth, heads=2, classes=3, **choices)).double()


def attended(model: Any, images: torch.Tensor, computing: list[int], residual: bool) -> torch.Tensor:
    """The model's logits, its attention written out."""
    x, context = model.embed(images, None)
    weights = previous = None
    for index, block in enumerate(model.blocks):
        mixer, ffn = block.steps
        y = mixer.before(x, context)
        layer = mixer.branch
        width = layer.qkv.weight.shape[0]
        assert width == (96 if index in computing else 32)
        parts = layer.qkv(y).unflatten(-1, (width // 32, 2, 16)).permute(2, 0, 3, 1, 4)
        if index in computing:
            scores = parts[0] @ parts[1].mT / math.sqrt(16)
            if residual and previous is not None:
                scores = scores + previous
            previous, weights = scores, scores.softmax(-1)
        assert weights is not None
        x = x + layer.out((weights @ parts[-1]).transpose(1, 2).flatten(2))
        x = ffn(x, context)
    return model.head(model.pool(x, context)[:, 0])


PATTERNS = {
    "shared_scores": [0, 2],
    "shared_scores(every=3)": [0, 3],
    "shared_scores(every=2, first=1)": [0, 1, 3],
    "shared_scores(every=4, first=2)": [0, 1, 2],
    "shared_scores(every=2, residual=True)": [0, 2],
    "shared_scores(every=1, residual=True)": [0, 1, 2, 3],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spec", PATTERNS)
def test_blocks_reuse_the_weights_of_the_last_that_computed_some(spec, checkpointing):
    model = vit(spec).train()
    model.checkpointing = checkpointing
    images = torch.randn(2, 3, 32, 32, dtype=torch.double, requires_grad=True)
    leaves = (images, model.blocks[0].steps[0].branch.qkv.weight, model.blocks[0].steps[0].before.weight)
    got = model(images)
    seed = torch.randn_like(got)
    wanted = attended(model, images, PATTERNS[spec], "residual" in spec)
    ours, theirs = (torch.autograd.grad((each * seed).sum(), leaves) for each in (got, wanted))
    for mine, other in ((got, wanted), *zip(ours, theirs, strict=True)):
        assert relative(mine, other) < 1e-10


@pytest.mark.parametrize("spec", ["shared_scores(every=3)", "shared_scores(residual=True)"])
def test_features_and_notes_share_weights_too(spec):
    model = vit(spec).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad(), noting(model) as notes:
        logits = model(images)
        features = model.features(images)[-1]
    assert relative(features.flatten(2).transpose(1, 2), last_tokens(model, images)) < 1e-12
    weights = [notes[f"blocks.{index}.steps.0.branch.weights"] for index in range(4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[3])
    assert relative(logits, attended(model, images, PATTERNS.get(spec, [0, 2]), "residual" in spec)) < 1e-10


def last_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    x, context = model.embed(images, None)
    return model.run(model.blocks, x, context)


def test_padding_and_positions_do_not_change_what_is_shared():
    """A model of two blocks, the second of which reuses: a sample beside a larger one, with rotary positions."""
    model = vit("shared_scores", depth=2, position="rope", class_token=True, pool="token").eval()
    small, large = (torch.randn(1, 3, side, side, dtype=torch.double) for side in (32, 48))
    batch, mask = torch.zeros(2, 3, 48, 48, dtype=torch.double), torch.zeros(2, 48, 48, dtype=torch.bool)
    batch[:1, :, :32, :32], mask[:1, :32, :32] = small, True
    batch[1:], mask[1:] = large, True
    with torch.no_grad():
        assert relative(model(batch, mask)[:1], model(small)) < 1e-6  # rotary positions are fp32


@pytest.mark.parametrize(("spec", "computes"), [("shared_scores", True), ("shared_scores(first=1)", False)])
def test_blocks_that_reuse_weights_keep_no_keys_of_a_stream(spec, computes):
    choices = {"dim": 32, "depth": 3, "heads": 2, "vocabulary": 5, "mels": 16, "conv_norm": "layernorm"}
    choices |= {"mixer": spec, "position": "none", "chunk": 4, "left": 8}
    model: Any = create_model("conformer_ctc_s", subsampling="depthwise4(channels=8, padding='causal')", **choices)
    slots = [name.rpartition(".")[2] for name in model.state(1) if "blocks.2." in name and "branch" in name]
    assert "value" in slots and ("key" in slots) == computes


def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64)


SPEECH = {"dim": 32, "heads": 2, "vocabulary": 5, "mels": 16, "position": "none"}
DIFFUSION = {"image": 8, "channels": 3, "classes": 5}
FAMILIES = {
    "vit_micro": ({}, lambda: (images(),)),
    "pvt_sla_tiny": ({"dim": (16, 32), "depth": (2, 2), "heads": (1, 2), "ffn": "mlp"}, lambda: (images(),)),
    "conformer_s": (SPEECH | {"depth": 2}, lambda: (torch.randn(1, 60, 16), torch.tensor([60]))),
    "squeezeformer_s": (SPEECH | {"depth": 8}, lambda: (torch.randn(1, 60, 16), torch.tensor([60]))),
    "detr_r50": ({"dim": 32, "depth": 2, "encoder_depth": 2, "heads": 2, "queries": 9}, lambda: (images(),)),
    "rtdetr_micro": ({"decoder_mixer": "shared_scores"}, lambda: (images(),)),
    "dit_micro": ({"depth": 4, "class_block": 1, "class_tokens": 1}, lambda: (torch.randn(1, 1, 8, 8), torch.rand(1))),
    "dimr_xl_2r": (
        DIFFUSION | {"dim": (32, 16), "depth": (5, 3), "heads": (2, 2)},
        lambda: (torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1])),
    ),
    "dico_micro": ({}, lambda: (torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([1]))),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_carries_weights(family):
    choices, inputs = FAMILIES[family]
    model = create_model(family, mixer="shared_scores", **choices).eval()
    reusing = [layer for layer in model.modules() if isinstance(layer, SharedScores) and not layer.computes]
    assert reusing, "some block reuses weights, and raises an error if it finds none"
    with torch.no_grad():
        model(*inputs())


@pytest.mark.daily(2)
def test_fused_and_compiled_models_share_weights():
    model = vit("shared_scores", norm="repbn").eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        assert relative(fuse(model)(images), model(images)) < 1e-12
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run, each in ((compiled, model), (plain, plain)):
        y = run(images)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in each.parameters())])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 1e-10 * max(1.0, wanted.abs().max())


def computing(model: Any) -> list[bool]:
    return [layer.computes for layer in model.modules() if isinstance(layer, SharedScores)]


def test_blocks_are_counted_where_they_see_the_same_tokens():
    """Where tokens change, and where other mixers come between, so that every block finds weights to reuse."""
    turns = create_model("vit_micro", mixer=("softmax", "shared_scores"), dim=32, depth=8, heads=2, classes=3)
    assert computing(turns) == [True, False, True, False]
    both = ("shared_scores(every=9)", "shared_scores(every=3)")
    assert computing(create_model("vit_micro", mixer=both, dim=32, depth=5, heads=2)) == [
        True,
        False,
        False,
        True,
        False,
    ]
    speech = create_model("squeezeformer_xs", mixer="shared_scores", depth=8, reduce=3, heads=2, dim=32)
    assert computing(speech) == [True, False, True, True, False, True, False, False]  # the last is at the first rate
    tokens: Any = {"depth": 4, "class_block": 1, "class_tokens": 1}
    assert computing(create_model("dit_micro", mixer="shared_scores", **tokens)) == [True, True, False, True]
    for model, inputs in ((turns, (torch.randn(1, 3, 32, 32),)), (speech, (torch.randn(1, 90, 80), None))):
        with torch.no_grad():
            model.eval()(*inputs)


def test_a_block_alone_has_nothing_to_reuse():
    layer = make(MIXERS, "shared_scores", DIM, HEADS, Place(2, index=1, order=1))
    with pytest.raises(ValueError, match="^shared_scores: no attention weights to reuse; [^\n]+$"):
        layer(torch.randn(1, 30, DIM), Context(grid=(5, 6)))


@pytest.mark.daily(2)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
@pytest.mark.parametrize("spec", ["shared_scores(every=3)", "shared_scores(every=2, residual=True)"])
def test_many_blocks_are_compiled_a_few_times(spec):
    """As training compiles them, one by one and checkpointed: the number of programs does not grow with that of blocks,
    and gradients are those of blocks that are not compiled."""
    torch._dynamo.reset()
    model = vit(spec, depth=12).train()
    plain = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        results = []
        for each in (model, plain):
            each.zero_grad()
            y = each(images)
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in each.parameters())])
        for got, wanted in zip(*results, strict=True):
            assert (got - wanted).abs().max() <= 1e-10 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_blocks_share_weights_and_report(checkpointing, tmp_path):
    """FSDP2 copies the lists and dicts that a block is given."""
    model = vit("shared_scores(residual=True)").train()
    model.checkpointing = checkpointing
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    wanted = model(images)
    wanted.square().sum().backward()
    slopes = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with noting(model) as notes:
            got = model(images)
        got.square().sum().backward()
        grads = [parameter.grad.full_tensor() for parameter in model.parameters()]
    finally:
        distributed.destroy_process_group()
    assert relative(got, wanted) < 1e-12
    assert all(relative(mine, other) < 1e-10 for mine, other in zip(grads, slopes, strict=True))
    assert sorted(notes) == [f"blocks.{index}.steps.0.branch.weights" for index in range(4)]


def test_other_tokens_find_nothing():
    """Weights are of certain tokens: those of another grid do not see them."""
    context = Context(grid=(5, 6), carry=Carry({"weights": torch.ones(1)}))
    moved = context.moved((3, 3)).carry
    assert moved is not None and not moved.values and Context(grid=(5, 6)).moved((3, 3)).carry is None
    assert position("rope", DIM, 8, (5, 6)).place(context).carry is context.carry
