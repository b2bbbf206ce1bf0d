"""Attention with other heads, against its formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

import zoo
from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from helpers import position, prepared, randomise, relative
from zoo.ffns import FFNS
from zoo.fusion import fuse
from zoo.layer import Context, Notes, Place
from zoo.mixers import MIXERS
from zoo.norms import BatchNorm
from zoo.spec import make
from zoo.weights.converting.kv_heads import share_kv_heads

WIDTH = DIM // HEADS
PREFIXED = GRID._replace(prefix=2)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """query and key [B, N, H, d] and value [B, N, H, e] -> [B, N, H * e]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), value).flatten(2)


def compared(got: Tensor, wanted: Tensor, context: Context, x: Tensor) -> None:
    """Outputs of real tokens, and their gradients."""
    real = 1 if context.mask is None else context.mask[..., None]
    check(got * real, wanted * real, (x,))


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


@pytest.mark.parametrize("context", [PREFIXED, GRID._replace(mask=REAL)], ids=["prefix", "mask"])
@pytest.mark.parametrize(
    ("name", "places"),
    {"symmetric": "001", "mssa": "000", "optimized": "01x", "optimized(key=False)": "0xx"}.items(),
)
def test_projections_are_shared_or_left_out(name, places, context):
    ours = scattered(make(MIXERS, name, DIM, HEADS))
    x = tokens(context)
    weights = ours.qkv.weight.split(DIM)
    biases = [0.0] * 3 if ours.qkv.bias is None else ours.qkv.bias.split(DIM)
    assert len(weights) == len({*places} - {"x"}) and (ours.qkv.bias is None) == (name == "mssa")
    query, key, value = (
        heads_of(x if place == "x" else x @ weights[int(place)].T + biases[int(place)]) for place in places
    )
    wanted = ours.out(attention(query, key, value, WIDTH**-0.5, context.mask))
    compared(ours(x, context), wanted, context, x)


def means_of(ours: nn.Module, number: int, kv_heads: int, x: Tensor) -> Tensor:
    """Each of the kv_heads keys (1) or values (2) as the weighted mean of those of its heads: [B, N, K, d]."""
    each = heads_of(F.linear(x, ours.qkv.weight, ours.qkv.bias).chunk(3, -1)[number])
    size, means = HEADS // kv_heads, []
    for group in range(kv_heads):
        members = range(group * size, (group + 1) * size)
        share = [1.0 if ours.shares is None else ours.shares[number - 1, head] for head in members]
        means.append(sum(each[:, :, head] * share[at] for at, head in enumerate(members)) / size)
    return torch.stack(means, 2)


@pytest.mark.parametrize("merge", ["mean", "weighted"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries_share_means(kv_heads, merge):
    ours = scattered(MIXERS["gqa"](DIM, HEADS, kv_heads=kv_heads, merge=merge))
    context = GRID._replace(mask=REAL)
    x = tokens(context)
    query = heads_of(F.linear(x, ours.qkv.weight, ours.qkv.bias).chunk(3, -1)[0])
    key, value = (means_of(ours, number, kv_heads, x).repeat_interleave(HEADS // kv_heads, 2) for number in (1, 2))
    wanted = ours.out(attention(query, key, value, WIDTH**-0.5, REAL))
    compared(ours(x, context), wanted, context, x)
    coded = ours(x, context._replace(code=torch.zeros(1, 30, DIM).double()))
    compared(coded, wanted, context, x)


def allotted(norms: list[float], heads: int) -> list[int]:
    """How many query heads read each key, as the paper's program counts them."""
    scaled = [(norm - min(norms)) / (max(norms) - min(norms)) for norm in norms]
    counts = [round(each / sum(scaled) * heads) for each in scaled]
    while sum(counts) > heads:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < heads:
        counts[counts.index(min(counts))] += 1
    return counts


@pytest.mark.parametrize("masked", [False, True])
def test_groups_follow_the_norms_of_keys(masked):
    heads, kv_heads, dim = 12, 6, 48
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        ours = scattered(MIXERS["gqa"](dim, heads, kv_heads=kv_heads, groups="key_norm"))
        context = GRID._replace(mask=REAL if masked else None)
        x = tokens(context, dim=dim)
        query, keys, values = (part.unflatten(-1, (heads, -1)) for part in ours.qkv(x).chunk(3, -1))
        keys, values = (part.unflatten(2, (kv_heads, -1)).mean(3) for part in (keys, values))
        parts = []
        for sample in range(len(x)):
            real = REAL[sample] if masked else torch.ones(30, dtype=torch.bool)
            norms = [keys[sample, real, group].norm().item() for group in range(kv_heads)]
            counts = allotted(norms, heads)
            seen.add(tuple(counts))
            index = [group for group, count in enumerate(counts) for _ in range(count)]
            one = slice(sample, sample + 1)
            parts.append(attention(query[one], keys[one][:, :, index], values[one][:, :, index], 0.5, real[None]))
        compared(ours(x, context), ours.out(torch.cat(parts)), context, x)
    assert len(seen) > 10 and max(max(counts) for counts in seen) >= 4


def test_equal_keys_have_equal_groups():
    ours = scattered(MIXERS["gqa"](DIM, HEADS, kv_heads=2, groups="key_norm"))
    groups = ours.groups(torch.ones(1, 30, 2, WIDTH).double(), GRID)
    assert groups.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("options", ["", ", merge='weighted'", ", groups='key_norm'"])
def test_means_fold_into_the_projection(options):
    choices = {"depth": 2, "dim": 48, "heads": 4, "classes": 3, "norm": "batchnorm", "placement": "hybrid"}
    model = prepared(zoo.create_model("vit_micro", mixer=f"gqa(kv_heads=2{options})", **choices))
    fused = fuse(model)
    images = torch.randn(2, 3, 32, 32).double()
    assert relative(fused(images), model(images)) < 1e-12
    assert fused.blocks[0].steps[0].branch.qkv.weight.shape == (48 + 2 * 24, 48)
    assert not [name for name in fused.state_dict() if "shares" in name]
    assert {fold.layer: fold.into for fold in fused.fusion}["blocks.0.steps.0.branch.merge"] == "the projection"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_projection_is_merged_before():
    def quantized(module):
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)

    model = zoo.create_model("vit_micro", mixer="gqa(kv_heads=2)", depth=1, dim=DIM, heads=HEADS, classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="^gqa: a quantized projection .*; fuse the model before quantizing it$"):
        quantized(model)(images)
    assert relative(quantized(fuse(model))(images), model(images)) < 0.1


def test_the_weights_of_softmax_load_and_are_merged_as_share_kv_heads_does():
    choices = {"depth": 2, "dim": 48, "heads": 4, "classes": 3}
    whole = prepared(zoo.create_model("vit_micro", **choices))
    ours = zoo.create_model("vit_micro", mixer="gqa(kv_heads=4)", **choices).double().eval()
    ours.load_state_dict(whole.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    assert relative(ours(images), whole(images)) < 1e-12
    wanted = share_kv_heads(whole, 2)(images)
    for merge in ("mean", "weighted"):
        start = zoo.create_model("vit_micro", mixer=f"gqa(kv_heads=4, merge='{merge}')", **choices).double().eval()
        start.load_state_dict(whole.state_dict(), strict=False)
        assert relative(share_kv_heads(start, 2)(images), wanted) < 1e-12


@pytest.mark.parametrize("context", [PREFIXED, Context((7,), mask=torch.tensor([[True] * 5 + [False] * 2] * 3))])
def test_keys_and_values_are_mixed_with_those_before(context):
    ours = scattered(MIXERS["kv_shift"](DIM, HEADS, Place(len(context.grid))))
    x = tokens(context)
    query, key, value = (heads_of(part) for part in ours.qkv(x).chunk(3, -1))
    before = []
    for at in range(x.shape[1]):
        place = at - context.prefix
        before.append(None if place < 0 or place % context.grid[-1] == 0 else at - 1)
    mixed = []
    for number, part in enumerate((key, value)):
        rows = []
        for at, other in enumerate(before):
            row = part[:, at] * ours.shares[0, number][:, None]
            rows.append(row if other is None else row + part[:, other] * ours.shares[1, number][:, None])
        mixed.append(torch.stack(rows, 1))
    wanted = ours.out(attention(query, *mixed, WIDTH**-0.5, context.mask))
    compared(ours(x, context), wanted, context, x)


def test_shares_of_a_token_and_the_one_before_start_with_sum_one():
    shares = MIXERS["kv_shift"](DIM, HEADS).shares
    assert torch.allclose(shares.sum(0), torch.ones(2, HEADS)) and 0 <= shares.min() < shares.max() <= 1


@pytest.mark.parametrize("how", ["add", "multiply"])
def test_heads_differ_by_embeddings(how):
    ours = scattered(MIXERS["head_embedding"](DIM, HEADS, how=how))
    assert ours.qkv.weight.shape == (3 * WIDTH, DIM)
    context = GRID._replace(mask=REAL)
    x = tokens(context)
    parts = []
    for number, part in enumerate(ours.qkv(x).chunk(3, -1)):
        each = [ours.embeddings[number, head] for head in range(HEADS)]
        parts.append(torch.stack([part + e if how == "add" else part + part * e for e in each], 2))
    wanted = ours.out(attention(*parts, WIDTH**-0.5, REAL))
    compared(ours(x, context), wanted, context, x)


def test_super_attention_multiplies_values_by_a_matrix():
    ours = scattered(MIXERS["super"](DIM, HEADS, Place(2, (5, 6))))
    x = tokens(PREFIXED)
    value = torch.cat([x[:, :2], torch.einsum("nm,bmc->bnc", ours.between, x[:, 2:])], 1)
    wanted = ours.out(attention(heads_of(ours.qkv(x)), heads_of(x), heads_of(value), WIDTH**-0.5))
    check(ours(x, PREFIXED), wanted, (x, ours.between))
    masked = GRID._replace(mask=torch.ones(3, 30, dtype=torch.bool))
    x = tokens()
    check(ours(x, masked), ours(x, GRID), (x,))


@pytest.mark.parametrize("grid", [(3, 9), (8, 4)])
def test_super_attention_resizes_other_grids(grid):
    """PyTorch's bilinear interpolation to the grid of the matrix and back; in a batch, by each sample's extent."""
    ours = scattered(MIXERS["super"](DIM, HEADS, Place(2, (5, 6))))
    context = Context(grid)
    x = tokens(context)
    maps = x.transpose(1, 2).unflatten(2, grid)
    seen = F.interpolate(maps, (5, 6), mode="bilinear").flatten(2) @ ours.between.T
    back = F.interpolate(seen.unflatten(2, (5, 6)), grid, mode="bilinear").flatten(2).transpose(1, 2)
    wanted = ours.out(attention(heads_of(ours.qkv(x)), heads_of(x), heads_of(back), WIDTH**-0.5))
    check(ours(x, context), wanted, (x,))


def test_super_attention_starts_with_the_values_of_the_efficient_one():
    ours = MIXERS["super"](DIM, HEADS, Place(2, (5, 6))).double()
    theirs = MIXERS["optimized"](DIM, HEADS, key=False).double()
    theirs.load_state_dict({name: each for name, each in ours.state_dict().items() if name != "between"})
    x = tokens()
    check(ours(x, GRID), theirs(x, GRID), (x,))


@pytest.mark.parametrize("reduction", [2, 8, 100])
def test_sagan_has_narrow_unscaled_scores_and_a_gain(reduction):
    ours = scattered(MIXERS["sagan"](DIM, HEADS, reduction=reduction))
    width = max(1, DIM // (HEADS * reduction))
    x = tokens(PREFIXED)
    query, key, value = (heads_of(part) for part in ours.qkv(x).split([HEADS * width, HEADS * width, DIM], -1))
    wanted = ours.gain * ours.out(attention(query, key, value, 1.0))
    check(ours(x, PREFIXED), wanted, (x, ours.gain))
    assert not MIXERS["sagan"](DIM, HEADS)(x.float(), PREFIXED).any()


@pytest.mark.parametrize("turned", [False, True])
def test_mla_is_that_of_deepseek(turned):
    rank, rotary = 24, 8
    config = deepseek.DeepseekV2Config(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        qk_rope_head_dim=rotary,
        kv_lora_rank=rank,
        v_head_dim=WIDTH,
        qk_nope_head_dim=WIDTH,
        attn_implementation="eager",
    )
    theirs = scattered(deepseek.DeepseekV2Attention(config, 0))
    ours = MIXERS["mla"](DIM, HEADS, rank=rank, rotary=rotary).double().eval()
    pairs = torch.arange(rotary).view(-1, 2).T.flatten()  # theirs turn neighbours, ours halves

    def halves(rows: Tensor) -> Tensor:
        """The last `rotary` of the rows in our order."""
        return torch.cat([rows[:-rotary], rows[-rotary:][pairs]])

    queries = torch.cat([halves(each) for each in theirs.q_proj.weight.chunk(HEADS)])
    keys, values = theirs.kv_b_proj.weight.unflatten(0, (HEADS, 2, WIDTH)).unbind(1)
    state = {"qkv.weight": torch.cat([queries, halves(theirs.kv_a_proj_with_mqa.weight)])}
    state |= {"raise_latent.weight": torch.cat([keys.flatten(0, 1), values.flatten(0, 1)])}
    state |= {"latent_norm.weight": theirs.kv_a_layernorm.weight, "out.weight": theirs.o_proj.weight}
    ours.load_state_dict(state)
    context = Context((9,))
    x = tokens(context)
    turns = torch.ones(1, 9, rotary // 2, dtype=torch.complex64)
    if turned:
        context = position("rope", DIM, rotary, (9,)).place(context)
        turns = torch.complex(*context.rotary)[None]
    wanted, _ = theirs(x, torch.zeros(1, 1, 9, 9).double(), position_embeddings=turns)
    check(ours(x, context), wanted, (x,), 1e-5)  # they turn in fp32


def test_mla_adds_code_to_queries_and_keys_alone():
    ours = scattered(MIXERS["mla"](DIM, HEADS, rank=24, rotary=8))
    x, code = tokens(GRID._replace(mask=REAL)), torch.randn(1, 30, DIM).double()
    context = GRID._replace(mask=REAL, code=code)
    query, latent, common = ours.qkv(x + code).split([HEADS * (WIDTH + 8), 24, 8], -1)
    keys, values = ours.raise_latent.weight.chunk(2)
    key = heads_of(F.rms_norm(latent, (24,), ours.latent_norm.weight, 1e-6) @ keys.T)
    key = torch.cat([key, common[:, :, None].expand(-1, -1, HEADS, -1)], -1)
    latent = ours.qkv(x)[..., -32:-8]
    value = heads_of(F.rms_norm(latent, (24,), ours.latent_norm.weight, 1e-6) @ values.T)
    wanted = ours.out(attention(heads_of(query), key, value, (WIDTH + 8) ** -0.5, REAL))
    compared(ours(x, context), wanted, context, x)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("relational", "relations"), [(0, 0), (1, 3), (4, 2)])
def test_relational_heads_collect_relations_and_symbols(relational, relations, symmetric):
    options = {"relational_heads": relational, "relations": relations, "symmetric": symmetric, "symbols": 5}
    ours = scattered(MIXERS["relational"](DIM, HEADS, **options))
    special, number = relational or 2, relations or 2
    context = PREFIXED
    x = tokens(context)
    sizes = [HEADS + (0 if symmetric else number), HEADS + number, HEADS - special]
    q, k, v, choice = ours.qkv(x).split([*(size * WIDTH for size in sizes), 5], -1)
    q, k, v = (part.unflatten(-1, (-1, WIDTH)) for part in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q[:, :, :HEADS], k[:, :, :HEADS]) / WIDTH**0.5
    shares = scores.softmax(-1)
    asking = k[:, :, HEADS:] if symmetric else q[:, :, HEADS:]
    related = torch.einsum("bnrd,bmrd->bnmr", asking, k[:, :, HEADS:]) / WIDTH**0.5
    symbols = torch.einsum("bms,shd->bmhd", choice.softmax(-1), ours.library.unflatten(-1, (special, -1)))
    outputs = []
    for head in range(HEADS):
        if head < HEADS - special:
            outputs.append(shares[:, head] @ v[:, :, head])
        else:
            own = head - (HEADS - special)
            sent = related @ ours.relate[own] + symbols[:, None, :, own]  # [B, n, m, d]
            outputs.append(torch.einsum("bnm,bnmd->bnd", shares[:, head], sent))
    wanted = ours.out(torch.cat(outputs, -1))
    check(ours(x, context), wanted, (x, ours.library, ours.relate))
    with torch.no_grad():
        check(ours(x, context), wanted)
    notes = Notes()
    ours(x, context._replace(notes=notes))
    assert (notes.values[".weights"] - shares).abs().max() < 1e-12


def test_relations_are_not_turned():
    """Without scores, only relations are left, which rotary angles leave alone."""
    ours = scattered(MIXERS["relational"](DIM, HEADS))
    with torch.no_grad():
        ours.qkv.weight[: HEADS * WIDTH].zero_(), ours.qkv.bias[: HEADS * WIDTH].zero_()
    x = tokens()
    turned = position("rope", DIM, WIDTH, (5, 6)).place(GRID)
    check(ours(x, turned), ours(x, GRID), (x,))


@pytest.mark.parametrize(("step", "threshold"), [(0.1, 0.1), (0.5, 0.0)])
def test_ista_with_its_placement_is_a_step_of_sparse_coding(step, threshold):
    """Of x for the dictionary D: x - step D^T (D x - x) without what is below the threshold."""
    ours = scattered(FFNS["ista"](DIM, step=step, threshold=threshold))
    x = tokens()
    d = ours.dictionary
    moved = x - step * torch.einsum("dc,bnd->bnc", d, torch.einsum("dc,bnc->bnd", d, x) - x)
    wanted = (moved - step * threshold).clamp(min=0)
    check(x + ours(x, GRID), wanted, (x, d))


@pytest.mark.parametrize(
    ("choice", "layer", "into"),
    [
        ({"mixer": "sagan"}, "branch.inner", "the output linear"),
        ({"ffn": "ista"}, "branch.inner", None),
    ],
)
def test_norms_inside_fold_or_stay_as_affine_maps(choice, layer, into):
    choices = {"depth": 1, "dim": 48, "heads": 4, "classes": 3, "norm": "batchnorm", "placement": "sub"}
    model = prepared(zoo.create_model("vit_micro", **(choices | choice)))
    fused = fuse(model)
    images = torch.randn(2, 3, 32, 32).double()
    assert relative(fused(images), model(images)) < 1e-12
    step = 0 if "mixer" in choice else 1
    assert {fold.layer: fold.into for fold in fused.fusion}[f"blocks.0.steps.{step}.{layer}"] == into
    assert not [part for part in fused.modules() if isinstance(part, BatchNorm)]


def test_a_block_of_crate():
    choices = {"depth": 1, "dim": DIM, "heads": HEADS, "classes": 3, "class_token": True, "pool": "token"}
    model = zoo.create_model("crate_tiny", image=32, **choices).double().eval()
    randomise(model)
    (block,) = model.blocks
    x, context = model.embed(torch.randn(2, 3, 32, 32).double(), None)
    mixer, ffn = block.steps
    norm = F.layer_norm(x, (DIM,), mixer.before.weight, mixer.before.bias, 1e-6)
    u = heads_of(norm @ mixer.branch.qkv.weight.T)
    z = x + mixer.branch.out(attention(u, u, u, WIDTH**-0.5))
    z = F.layer_norm(z, (DIM,), ffn.before.weight, ffn.before.bias, 1e-6)
    d = ffn.branch.dictionary
    wanted = F.relu(z + 0.1 * (z @ d - z @ d.T @ d) - 0.01)
    assert relative(block(x, context), wanted) < 1e-12


def test_crate_tiny_has_the_size_of_the_paper():
    with zoo.tensors.shapes_alone():
        assert abs(sum(each.numel() for each in zoo.create_model("crate_tiny").parameters()) / 1e6 - 6.09) < 0.01


@pytest.mark.parametrize(
    ("spec", "message"),
    {
        "gqa(kv_heads=3)": "kv_heads must divide the 4 heads, got 3",
        "gqa(merge='sum')": "'sum'",
        "gqa(groups='odd')": "'odd'",
        "head_embedding(how='join')": "'join'",
        "mla(rotary=5)": "rotary must be even, got 5",
        "mla(rank=65)": "rank must be at most 64 at dim 32, got 65",
        "mla(rank=0)": "rank of 'mla' must be finite and >= 1",
        "sagan(reduction=0)": "reduction of 'sagan' must be finite and >= 1",
        "relational(relational_heads=5)": "relational_heads must be at most the 4 heads, got 5",
        "relational(symbols=0)": "symbols of 'relational' must be finite and >= 1",
    }.items(),
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        make(MIXERS, spec, DIM, HEADS)
    assert "\n" not in str(error.value)
