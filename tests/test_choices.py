"""What a block's choices stand for, and the names that earlier versions had for them."""

import re

import pytest

import zoo.block
from zoo.choices import PLACEMENTS, BlockConfig
from zoo.layer import Place
from zoo.models import PRESETS, configure


def test_the_table_that_block_draws_is_the_table_of_placements():
    """Each line of the docstring names the sites of both columns, and what fills them where it is no norm."""
    lines = re.findall(r"^    (\w+) {2,}(\S.*?) {3,}(\S.*)$", zoo.block.__doc__ or "", flags=re.MULTILINE)
    drawn = {}
    for name, *columns in lines[1:]:
        parts = [re.split(r"[,;] ", column) for column in columns]
        sites = [dict((*part.split(" = "), "norm")[:2] for part in column) for column in parts]
        drawn[name] = tuple(sites)
    assert drawn == PLACEMENTS


@pytest.mark.parametrize(
    ("choices", "entry", "stream", "outer", "inner"),
    [
        ({}, "mixer", "", [("before", "norm", 32, 0)], [[]]),
        ({"placement": "sub"}, "ffn", "", [("before", "norm", 32, 0)], [[("inner", "norm", 128, 0)]]),
        (
            {"placement": "normformer", "mixer": "softmax(head_dim=12)"},
            "mixer",
            "",
            [("before", "norm", 32, 0), ("after", "norm", 32, 0)],
            [[("inner", "heads", 24, 2)]],
        ),
        (
            {"placement": "hybrid"},
            "mixer",
            "",
            [],
            [[("query", "norm", 16, 0), ("key", "norm", 16, 0), ("value", "norm", 16, 0)]],
        ),
        ({"placement": "hybrid"}, "half", "before", [("before", "norm", 32, 0)], [[]]),
        ({"placement": "res_scale"}, "mixer+ffn", "scale", [("before", "norm", 32, 0)], [[], []]),
        (
            {"placement": "sub", "conv": "swish"},
            "conv",
            "",
            [("before", "norm", 32, 0)],
            [[("norm", "conv_norm", 64, 0), ("inner", "norm", 64, 0)]],
        ),
        ({"placement": "scaled"}, "ffn", "", [("before", "affine", 32, 0), ("total", "norm", 32, 0)], [[]]),
        ({"conv": "depthwise"}, "conv", "", [], [[]]),
    ],
    ids=str,
)
def test_a_plan_says_what_fills_which_site(choices, entry, stream, outer, inner):
    layout = ("mixer", "ffn") if entry in ("mixer", "ffn") else ("mixer", entry)
    plan = BlockConfig(dim=32, heads=2, layout=layout, **choices).plan(entry)
    assert plan.stream == stream
    assert [(site, what, *size) for site, what, size in plan.outer] == outer
    assert [[(site, what, *size) for site, what, size in each] for each in plan.inner] == inner


def test_rows_are_told_their_place():
    config = configure("caformer_s18")
    place = config.block(2, 4).place
    assert place == Place(axes=2, grid=(14, 14), prefix=0, index=3 + 3 + 4, depth=18, order=4, last=False)
    assert configure("deit_tiny").block(0, 11).place == Place(2, (14, 14), 1, 11, 12, order=11)
    assert configure("efficient_conformer_s").at(9).place == Place(1, (256,), 0, 9, 15, order=4)


def test_names_of_earlier_versions_are_taken():
    stages = ("grouped(size=3)", "sla", "relative")
    assert configure("efficient_conformer_s", mixers=stages) == configure("efficient_conformer_s", mixer=stages)
    assert configure("efficient_conformer_s", mixers=()) == configure("efficient_conformer_s", mixer="relative")
    assert configure("vit_micro", modulate=False) == PRESETS["vit_micro"]
    old = {"dim": 16, "depth": 2, "heads": 2, "mixers": (), "mixer": "sla"}
    assert configure("conformer_ctc_s", **old).mixer == "sla"
