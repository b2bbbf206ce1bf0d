"""What an error says of a name or an option that does not exist, or of a number that no row can take."""

import pytest

import zoo

HINTS = [
    ({"mixer": "slo"}, "mixer: unknown name 'slo'; did you mean sla?"),
    ({"mixer": "pool(siz=3)"}, "mixer: unknown option of pool 'siz'; did you mean size?"),
    ({"mixer": "pool(q=1)"}, "mixer: unknown option of pool 'q'; choose from: size"),
    ({"mixer": ("softmax", "slo")}, "blocks.1: mixer: unknown name 'slo'; did you mean sla?"),
    ({"norm": "layernrm"}, "norm: unknown name 'layernrm'; did you mean layernorm?"),
    ({"placement": "prenorm"}, "placement: unknown name 'prenorm'; did you mean pre?"),
    ({"layout": ("mixr", "ffn")}, "layout: unknown branch 'mixr'; did you mean mixer?"),
    ({"pool": "men"}, "pool: unknown name 'men'; did you mean mean?"),
    ({"ffn": "mlp(activation='gleu')"}, "unknown activation 'gleu'; did you mean gelu?"),
    ({"mixer": 3}, "mixer must be a name or a tuple of names, got 3"),
    ({"num_classes": 3}, "'vit_micro' has no field 'num_classes'; did you mean classes?"),
    (
        {"pretrained": True},
        "pretrained is the name of a checkpoint, as in create_model('vit_micro', pretrained='digits')",
    ),
]


@pytest.mark.parametrize("choices, words", HINTS, ids=str)
def test_an_unknown_name_comes_with_what_is_near(choices, words):
    with pytest.raises(ValueError) as caught:
        zoo.create_model("vit_micro", **choices)
    assert words in str(caught.value)


def test_the_name_of_a_checkpoint_is_told_from_that_of_a_model():
    with pytest.raises(
        ValueError, match=r"is the name of a checkpoint, .* zoo.load_model\('vit_micro.digit'\) reads it"
    ):
        zoo.create_model("vit_micro.digit")


def test_only_what_works_there_is_offered():
    """Mixers along time alone are not offered to a model of images."""
    with pytest.raises(ValueError) as caught:
        zoo.create_model("vit_micro", mixer="zzzz")
    offered = str(caught.value).partition("choose from: ")[2].split(", ")
    assert offered == [name for name, row in zoo.MIXERS.items() if 2 in row.dimensions]
    assert {"softmax", "window"} <= {*offered} and not {"relative", "grouped", "local"} & {*offered}
