"""Folding is exact: fp64, random statistics, gains and biases; a term left out is noticed."""

import copy
from dataclasses import replace

import pytest
import torch

import zoo.fusion
import zoo.norms
from block_cases import CONFORMER, DECODER, DIFFUSION, SQUEEZEFORMER, context_of
from helpers import DIM, PLACES, ROWS, context_for, prepared, randomise, relative, tokens_for
from zoo import advance, create_model, fuse
from zoo.block import Block
from zoo.choices import PLACEMENTS, BlockConfig
from zoo.layer import Context, Layer
from zoo.norms import NORMS, Affine, BatchNorm, LayerNorm

SMALL = {"depth": 2, "dim": 48, "heads": 3, "classes": 10}


def vit(**choices) -> torch.nn.Module:
    return prepared(create_model("vit_micro", **(SMALL | {"norm": "prepbn"} | choices)))


def error(model: torch.nn.Module) -> float:
    images = torch.randn(2, 3, 30, 37, dtype=torch.double)
    with torch.no_grad():
        return relative(fuse(model)(images), model(images))


CASES = {
    "pre": {},
    "repbn": {"norm": "repbn"},
    "batchnorm": {"norm": "batchnorm"},
    "class token": {"class_token": True, "pool": "token"},
    "distilled": {"class_token": True, "pool": "distilled"},
    "token_and_mean": {"class_token": True, "pool": "token_and_mean", "norm": "batchnorm"},
    "attention pool": {"pool": "attention", "norm": "batchnorm", "registers": 1, "first_norm": True},
    "attention pool without a head": {"pool": "attention", "norm": "repbn", "classes": 0},
    "registers": {"registers": 3},
    "norm after the mean": {"pool": "norm_after_mean"},
    "no head": {"classes": 0},
    "post": {"placement": "post"},
    "peri": {"placement": "peri", "layer_scale": 0.3},
    "sub": {"placement": "sub"},
    "hybrid": {"placement": "hybrid"},
    "normformer": {"placement": "normformer"},
    "scaled": {"placement": "scaled"},
    "layer scale behind channel attention": {"placement": "peri", "layer_scale": 0.3, "channel": "se"},
    "parallel": {"layout": ("mixer+ffn",), "placement": "peri"},
    "parallel sub": {"layout": ("mixer+ffn",), "placement": "sub"},
    "conv": {"layout": ("half", "mixer", "conv", "norm"), "conv_norm": "repbn"},
    "sla": {"mixer": "sla"},
    "dcnv4": {"mixer": "dcnv4", "placement": "sub"},
    "pool": {"mixer": "pool"},
    "sepconv": {"mixer": "sepconv", "placement": "sub"},
    "dico": {"mixer": "dico", "placement": "sub"},
    "channel": {"mixer": "channel", "placement": "hybrid"},
    "identity": {"mixer": "identity"},
    "shared keys": {"mixer": "softmax(kv_heads=1)", "placement": "hybrid"},
    "swiglu": {"ffn": "swiglu", "placement": "sub"},
    "layernorm": {"norm": "layernorm", "placement": "peri"},
}
CASES |= {
    f"{placement} {norm} with layer scale": {"placement": placement, "norm": norm, "layer_scale": 0.3}
    for placement in PLACEMENTS
    for norm in NORMS
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_the_same(case):
    assert error(vit(**CASES[case])) < 1e-12


@pytest.mark.parametrize("case", ["pre", "class token", "sub", "peri", "sla", "parallel"])
def test_folded_norms_are_gone(case):
    fused = fuse(vit(**CASES[case]))
    assert not [name for name, module in fused.named_modules() if isinstance(module, BatchNorm | Affine)]
    assert not [name for name in fused.state_dict() if "running" in name or "blend" in name]
    assert fused.fusion and all(fold.into and not fold.reason for fold in fused.fusion)


def test_what_cannot_fold_stays_as_an_affine_map_and_says_why():
    fused = fuse(vit(mixer="pool", placement="post"))
    kinds = [type(module) for module in fused.modules() if isinstance(module, zoo.norms.Norm)]
    assert kinds == [Affine] * 4, "post norms stay in the stream; the last one goes into the head"
    assert all(fold.into or fold.reason for fold in fused.fusion)
    reasons = {fold.reason for fold in fuse(vit(mixer="pool")).fusion if not fold.into}
    assert reasons == {"Pool has no linear that alone reads its input"}
    assert isinstance(fuse(vit(norm="layernorm")).norm, LayerNorm)


def test_the_model_itself_is_left_alone():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert model.training and not fused.training and model.fusion is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_blend_above_zero_is_refused():
    model = create_model("vit_micro", **SMALL, norm="prepbn")
    advance(model, 0.4)
    with pytest.raises(ValueError, match="still blends"):
        fuse(model)


FAMILIES = {
    f"{name}-{norm}": (replace(config, norm=norm, **({"conv_norm": norm} if "conv" in config.layout else {})), (9,))
    for name, config in (("conformer", CONFORMER), ("squeezeformer", SQUEEZEFORMER), ("decoder", DECODER))
    for norm in ("prepbn", "batchnorm")
}
FAMILIES["diffusion"] = replace(DIFFUSION, layer_scale=0.1), (3, 4)


def check_block(config: BlockConfig, grid: tuple[int, ...]) -> Block:
    """The fused block, which gives what the block gives."""
    block = prepared(Block(config))
    fused = fuse(block)
    context = context_of(config, grid, [grid, tuple(size - 1 for size in grid)])
    if context.memory is not None:
        memory = context.memory._replace(tokens=context.memory.tokens.double())
        context = context._replace(memory=memory, code=context.code.double())
    if context.cond is not None:
        context = context._replace(cond=context.cond.double())
    x = torch.randn(2, context.mask.shape[1], 32, dtype=torch.double)
    with torch.no_grad():
        assert relative(fused(x, context), block(x, context)) < 1e-12
    return fused


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family(family):
    assert check_block(*FAMILIES[family]).fusion


def test_a_decoder_that_adds_code_keeps_its_norm():
    fused = check_block(replace(DECODER, placement="pre", norm="batchnorm"), (9,))
    mixer, cross, ffn = fused.steps
    assert isinstance(mixer.before, Affine) and isinstance(cross.before, Affine) and ffn.before is None
    assert sum("adds code" in fold.reason for fold in fused.fusion) == 2


# Where no affine map folds into a branch: behind it, and in front of it.
NO_OUTPUTS = {"mixer-identity", "mixer-pool", "conv-depthwise-batchnorm", "conv-depthwise-layernorm"}
NO_OUTPUTS |= {"mixer-blend(of=('softmax', 'shaw(span=3)'), weights='learned')", "mixer-blend(weights='input')"}
NO_OUTPUTS |= {"mixer-blend(of=('softmax', 'deltanet'), weights='learned')"}
NO_OUTPUTS |= {"mixer-blend(of=('softmax', 'sepconv', 'fnet'))", "mixer-fnet", "mixer-fnet(scale=False)"}
NO_OUTPUTS |= {"ffn-chunked"}
NO_INPUTS = NO_OUTPUTS - {each for each in NO_OUTPUTS if "blend" in each}
NO_INPUTS |= {"mixer-dcnv4(weights='softmax', local=3, centre=True, bias=False)", "mixer-linfusion"}
NO_INPUTS |= {"ffn-ista", "mixer-super", "mixer-optimized", "mixer-optimized(key=False)"}
NO_INPUTS |= {"mixer-blend(of=('softmax', 'sepconv', 'fnet'))"}
NO_INPUTS |= {"mixer-conv_projection(kernels=(2, 2), of='qk')"}
NO_OUTPUTS |= {"ffn-ista", "mixer-sagan"}
declared = [place for place in PLACES if place.values[0].split("-")[0] in ("mixer", "conv", "cross", "ffn")]


@pytest.mark.parametrize(("name", "axes"), declared)
def test_declared_linears_are_all_there_are(name, axes):
    """branch(a x + b) equals the folded branch(x), and a branch(x) + b the one folded behind; with mask and prefix."""
    layer = randomise(ROWS[name](axes)).double().eval()
    assert isinstance(layer, Layer)
    grid = (9,) if axes == 1 else (4, 5)
    context = context_for(layer, grid, 2, [grid, tuple(size - 1 for size in grid)])._replace(code=None)
    if context.memory is not None:
        tokens, code = context.memory.tokens.double(), context.memory.code.double()
        context = context._replace(memory=context.memory._replace(tokens=tokens, code=code))
    x = tokens_for(context, 2).double()
    scale, shift = 1 + 0.5 * torch.randn(DIM).double(), torch.randn(DIM).double()
    real = context.mask[..., None]
    with torch.no_grad():
        wanted = layer(x * scale + shift, context) * real
        folded = copy.deepcopy(layer)
        inputs = folded.inputs()
        assert isinstance(inputs, str) == (name in NO_INPUTS)
        if not isinstance(inputs, str):
            for each in inputs:
                zoo.fusion.fold_in(each, scale, shift)
            assert relative(folded(x, context) * real, wanted) < 1e-12
        folded = copy.deepcopy(layer)
        outputs = folded.outputs()
        assert isinstance(outputs, str) == (name in NO_OUTPUTS)
        if not isinstance(outputs, str):
            for number, each in enumerate(outputs):
                zoo.fusion.fold_out(each, scale, shift * (number == 0))
            assert relative(folded(x, context), layer(x, context) * scale + shift) < 1e-12


@pytest.mark.parametrize("case", ["pre", "class token", "peri", "sub", "conv", "hybrid"])
def test_a_term_left_out_is_noticed(case, monkeypatch):
    """Each term of each folding, left out on purpose, makes the comparison fail."""
    model = vit(**CASES[case])
    fold_in, fold_out, affine = zoo.fusion.fold_in, zoo.fusion.fold_out, BatchNorm.affine
    broken = {
        "shift of fold_in": ("fold_in", lambda layer, scale, shift: fold_in(layer, scale, shift * 0)),
        "scale of fold_in": ("fold_in", lambda layer, scale, shift: fold_in(layer, scale * 0 + 1, shift)),
        "shift of fold_out": ("fold_out", lambda layer, a, b, rows=slice(None): fold_out(layer, a, b * 0, rows)),
        "scale of fold_out": ("fold_out", lambda layer, a, b, rows=slice(None): fold_out(layer, a * 0 + 1, b, rows)),
    }
    assert error(model) < 1e-12
    behind = case in ("peri", "conv", "hybrid")
    for name, (function, replacement) in broken.items():
        if "out" in name and not behind:
            continue
        with monkeypatch.context() as patch:
            for module in (zoo.fusion, zoo.block, zoo.models.vit):
                if hasattr(module, function):
                    patch.setattr(module, function, replacement)
            assert error(model) > 1e-6, name

    def without(term):
        def patched(self):
            scale, shift = affine(self)
            if term == "alpha":
                return scale - self.alpha.detach(), shift
            if term == "mean":
                return scale, self.bias.detach()
            return scale, shift - self.bias.detach()

        return patched

    for term in ("alpha", "mean", "bias"):
        with monkeypatch.context() as patch:
            patch.setattr(BatchNorm, "affine", without(term))
            patch.setattr(zoo.norms.PRepBN, "affine", without(term))
            assert error(model) > 1e-6, term


def test_fused_features_and_masks():
    model = vit(mixer="sla")
    fused = fuse(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    mask[0, 16:] = False
    with torch.no_grad():
        assert relative(fused(images, mask), model(images, mask)) < 1e-12
        for one, other in zip(fused.features(images), model.features(images), strict=True):
            assert relative(one, other) < 1e-12


def test_export_and_precision_of_a_fused_block():
    block = fuse(prepared(Block(BlockConfig(dim=32, heads=2, norm="prepbn")))).float()
    x, context = torch.randn(2, 12, 32), Context(grid=(3, 4))
    program = torch.export.export(block, (x, context))
    assert relative(program.module()(x, context), block(x, context)) < 1e-5
