"""Models of other libraries by name: what is known of them, and what is not trusted."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers

from hub_server import Hub
from zoo.weights import CheckpointError, load_checkpoint, load_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*was saved without")
NAME = "owner/vit.theirs"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "vit"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}
    config = transformers.ViTConfig(**sizes, intermediate_size=40)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(hub: Hub, theirs: Path) -> Hub:
    hub.put(NAME, {path.name: path.read_bytes() for path in theirs.iterdir()})
    return hub


ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
LICENSES = {
    "plain": ("---\nlicense: cc-by-4.0\ntags:\n- x\n---\n# Title\n", "cc-by-4.0"),
    "quoted, windows": ('---\r\nlicense: "mit"\r\n---\r\n# Title', "mit"),
    "other": ("---\nlicense: other\nlicense_name: ours\n---\n", "other"),
    "none": ("---\ntags: [x]\n---\n", "unknown"),
    "null": ("---\nlicense: null\n---\n", "unknown"),
    "a number": ("---\nlicense: 5\n---\n", "unknown"),
    "a list": ("---\nlicense: [mit, bsd]\n---\n", "unknown"),
    "an odd name": ('---\nlicense: "mit\\nlicense: x"\n---\n', "unknown"),
    "long": (f"---\nlicense: {'x' * 200}\n---\n", "unknown"),
    "no front matter": ("# Title\nlicense: mit\n", "unknown"),
    "only later": ("# Title\n---\nlicense: mit\n---\n", "unknown"),
    "no end": ("---\nlicense: mit\n", "unknown"),
    "no YAML": ("---\nlicense: [mit\n---\n", "unknown"),
    "a text": ("---\nmit\n---\n", "unknown"),
    "code": ("---\nlicense: !!python/object/apply:os.mkdir [HERE]\n---\n", "unknown"),
    "aliases": (f"---\n{ALIASES}\nlicense: mit\n---\n", "unknown"),
    "nested": (f"---\nlicense: mit\nx: {'[' * 100_000}\n---\n", "unknown"),
    "huge": (f"---\nlicense: mit\nx: {'y' * 5_000_000}\n---\n", "unknown"),
    "empty": ("", "unknown"),
}


@pytest.mark.parametrize("case", LICENSES)
def test_the_license_of_a_readme(case: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text, license = LICENSES[case]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in theirs.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "README.md").write_bytes(text.encode())
    model: Any = load_model("hf:./model")
    assert model.about["license"] == license and not (tmp_path / "HERE").exists()
    assert model.about["base"] == {"address": "model", "commit": None, "layout": "transformers"}


def test_a_readme_that_is_not_text_or_not_there(theirs: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in theirs.iterdir():
        (folder / path.name).symlink_to(path)
    assert load_checkpoint(f"hf:{folder}").config["license"] == "unknown"
    (folder / "README.md").write_bytes(b"---\nlicense: mit\nx: \xff\xfe\n---\n")
    assert load_checkpoint(f"hf:{folder}").config["license"] == "unknown"
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    assert load_checkpoint(f"hf:{folder}").config["license"] == "unknown"
    with pytest.raises(CheckpointError, match=r"^hf:\./nothing: folder not found$"):
        load_model("hf:./nothing")


def test_a_model_of_the_hub_and_its_license(hub: Hub, theirs: Path, tmp_path: Path):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = load_model(f"hf:{NAME}")
    wanted = transformers.ViTForImageClassification.from_pretrained(theirs).eval()(images).logits
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=0)
    assert model.about["license"] == "unknown"  # pyright: ignore
    commit = hub.put(NAME, {"README.md": b"---\nlicense: bsd-3-clause\n---\n# Theirs\n"})
    found = load_checkpoint(f"hf:{NAME}")
    base = {"address": f"https://huggingface.co/{NAME}", "commit": commit, "layout": "transformers"}
    assert found.config["license"] == "bsd-3-clause" and found.config["base"] == base
    folder = save_model(found.model, tmp_path / "ours")
    assert load_checkpoint(folder).config["license"] == "bsd-3-clause"
    assert "\nlicense: bsd-3-clause\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("given", "license"), [("cc-by-nc-4.0", "cc-by-nc-4.0"), (None, "unknown")])
def test_the_license_of_a_model_of_timm(given: str | None, license: str, monkeypatch: pytest.MonkeyPatch):
    made = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    made.pretrained_cfg |= {"license": given, "num_classes": 3}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made)
    assert load_checkpoint("timm:vit_tiny_patch16_224").config["license"] == license
