"""A generator whose tokens are brought close to the features of a teacher."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer

import zoo
from training import refused
from zoo.data.generation import WholeImages
from zoo.data.images import Batch
from zoo.inputs.images import ImagePreprocess
from zoo.tasks.alignment import Alignment
from zoo.tasks.generate.train import Generate

TEACHER = "vit_micro(patch=2, image=8, dim=16, depth=1, heads=2)"
SMALL = {"name": "dit_micro", "dim": 32, "depth": 3, "heads": 2, "classes": 10}


def task_of(**options: Any) -> Any:
    torch.manual_seed(0)
    task: Any = Generate(SMALL, teacher=TEACHER, teacher_weights=None, **options)
    data = SimpleNamespace(preprocess=ImagePreprocess(size=8, channels=1, mean=(0.5,), std=(0.5,)))
    task._trainer = SimpleNamespace(datamodule=data, current_epoch=0, global_step=0, global_rank=0)
    task.log = lambda *given, **more: None
    return task.train()


@pytest.mark.parametrize(("block", "index"), [(0, 0), (3, 2)])
def test_the_loss_has_the_distance_of_a_block_from_the_teacher(block, index):
    batch = Batch(torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4), ())
    task = task_of(teacher_block=block, label_drop=0.0, alignment=0.7)
    torch.nn.init.normal_(task.model.out.weight)
    teacher = task.alignment._teacher[0]
    shown: list[torch.Tensor] = []
    teacher.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    torch.manual_seed(1)
    total = task.training_step(batch, 0)
    # The same noise and times, without the teacher.
    torch.manual_seed(1)
    times, _ = task.objective.draw(4, "linear", "cpu", False)
    noise = torch.randn_like(batch.images)
    plain = task.objective(task.model, batch.images, batch.labels, times, noise).mean()
    mixed = (1 - times.view(-1, 1, 1, 1)) * batch.images + times.view(-1, 1, 1, 1) * noise
    maps = task.model.features(mixed, [index], time=times, labels=batch.labels)[0]
    grey = (batch.images * 0.5 + 0.5 - 0.449) / 0.226
    assert torch.allclose(shown[0], grey, atol=1e-6)
    apart = task.alignment(maps.flatten(2).transpose(1, 2), (4, 4), None, grey)
    assert total.item() == pytest.approx(plain.item() + 0.7 * apart.item(), rel=1e-5) and apart.item() > 0.1
    total.backward()
    for name, each in [*task.alignment.named_parameters(), *task.model.blocks[index].named_parameters()]:
        if "modulation" in name or "project" in name:
            assert each.grad is not None and each.grad.any(), name
    assert all(each.grad is None for each in teacher.parameters())


def test_a_run_trains_the_projection_and_saves_the_model_alone(tmp_path):
    task: Any = Generate(SMALL, teacher=TEACHER, teacher_weights=None, teacher_size=16, show=0)
    before = {name: each.clone() for name, each in task.alignment.named_parameters()}
    data = WholeImages("digits", size=8, channels=1, batch=32, workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=2, limit_val_batches=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, data)
    assert all(not torch.equal(each, before[name]) for name, each in task.alignment.named_parameters())
    assert not any("teacher" in name for name in task.state_dict())
    zoo.save_model(task.model, tmp_path / "kept")
    assert not any("project" in name for name in zoo.load_model(tmp_path / "kept").state_dict())


def test_in_half_precision_the_teacher_sees_single():
    module = Alignment(12, TEACHER, None, 1, 8, hidden=16).to(torch.bfloat16)
    loss = module(torch.randn(2, 16, 12).bfloat16(), (4, 4), None, torch.randn(2, 1, 8, 8).bfloat16())
    assert bool(loss.isfinite())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.backbone.name=dico_s"], "model.teacher needs a model of the family dit"),
        (["--model.backbone.name=dit_micro", "--model.teacher_block=7"], "model.teacher_block one of its blocks"),
        (["--model.backbone.name=dit_micro", "--model.alignment=0"], "model.alignment must be > 0"),
        (["--model.backbone.name=dit_micro", "--model.teacher=vit_nano"], "model.teacher: "),
    ],
)
def test_refused_options(flags, words, tmp_path):
    given = ["--model.teacher=vit_micro(patch=2)", "--model.teacher_weights=null", "--data.dataset=digits", *flags]
    message = refused("generate", "fit", *given, "--data.channels=1", f"--trainer.default_root_dir={tmp_path}/run")
    assert words in message
