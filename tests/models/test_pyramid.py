"""Hierarchical models: sizes as published, every choice trains, any picture, padding, features, folding, refusals."""

import pytest
import torch

import zoo
from helpers import BOTH_WAYS, longest_size, randomise, relative
from zoo.choices import PLACEMENTS
from zoo.fusion import fuse
from zoo.layer import Context, advance
from zoo.mixers import CONVS
from zoo.mixers.deformable import DCNv4
from zoo.models import PRESETS
from zoo.models.base import count_parameters
from zoo.models.pyramid import PyramidConfig
from zoo.norms import BatchNorm, Norm

NAMES = [name for name, config in PRESETS.items() if isinstance(config, PyramidConfig)]
TINY = {"dim": (16, 32), "depth": (2, 2), "heads": (2, 4), "image": 32, "classes": 5}
SMALL = {"dim": (16, 32, 32, 48), "depth": (2, 2, 2, 2), "heads": (2, 4, 4, 6), "image": 64, "classes": 5}
# Millions of parameters: as published (InternImage and DCNv4 give whole millions), or counted in timm 1.0.31.
SIZES = {
    "poolformer_s12": 11.92,
    "poolformer_s24": 21.39,
    "convformer_s18": 26.77,
    "caformer_s18": 26.34,
    "davit_tiny": 28.36,
    "flash_internimage_t": 30,
    "flash_internimage_s": 50,
    "pvt_sla_tiny": 10.99,
}
CHOICES = [
    *({"mixer": mixer} for mixer in [*BOTH_WAYS, "dcnv4(weights='softmax', local=3, centre=True)"]),
    *({"norm": norm} for norm in zoo.NORMS),
    *({"channel": channel} for channel in zoo.CHANNELS),
    *({"position": position} for position, row in zoo.POSITIONS.items() if "bias" not in row.writes),
    {"position": "alibi", "mixer": "softmax"},  # sla has no scores
    *({"placement": placement} for placement in PLACEMENTS),
    *({"ffn": ffn} for ffn in [*zoo.FFNS, "mlp(activation='star_relu')"]),
    *({"layout": ("conv", "mixer", "ffn"), "conv": conv} for conv in CONVS),
    *({"head": head} for head in ("linear", "linear(mean_first=True)", "mlp", "conv", "conv(norm_first=False)")),
    {"stem": "double"},
    {"stem": "conv(kernel=7, padding=3, after=False)", "reduction": "conv(kernel=3, padding=1, before=False)"},
    {"mixer": ("sla", ("window(size=3)", "channel")), "norm": ("layernorm", "prepbn")},
    {"final_norm": "batchnorm", "layer_scale": 0.1},
    {"position": ("rope", "sincos")},
]


def named(choice: dict) -> str:
    return " ".join(str(value) for value in choice.values())


def build(preset: str, choices: dict) -> torch.nn.Module:
    model = randomise(zoo.create_model(preset, **choices)).eval()
    with torch.no_grad():  # samples far apart on random maps would amplify the last digit
        for module in model.modules():
            if isinstance(module, DCNv4):
                module.sample.weight *= 0.1
    return model


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_published(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    digits = 0 if isinstance(SIZES[name], int) else 2
    assert round(count_parameters(model) / 1e6, digits) == SIZES[name]


@pytest.mark.daily(2)
@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_every_choice_trains_a_step(choice):
    images, labels = torch.randn(2, 3, 40, 36), torch.tensor([0, 3])
    model = zoo.create_model("pvt_sla_tiny", **(TINY | {"ffn": "mlp"} | choice))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert model.eval()(images).isfinite().all()


@pytest.mark.daily(2)
@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_a_picture_gives_the_same_alone_and_in_the_corner_of_a_larger_one(choice):
    model = build("pvt_sla_tiny", TINY | {"ffn": "mlp"} | choice)
    picture = torch.randn(1, 3, 23, 37)
    batch, mask = torch.randn(2, 3, 50, 44), torch.zeros(2, 50, 44, dtype=torch.bool)
    batch[0, :, :23, :37], mask[0, :23, :37], mask[1] = picture[0], True, True
    assert relative(model(batch, mask)[:1], model(picture)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_in_presets(name):
    model = build(name, SMALL)
    picture = torch.randn(1, 3, 50, 70)
    batch, mask = torch.randn(2, 3, 96, 90), torch.zeros(2, 96, 90, dtype=torch.bool)
    batch[0, :, :50, :70], mask[0, :50, :70], mask[1] = picture[0], True, True
    assert relative(model(batch, mask)[:1], model(picture)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (5, 90), (1, 1)])
def test_features_have_strides_4_8_16_and_32_at_any_size(name, size):
    model = build(name, SMALL)
    maps = model.features(torch.randn(2, 3, *size))
    assert model.strides == [4, 8, 16, 32]
    sides = [tuple(-(-side // stride) for side in size) for stride in model.strides]
    assert [tuple(each.shape) for each in maps] == [
        (2, dim, *side) for dim, side in zip(SMALL["dim"], sides, strict=True)
    ]
    assert all(each.isfinite().all() for each in maps)


def test_features_of_some_stages_are_what_the_head_reads():
    model = build("convformer_s18", SMALL)
    images = torch.randn(2, 3, 64, 32)
    last, first = model.features(images, layers=[-1, 0])
    x, context = model.stages[0](*model.stem(images))
    assert torch.equal(first.flatten(2).transpose(1, 2), x) and context.grid == (16, 8)
    pooled = torch.nn.functional.layer_norm(
        last.mean((2, 3)), (48,), model.head.norm.weight, model.head.norm.bias, 1e-6
    )
    hidden = torch.relu(pooled @ model.head.expand.weight.T + model.head.expand.bias).square()
    hidden = torch.nn.functional.layer_norm(hidden, (192,), model.head.inner.weight, model.head.inner.bias, 1e-6)
    assert relative(model.head.out(hidden), model(images)) < 1e-5
    with pytest.raises(ValueError, match="stage 4 does not exist"):
        model.features(images, layers=[4])


@pytest.mark.parametrize("name", NAMES)
def test_without_classes_the_pooled_features_come_out(name):
    bare = build(name, SMALL | {"classes": 0})
    images = torch.randn(2, 3, 64, 64)
    last = bare.features(images)[-1].flatten(2).transpose(1, 2)
    norm = bare.head.norm or (lambda x, context: x)
    if bare.config.head in ("mlp", "linear(mean_first=True)"):
        last = last.mean(1, keepdim=True)
    wanted = norm(last, Context(grid=(last.shape[1],))).mean(1)
    assert bare(images).shape == (2, bare.num_features) == (2, 48) and relative(bare(images), wanted) < 1e-5
    assert not [key for key in bare.state_dict() if key.startswith("head.") and not key.startswith("head.norm.")]
    advance(bare, 1.0)
    fused, wanted = fuse(bare), bare(images)
    assert relative(fused(images), wanted) < 1e-4


@pytest.mark.daily(3)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"norm": "batchnorm", "final_norm": ""},
        {"norm": "prepbn(alpha=0.1)", "final_norm": "batchnorm", "ffn": "mlp"},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_folding_is_exact(name, choices, masked):
    if not PRESETS[name].final_norm and "norm_first=False" in PRESETS[name].head:
        choices = {key: value for key, value in choices.items() if key != "final_norm"}
    depth = SMALL["depth"] if name == "davit_tiny" else (1, 1, 1, 1)
    model = build(name, SMALL | {"depth": depth} | choices).double()
    advance(model, 1.0)
    images = torch.randn(2, 3, 60, 70, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.zeros(2, 60, 70, dtype=torch.bool)
        mask[0, :41, :66], mask[1] = True, True
    fused = fuse(model)
    assert relative(fused(images, mask), model(images, mask)) < 1e-12
    if choices:  # of the batch norms only those stay that a zero-padded convolution or the stream reads
        left = [key for key, module in fused.named_modules() if isinstance(module, BatchNorm)]
        assert not left
        kept = [key for key, module in fused.named_modules() if isinstance(module, Norm)]
        reasons = {fold.layer: fold.reason for fold in fused.fusion if fold.into is None}
        assert set(kept) <= set(reasons), set(kept) - set(reasons)


@pytest.mark.parametrize("name", NAMES)
def test_folding_leaves_no_batch_norm_where_there_is_no_classifier(name):
    final = {} if "norm_first=False" in PRESETS[name].head else {"final_norm": "batchnorm"}
    model = build(name, SMALL | final | {"classes": 0, "norm": "prepbn(alpha=0.1)", "ffn": "mlp"}).double()
    advance(model, 1.0)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = fuse(model)
    assert relative(fused(images), model(images)) < 1e-12
    assert not [key for key, module in fused.named_modules() if isinstance(module, BatchNorm)]


@pytest.mark.parametrize("name", ["pvt_sla_tiny", "flash_internimage_t", "poolformer_s12"])
def test_more_padding_changes_no_training_step(name):
    """The same pictures on two canvases: logits, gradients and running statistics of a model of batch norms."""
    pictures = [torch.randn(3, 30, 50), torch.randn(3, 44, 20)]
    outcomes = []
    for side in (52, 88):
        torch.manual_seed(0)
        model = build(name, SMALL | {"norm": "batchnorm", "ffn": "mlp"}).double().train()
        batch, mask = torch.randn(2, 3, side, side, dtype=torch.float64), torch.zeros(2, side, side, dtype=torch.bool)
        for index, picture in enumerate(pictures):
            height, width = picture.shape[1:]
            batch[index, :, :height, :width], mask[index, :height, :width] = picture, True
        logits = model(batch, mask)
        logits.square().sum().backward()
        outcomes.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8 * (1 + float(other.detach().abs().max())))


def test_blocks_take_a_stages_choices_in_turns():
    config = PRESETS["davit_tiny"]
    mixers = [config.block(2, index).mixer for index in range(6)]
    assert mixers == ["window(size=7)", "channel"] * 3
    model = zoo.create_model("davit_tiny", mixer="sla")
    assert {type(block.steps[1].branch).__name__ for stage in model.stages for block in stage.blocks} == {
        "SimplifiedLinear"
    }


def test_stochastic_depth_grows_over_all_stages():
    model = zoo.create_model("pvt_sla_tiny", **(SMALL | {"drop_path": 0.5}))
    rates = [block.steps[0].drop for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * index / 7 for index in range(8)])


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomise(zoo.create_model(name, **SMALL))
        model.checkpointing = checkpointing
        for stage in model.stages:
            for block in stage.blocks:
                block.register_forward_pre_hook(lambda *_, on=checkpointing: calls.append(on))
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-6
    assert calls == [False] * 8 + [True] * 16


@pytest.mark.all
@pytest.mark.parametrize(
    "name", [name if name == "davit_tiny" else pytest.param(name, marks=pytest.mark.all) for name in NAMES]
)
def test_one_graph_forward_and_backward(name):
    model = build(name, SMALL)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(compiled(images), model(images)) < 1e-5
    compiled(images).square().sum().backward()
    got = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    model(images).square().sum().backward()
    assert relative(got, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])) < 1e-4


@pytest.mark.all
@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_a_preset_compiled_for_any_image_do_not_grow_with_its_stages(name):
    assert longest_size(build(name, SMALL), torch.randn(2, 3, 67, 90)) <= 30


@pytest.mark.all
@pytest.mark.parametrize("name", NAMES)
def test_export_takes_any_batch(name):
    model = build(name, SMALL)
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=dynamic)
    images = torch.randn(5, 3, 64, 64)
    assert relative(program.module()(images), model(images)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_layer_wise_decay_knows_every_parameter(name):
    from timm.optim import param_groups_layer_decay

    model = zoo.create_model(name, **SMALL, position="learned")
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    depth = [scales[id(block.steps[-1].branch.out.weight)] for stage in model.stages for block in stage.blocks]
    stem = max(scales[id(parameter)] for parameter in model.stem.parameters())
    assert stem < depth[0] and depth == sorted(depth) and len(set(depth)) == 8
    assert all(scales[id(parameter)] == 1.0 for parameter in model.head.parameters())
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    spared = {key for key, parameter in model.named_parameters() if decays[id(parameter)] == 0.0}
    tables = {f"stages.{stage}.position.table" for stage in range(4)}
    assert spared == tables | {key for key, parameter in model.named_parameters() if parameter.ndim < 2}
    assert set(decays.values()) == {0.0, 0.05}


@pytest.mark.parametrize(
    "choices,words",
    [
        ({"depth": (2, 2)}, ["dim, depth and heads", "(2, 2)"]),
        ({"depth": (2, 0, 2, 2)}, ["depth", ">= 1"]),
        ({"dim": 64}, ["dim", "64"]),
        ({"heads": (3, 2, 5, 8)}, ["dim 64, got 3"]),
        ({"mixer": ("sla", "sla")}, ["mixer", "2 choices for 4 stages"]),
        ({"mixer": ("sla", "sla", (), "sla")}, ["mixer", "1 to 2 names", "()"]),
        ({"mixer": ("sla", "sla", ("sla", "pool", "sla"), "sla")}, ["mixer", "1 to 2 names"]),
        (
            {"position": ("none", ("sincos", "none"), "none", "none")},
            ["position must be one name for all blocks in stage"],
        ),
        (
            {"position": "rope", "mixer": (("softmax", "channel"), "sla", "sla", "sla")},
            ["stages.0", "channel", "rotary"],
        ),
        (
            {"position": "rope", "mixer": (("softmax(head_dim=8)", "softmax(head_dim=4)"), "sla", "sla", "sla")},
            ["stages.0", "rope", "[4, 8]"],
        ),
        ({"head": "conv(norm_first=False)", "final_norm": "rmsnorm"}, ["final_norm", "ignored"]),
        ({"reduction": "conv(kernel=4, stride=4)"}, ["option of conv 'stride'"]),
        ({"mixer": ("sla", "sla", "slab", "sla")}, ["stages.2", "mixer", "slab", "did you mean sla?"]),
        ({"mixer": ("sla", ("sla", "pool(sise=3)"), "sla", "sla")}, ["stages.1", "sise", "size"]),
        ({"position": "rope", "mixer": "pool"}, ["stages.0", "rope", "pool"]),
        ({"stem": "convolution"}, ["stem", "convolution", "double"]),
        ({"reduction": "conv(kernel=5)"}, ["kernel 5 and padding 0"]),
        ({"head": "mpl"}, ["head", "mpl", "mlp"]),
        ({"final_norm": "layernrom"}, ["final_norm", "layernrom"]),
        ({"layout": ("mixer", "cross")}, ["cross", "memory"]),
        ({"pool": "mean"}, ["unknown field of pvt_sla_tiny 'pool'", "head"]),
        (
            {"conv": "depthwise", "layout": ("conv", "mixer", "ffn"), "conv_norm": "layernorm"},
            ["depthwise", "has no norm"],
        ),
        ({"classes": -1}, ["classes"]),
        ({"drop_path": 1.5}, ["drop_path"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(choices, words):
    with pytest.raises(ValueError) as caught:
        zoo.create_model("pvt_sla_tiny", **choices)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_wrong_pictures_are_refused():
    model = zoo.create_model("pvt_sla_tiny", **TINY | {"ffn": "mlp"})
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(torch.randn(2, 1, 24, 24))
    with pytest.raises(ValueError, match="boolean"):
        model(torch.randn(2, 3, 24, 24), torch.ones(24, 24, dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    model = zoo.create_model(name, **SMALL)
    for training in (True, False):
        assert model.train(training)(torch.zeros(0, 3, 64, 48)).shape == (0, 5)


@pytest.mark.all
@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_autocast(name):
    model = build(name, SMALL)
    images = torch.randn(2, 3, 64, 64)
    wanted = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(images)
    assert relative(near.float(), wanted) < 0.1
    half = model.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
