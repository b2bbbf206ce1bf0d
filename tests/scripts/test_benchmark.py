"""scripts/benchmark with the smallest of settings: what it writes, what it says beside the numbers, and that it times
nothing that is wrong."""

import csv
import io
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import zoo
from helpers import ON_PICTURES

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODES = ("forward", "forward+backward")
TIMED = {
    "models": ("ratio", "noise"),
    "mixers": ("ratio", "noise"),
    "fuse": ("ratio", "noise"),
    "operators": ("times_as_fast", "noise"),
    "deformable": ("ratio", "noise"),
    "norms": ("ratio", "ratio_torch", "noise"),
    "speech": ("ratio", "noise"),
    "parakeet": ("ratio", "noise"),
    "rtf": ("rtf", "noise"),
    "long": ("ratio", "noise"),
    "training": ("ratio", "noise"),
    "data_images": ("by_timm", "by_torchvision", "shards_by_files", "noise"),
    "data_reading": ("shards_by_files", "noise"),
    "data_audio": ("by_torchaudio", "noise"),
    "losses": ("ratio", "noise"),
    "detectors": ("ratio", "noise"),
    "diffusion": ("ratio", "noise"),
    "diffusion_mixers": ("ratio", "noise"),
}
LINUX = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    """The module behind the script."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("benchmarks.command")
    sys.path.remove(str(SCRIPTS))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(command: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a quick run prints, and where it writes."""
    folder, said = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    with redirect_stdout(said):
        command.main(["--quick", "--output", str(folder)])
    return said.getvalue(), folder


def module(name: str) -> ModuleType:
    return import_module(f"benchmarks.{name}")


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_mixer_has_a_row_at_every_size(measured):
    rows = rows_of(measured[1], "mixers")
    assert [(row["mixer"], row["tokens"]) for row in rows] == [
        (name, size) for size in ("4", "9") for name in ON_PICTURES
    ]
    assert all(row["ratio"] == "1.0" for row in rows if row["mixer"] == "softmax")


def test_models_and_fuse_have_a_row_for_each_comparison(measured):
    rows = rows_of(measured[1], "models")
    wanted = [
        ("vit_tiny mixer=sla", "timm vit_tiny_patch16_224"),
        ("poolformer_s12", "timm poolformer_s12"),
    ]
    found = [(row["model"], row["base"], row["mode"]) for row in rows]
    assert found == [(*what, mode) for what in wanted for mode in MODES]
    names = [(row["model"], row["base"]) for row in rows_of(measured[1], "fuse")]
    assert names == [("prepbn, fused", "prepbn"), ("prepbn, fused", "layernorm"), ("prepbn", "layernorm")]


def test_operators_have_a_row_for_each_form_shape_and_mode(measured):
    rows = rows_of(measured[1], "operators")
    forms = {"dcnv4": ("operator", "grid_sample", "gathered", "torchvision")}
    forms |= {"linear attention": ("operator", "softmax")}
    shapes = {"dcnv4": ("4x6x8 G2",), "linear attention": ("81 tokens",)}
    for name in forms:
        found = [(row["shape"], row["mode"], row["variant"]) for row in rows if row["operator"] == name]
        assert found == list(itertools.product(shapes[name], MODES, forms[name]))
    assert all(row["times_as_fast"] == "1.0" for row in rows if row["variant"] == "operator")


def test_a_whole_model_is_measured_with_each_core(measured):
    rows = rows_of(measured[1], "deformable")
    assert [row["variant"] for row in rows] == ["operator", "grid_sample", "free core"]
    assert [float(row["core_ms"]) == 0 for row in rows] == [False, False, True]


def test_norms_have_a_row_for_each_form_shape_and_mode(measured):
    rows = rows_of(measured[1], "norms")
    forms = ["layernorm", "batchnorm", "repbn", "prepbn, finished", "folded", "torch's BatchNorm1d"]
    wanted = [pair for pair in itertools.product(MODES, forms) if pair != ("forward+backward", "folded")]
    assert [(row["mode"], row["norm"]) for row in rows] == wanted


def test_losses_have_a_row_for_matching_and_one_for_all(measured):
    rows = rows_of(measured[1], "losses")
    assert [row["what"] for row in rows] == ["matching", "losses, forward+backward"]
    assert all(row["base"].startswith("transformers ") for row in rows)


def test_detectors_have_a_row_for_each_form(measured):
    rows = rows_of(measured[1], "detectors")
    assert [(row["model"], row["what"]) for row in rows] == [
        ("RT-DETRv2-R18", "ours"),
        ("RT-DETRv2-R18", "ours, folded"),
    ]
    assert all(row["base"].startswith("transformers ") for row in rows)


def test_a_detector_that_differs_is_not_timed(command, monkeypatch):
    detectors = module("detectors")
    convert = detectors.from_transformers

    def other(folder):
        found = convert(folder)
        found.model.score.bias.data += 0.1
        return found

    monkeypatch.setattr(detectors, "from_transformers", other)
    with pytest.raises(ValueError, match="^ours differs from transformers .*; neither was timed"):
        detectors.calls("RT-DETRv2-R18", 128)


def test_diffusion_has_a_row_for_each_batch_and_each_mixer(measured):
    (row,) = rows_of(measured[1], "diffusion")
    assert (row["model"], row["batch"]) == ("dit_s_2", "2") and row["base"].startswith("diffusers ")
    rows = rows_of(measured[1], "diffusion_mixers")
    assert [row["mixer"] for row in rows][:3] == ["softmax", "sla", "dcnv4"]
    assert {row["tokens"] for row in rows} == {"64"}


def test_a_diffusion_transformer_that_differs_is_not_timed(command, monkeypatch):
    diffusion = module("diffusion")
    convert = diffusion.from_diffusers
    monkeypatch.setattr(diffusion, "from_diffusers", lambda state, **options: convert(state, heads=6, image=8))
    options = SimpleNamespace(dit_depth=1, dit_side=8, dtype="float32", compile=False)
    with pytest.raises(ValueError, match="^zoo's DiT differs from diffusers' .*; neither was timed"):
        diffusion.calls(1, options)


def test_another_matching_is_not_timed(command, monkeypatch):
    losses = module("losses")
    found = losses.hungarian
    monkeypatch.setattr(losses, "hungarian", lambda own, *others: found(own._replace(boxes=own.boxes / 2), *others))
    with pytest.raises(ValueError, match="^matching differs from transformers .*; neither was timed"):
        losses.calls(2, 2, 9, 3)


def test_memory_is_that_of_a_process_of_its_own(measured):
    if not LINUX:
        assert "\nnot measured: " in measured[0].partition("## Peak memory")[2]
        return
    few, many = rows_of(measured[1], "memory")
    assert (few["mixer"], few["tokens"], many["tokens"]) == ("sla", "196", "3136")
    tokens = 3136 * 192 * 4 / 2**20  # MiB
    assert 2 * tokens < float(many["mib"]) < 50 * tokens  # input and output, and no more than the mixer needs
    slope = 1000 * (float(many["mib"]) - float(few["mib"])) / (3136 - 196)
    assert few["mib_per_1000_tokens"] == "" and float(many["mib_per_1000_tokens"]) == pytest.approx(slope)


def test_memory_of_training_is_that_of_states_and_of_what_autograd_keeps(command, measured):
    (row,) = rows_of(measured[1], "training_memory")
    assert row["model"] == "deit_tiny"
    assert float(row["states_gib"]) == pytest.approx(20 * 5.717e6 / 2**30, rel=0.01)
    assert 4 < float(row["mib"]) / float(row["mib_checkpointing"]) < 16
    activations = 2 * float(row["mib"]) / 1024
    assert float(row["ddp_gib"]) == pytest.approx(
        float(row["states_gib"]) + float(row["copies_gib"]) + activations, rel=1e-6
    )
    linear = torch.nn.Linear(3, 5)
    given = torch.randn(7, 3)
    saved = module("plan").Saved(linear)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        found = linear(given).exp()
    assert saved.live == 4 * 7 * (3 + 5)  # the input, for the weight's gradient, and the result of exp
    found.sum().backward()
    assert saved.live == 0 and saved.peak == 4 * 7 * (3 + 5)


def test_time_of_training_is_that_of_its_operations(measured):
    (row,) = rows_of(measured[1], "training_time")
    assert float(row["gflop"]) == pytest.approx(2.5, rel=0.05)
    assert float(row["samples_per_second"]) == pytest.approx(100e12 / (3e9 * float(row["gflop"])))
    assert float(row["hours_1"]) == pytest.approx(1e6 / float(row["samples_per_second"]) / 3600)
    # Steps of two images are shorter than the all-reduce of 5.7 M gradients.
    sent = 2 * 63 / 64 * 4 * 5.717e6 / 50e9
    assert float(row["reduce_64_ms"]) == pytest.approx(1e3 * sent, rel=0.01)
    slowed = (float(row["step_ms"]) / 3 + 1e3 * sent) / float(row["step_ms"])
    assert float(row["hours_64"]) == pytest.approx(float(row["hours_1"]) / 64 * slowed, rel=0.01)


def test_the_plan_is_that_of_the_code(command):
    plan = module("plan")
    options = command.argparse.Namespace(recipes=plan.RECIPES)
    text = (SCRIPTS.parent / "configs/cluster/README.md").read_text()
    assert plan.memory_table([*plan.training_memory(options)]) in text
    assert plan.time_table([*plan.training_time(options)]) in text


def test_speech_encoders_have_a_row_for_each_comparison(measured):
    found = [(row["model"], row["base"].split()[0], row["seconds"]) for row in rows_of(measured[1], "speech")]
    found += [(row["model"], row["base"].split()[0], row["seconds"]) for row in rows_of(measured[1], "parakeet")]
    assert found == [("squeezeformer_xs", "conformer_ctc_s", "1"), ("fastconformer_m", "transformers", "1")]


def test_real_time_is_a_share_of_the_audio_beside_operations_and_how_they_were_counted(measured):
    rows = rows_of(measured[1], "rtf")
    assert [row["model"] for row in rows] == ["conformer_ctc_s", "efficient_conformer_s"]
    for row in rows:
        assert row["seconds"] == "1" and float(row["rtf"]) == pytest.approx(float(row["ms"]) / 1e3)
        assert 0.3 < float(row["gflop"]) < 1.0 and row["counted"] == module("speech").COUNTED
    assert f"\nGFLOP by {module('speech').COUNTED}" in measured[0]


@pytest.mark.parametrize(
    "name, wanted",
    {
        "conformer_ctc_s": 29.3,
        "conformer_ctc_m": 77.9,
        "squeezeformer_xs": 17.8,
        "squeezeformer_sm": 46.9,
        "fastconformer_m": 27.6,
    }.items(),
)
def test_operations_of_half_a_minute(command, name, wanted):
    """The numbers were counted on attention written as matrix products; those that Zipformer's authors print for four
    of these models are within 3 % of them (Yao et al. 2023, arXiv:2310.11230)."""
    assert module("speech").gflop(name, 30) == pytest.approx(wanted, rel=0.03)


def test_long_audio_is_measured_part_by_part_in_time_and_memory(measured):
    if not LINUX:
        assert "\nnot measured: " in measured[0].partition("## Long audio")[2]
        return
    rows = rows_of(measured[1], "long")
    names, parts = ("relative", "sla, rope"), ("mixer", "block", "model")
    assert [(row["part"], row["mixer"]) for row in rows] == list(itertools.product(parts, names))
    tokens = 125 * 256 * 4 / 2**20  # MiB
    for row in rows:
        assert row["blocks"] == "1" and tokens < float(row["mib"]) < 1000 * tokens
        assert (row["ratio"], row["mib_ratio"]) == ("1.0", "1.0") or row["mixer"] != "relative"


@pytest.mark.skipif(not LINUX, reason="memory is read as Linux tells it")
def test_audio_that_does_not_fit_is_not_measured(command, tmp_path, capsys):
    command.main(["--only", "long", "--long", "5", "1000000", "--output", str(tmp_path)])
    said = r"\nnot measured: relative attention over 1000000 s of audio takes \d+\.\d GiB, and \d+\.\d GiB are "
    assert re.search(said, capsys.readouterr().out) and not (tmp_path / "long.csv").exists()


def test_without_transformers_its_encoder_is_not_measured(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(module("measure").NotMeasured, match="^transformers is not installed$"):
        next(module("speech").parakeet(command.argparse.Namespace()))


def test_an_encoder_of_other_weights_is_not_timed(command, monkeypatch):
    speech = module("speech")
    other = zoo.create_model(speech.TWIN, depth=1, vocabulary=0)
    monkeypatch.setattr(speech, "from_transformers", lambda folder: SimpleNamespace(model=other))
    with pytest.raises(ValueError, match="fastconformer_m differs from transformers .*; neither was timed"):
        next(speech.parakeet(command.argparse.Namespace(depth=1, audio=[1])))


@pytest.mark.parametrize("name", TIMED)
def test_numbers_are_positive_and_say_how_they_were_taken(measured, name):
    if name == "long" and not LINUX:
        pytest.skip("peak memory is read as Linux tells it")
    for row in rows_of(measured[1], name):
        for column in ("ms", *(ratio + end for ratio in TIMED[name] for end in ("", "_low", "_high"))):
            assert math.isfinite(float(row[column])) and float(row[column]) > 0, (row, column)
        for ratio in TIMED[name]:
            assert float(row[f"{ratio}_low"]) <= float(row[ratio]) <= float(row[f"{ratio}_high"])
        dtype = "bfloat16" if name == "diffusion_mixers" else "float32"
        taken = {"threads": "1", "dtype": dtype, "form": "eager", "torch": torch.__version__}
        taken |= {} if name == "training" else {"pairs": "1"}  # its pairs are epochs and steps
        assert row.items() >= taken.items()


def test_each_table_is_headed_by_its_conditions(measured):
    lines = [line for line in measured[0].splitlines() if line.startswith(f"torch {torch.__version__}, ")]
    assert len(lines) == len(TIMED) + 4  # two of memory, times that are computed, and operators on CUDA
    for line in lines:
        assert re.search(r", 1 thread, b?float\d\d, eager, .*, load average \d", line)
    assert sum(", at most 1 pairs and 8 s a point, CPU time, load " in line for line in lines) == len(TIMED) - 1
    for name in ON_PICTURES:
        assert f"\n| {name} " in measured[0]


@pytest.mark.parametrize("name", ["mixers", "operators", "long"])
def test_pictures_are_drawn(measured, name):
    if name == "long" and not LINUX:
        pytest.skip("peak memory is read as Linux tells it")
    assert (measured[1] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_this_machine_has_not_is_said_to_be_not_measured(measured):
    assert "\nnot measured: no CUDA device\n" in measured[0]
    assert not (measured[1] / "operators_cuda.csv").exists()


def test_bandwidth_is_that_of_bytes_counted_once(command):
    """On the CPU, by CPU time, for want of another device."""
    operators, measure = module("operators"), module("measure")
    rows = list(operators.traffic("cpu", measure.cpu_time, (2, 4, 6, 8, 2), 2**20, 3))
    value, sample, out = 2 * 24 * 8 * 2, 2 * 24 * 2 * 27 * 2, 2 * 24 * 8 * 2  # bytes in bfloat16
    assert [row["mb"] * 1e6 for row in rows] == pytest.approx([value + sample + out, 2 * (value + sample) + out])
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["mb"] / row["ms"])
        assert row["share"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
    assert operators.cuda_table([row | {"device": "none"} for row in rows]).count("2x4x6x8 G2, ") == 2


def test_half_precision_leaves_out_what_does_not_know_it(command, tmp_path, capsys):
    command.main(["--quick", "--only", "operators", "--dtype", "bfloat16", "--output", str(tmp_path)])
    rows = rows_of(tmp_path, "operators")
    assert {row["variant"] for row in rows} == {"operator", "grid_sample", "gathered", "softmax"}
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def wrong(*given):
    return 1.001 * module("models").by_grid_sample(*given)


def not_a_number(*given):
    return float("nan") * module("models").by_grid_sample(*given)


@pytest.mark.parametrize("table, form", [("operators", wrong), ("operators", not_a_number), ("deformable", wrong)])
def test_a_wrong_form_is_not_timed(command, tmp_path, capsys, table, form):
    with module("models").core(form), pytest.raises(SystemExit) as stopped:
        command.main(["--quick", "--only", table, "--output", str(tmp_path)])
    assert re.fullmatch(r"scripts/benchmark: \w+ differs from \w+ by .* of the largest value; .*", str(stopped.value))
    assert not (tmp_path / f"{table}.csv").exists()


def test_wrong_gradients_are_not_timed(command):
    operators = module("operators")
    options = command.argparse.Namespace(compile=False)
    cases = operators.dcnv4_forms(operators.dcnv4_inputs(1, 4, 6, 8, 2), options)
    form, inputs = cases["grid_sample"]
    cases["grid_sample"] = (lambda value, *others: form(value.detach() + 0 * value, *others), inputs)
    operators.check_dcnv4(cases, "forward")
    with pytest.raises(ValueError, match="grid_sample differs from operator"):
        operators.check_dcnv4(cases, "forward+backward")


def test_offsets_and_weights_lie_as_the_mixer_has_them(command):
    """Views of one tensor, group by group the offsets of all taps and then the weights of all taps."""
    value, offsets, weights, base, taps = module("operators").dcnv4_inputs(2, 4, 6, 8, 2)
    assert (value.shape, offsets.shape, weights.shape) == ((2, 4, 6, 8), (2, 24, 2, 9, 2), (2, 24, 2, 9))
    assert offsets.stride() == (24 * 54, 54, 27, 2, 1) and weights.stride() == (24 * 54, 54, 27, 1)
    assert offsets.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
    assert weights.storage_offset() - offsets.storage_offset() == 18
    fraction = offsets - offsets.floor()
    assert fraction.min() > 0.0009 and fraction.max() < 0.9991


def test_the_core_is_put_back(command):
    models = module("models")
    kept = models.KERNEL.aggregate
    with pytest.raises(KeyError), models.core(models.free):
        assert models.KERNEL.aggregate is models.free
        raise KeyError
    assert models.KERNEL.aggregate is kept


def test_rounds_alternate_who_goes_first(command, monkeypatch):
    measure = module("measure")
    monkeypatch.setattr(measure, "SHORTEST", 0.0)  # no call is repeated within its turn
    order: list[str] = []
    times = measure.rounds([lambda: order.append("a"), lambda: order.append("b")], 4, warm=2)
    assert len(times) == 4 and all(len(pair) == 2 for pair in times)
    assert "".join(order) == "ab" * 2 + "abbabaab"


def test_a_point_that_takes_long_gets_fewer_rounds(command):
    measure = module("measure")
    long = lambda: sum(range(300_000))  # noqa: E731
    assert len(measure.rounds([long], 1000, seconds=0.0)) == 3
    assert 3 <= len(measure.rounds([long], 1000, seconds=0.1)) < 1000
    assert len(measure.rounds([long], 2, seconds=0.0)) == 2


def test_a_wrong_option_is_one_clear_error():
    done = subprocess.run([SCRIPTS / "benchmark", "--only", "speed"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "invalid choice: 'speed'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_fits_80_columns(option: str):
    line = [sys.executable, str(SCRIPTS / "benchmark"), option]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and ("--warm" in done.stdout) == (option == "--help-all")
    assert len(lines) <= 24 or option == "--help-all"
