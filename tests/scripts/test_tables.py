"""zoo/facts.json and configs/README.md are what the code says."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import zoo
from zoo.mixers import MIXERS
from zoo.models import FAMILIES, PRESETS
from zoo.models.base import count_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(scripted: Callable[[str], ModuleType]) -> Any:
    return scripted("generate.facts"), scripted("generate.page")


@pytest.fixture(scope="module")
def facts(made: Any) -> dict[str, Any]:
    return made[0].facts()


def test_the_files_are_current(made: Any, facts: dict[str, Any]):
    assert (ROOT / "zoo/facts.json").read_text() == made[0].dumped(facts), "run scripts/tables"
    assert (ROOT / "configs/README.md").read_text() == made[1].page(facts, ROOT), "run scripts/tables"


def test_they_have_every_row_and_every_model(facts: dict[str, Any]):
    tables = {"mixer": zoo.MIXERS, "norm": zoo.NORMS, "channel": zoo.CHANNELS, "position": zoo.POSITIONS}
    for kind, table in (tables | {"ffn": zoo.FFNS, "placement": zoo.PLACEMENTS}).items():
        assert facts["tables"][kind]["rows"].keys() == table.keys()
    assert facts["models"].keys() == PRESETS.keys() and facts["families"].keys() == FAMILIES.keys()
    with torch.device("meta"):
        assert facts["models"]["caformer_s18"]["parameters"] == count_parameters(zoo.create_model("caformer_s18"))
    page = (ROOT / "configs/README.md").read_text()
    assert all(f"\n| `{name}` | " in page for table in tables.values() for name in [*table, *PRESETS])
    assert "| `softmax` | softmax(q k^T / sqrt(d) + bias) v | `qk_norm='none'`, " in page


def test_every_field_and_preset_is_explained(facts: dict[str, Any]):
    for name, family in facts["families"].items():
        assert not [field for field, said in family["fields"].items() if not said["about"]], name
    assert not [name for name, model in facts["models"].items() if "arXiv:" not in model["about"]]
    assert facts["models"]["conformer_ctc_s"]["about"] != facts["models"]["conformer_s"]["about"]


def test_costs_and_folds_are_those_of_the_mathematics(facts: dict[str, Any]):
    costs = {name: row["cost"] for name, row in facts["tables"]["mixer"]["rows"].items()}
    linear = {"window", "local", "sla", "linfusion", "dcnv4", "pool", "sepconv", "dico", "channel", "identity"}
    linear |= {"efficient", "latte", "galerkin", "fourier", "separable", "sparse_channel", "rala", "nala", "lln"}
    linear |= {"taylor", "random_features", "dijiang", "ecoformer", "deltanet"}
    assert {name for name, cost in costs.items() if cost == "linear"} == linear
    assert costs["fnet"] == "linear; along time with a mask quadratic, memory too"
    quadratic = {name for name, cost in costs.items() if cost == "quadratic, memory too"}
    assert quadratic == {name for name, row in MIXERS.items() if row.quadratic} > {"selective", "soft"}
    norms = {name: row["folds"] for name, row in facts["tables"]["norm"]["rows"].items()}
    assert {name for name, said in norms.items() if said.startswith("folds")} == {"batchnorm", "repbn", "prepbn"}


def test_every_measured_recipe_has_its_score(made: Any):
    measured = 0
    for path in (ROOT / "configs").rglob("*.yaml"):
        found = made[1].recipe(path, ROOT)
        measured += found["measured"]
        if found["measured"]:
            assert (
                made[1].sentence(found["result"]).startswith(("accuracy 0.", "word error rate 0.", "AP 0.", "loss 0."))
            ), path
    assert measured >= 10


def test_only_configs_with_a_published_score_or_recipe_are_called_published(facts: dict[str, Any], made: Any):
    page = made[1].page(facts, ROOT)
    published, starts = page.split("\n## Recipes\n")[1].split("\n## Starting points\n")
    listed = [set(re.findall(r"^\| \[(\w+)\]", part.split("\n## ")[0], re.MULTILINE)) for part in (published, starts)]
    assert {"finetune", "own_images", "conformer_micro_streaming_fsdd"} <= listed[1] and not listed[0] & listed[1]
    assert {"deit_tiny_imagenet", "vit_tiny_dcnv4_imagenet", "squeezeformer_librispeech960"} <= listed[0]
    assert all(name.endswith(("_coco", "_imagenet", "_librispeech100", "_librispeech960")) for name in listed[0])


def test_every_option_is_explained(made: Any, facts: dict[str, Any]):
    """In the docstring of its row, or of a class that it derives from."""
    for kind, table in facts["tables"].items():
        for name, row in table["rows"].items():
            missing = [each for each in row["options"] if not re.search(rf"\b{each}\b", row["doc"])]
            assert not {*missing} - made[0].USUAL, (kind, name, missing)


@pytest.mark.slow
def test_the_script_agrees():
    line = [sys.executable, ROOT / "scripts/tables", "--check"]
    assert subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_a_difference_is_noticed(made: Any, facts: dict[str, Any]):
    changed = json.loads(json.dumps(facts))
    changed["models"]["vit_tiny"]["parameters"] += 10**6
    assert made[0].dumped(changed) != made[0].dumped(facts) and made[1].page(changed, ROOT) != made[1].page(facts, ROOT)
