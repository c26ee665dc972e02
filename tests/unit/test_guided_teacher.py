"""Teachers that take the guidance scale as an input: fixed at one, they are what their stock pipeline is at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fastgen import pairs, recipe
from fastgen import train as training
from fastgen.data.pairs import fingerprint
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.guidance import with_guidance
from fastgen.pipelines import sd
from fastgen.recipe import Model
from fastgen.sampling import ddim, ddim_times, sample
from tests import command, tiny
from tests.oracle import optims

PROMPTS = ["a red apple", "a dog left of a cat"]
CPU = torch.device("cpu")


def embedded_pipeline(learnt: bool = True) -> Any:
    """As a run of method ``guidance`` leaves it: the U-Net has learnt what the scale does; else it never did."""
    pipeline = tiny.pipeline("v_prediction", time_cond_proj_dim=32)
    projection = pipeline.unet.time_embedding.cond_proj
    nn.init.normal_(projection.weight, std=0.5) if learnt else nn.init.zeros_(projection.weight)
    return pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """command.world, whose teacher takes the scale as an input; plain/ does not."""
    folder = command.world(tmp_path_factory.mktemp("world"))
    embedded_pipeline().save_pretrained(folder / "embedded")
    embedded_pipeline(learnt=False).save_pretrained(folder / "plain")
    return folder


def tree(world: Path, teacher: str, **model: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((world / "run.yaml").read_text())
    found["model"] = {"family": "sd", "path": str(world / teacher), **model}
    return found


def noise(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(3))


# What it is


@pytest.mark.parametrize("scale", [1.0, 2.5, 7.5])
def test_fixed_it_is_the_network_at_this_scale_and_ignores_any_other(scale: float) -> None:
    free, fixed = sd.wrap(embedded_pipeline()), sd.wrap(embedded_pipeline())
    cond, t = free.encode_prompts(PROMPTS), torch.tensor([999.0, 300.0])
    with torch.no_grad():
        expected = free.denoiser(noise(), t, with_guidance(cond, scale)).y
        without = free.denoiser(noise(), t, cond).y
        assert fixed.fix_guidance is not None
        fixed.fix_guidance(scale)
        torch.testing.assert_close(fixed.denoiser(noise(), t, cond).y, expected, rtol=1e-4, atol=1e-5)
        again = fixed.denoiser(noise(), t, with_guidance(cond, 5.0)).y
        torch.testing.assert_close(again, fixed.denoiser(noise(), t, cond).y)
    assert (expected - without).abs().max() > 1e-2
    assert sd.wrap(fixed.pipeline(fixed.denoiser.network, None)).fix_guidance is None


@pytest.mark.parametrize("scale", [2.5, 7.5])
def test_its_trajectory_is_the_stock_pipeline_s_call_at_this_scale(world: Path, scale: float) -> None:
    """One pass a step, with no guidance beside it."""
    stock = DiffusionPipeline.from_pretrained(world / "embedded")
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "latents": noise(), "output_type": "latent"}
    wanted = stock(PROMPTS, guidance_scale=scale, **call).images
    other = stock(PROMPTS, guidance_scale=scale + 2, **call).images
    family, _ = training.load_teacher(Model(str(world / "embedded"), guidance_scale=scale), "fp32", CPU)
    rows: list[int] = []
    family.denoiser.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    schedule = family.denoiser.schedule
    with torch.no_grad():
        teacher = guided(family.denoiser, family.uncond(), 1.0)
        found = sample(teacher, schedule, noise(), ddim_times(schedule, 4), family.encode_prompts(PROMPTS), ddim)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (wanted - other).abs().max() > 1e-2
    assert rows == [2] * 4


def test_pairs_made_at_two_scales_are_of_two_teachers() -> None:
    found = []
    for scale in (2.5, 7.5, 2.5):
        family = sd.wrap(embedded_pipeline())
        assert family.fix_guidance is not None
        family.fix_guidance(scale)
        found.append(fingerprint(family))
    assert found[0] == found[2] != found[1]


def test_a_student_and_a_fake_score_start_as_the_fixed_teacher(world: Path) -> None:
    changed = tree(world, "embedded", guidance_scale=7.5)
    changed["method"]["guidance_scale"] = 1.0
    session = training.build(recipe.decode(changed, "run.yaml"), CPU)
    cond, t, denoiser = session.family.encode_prompts(PROMPTS), torch.tensor([999.0, 300.0]), session.family.denoiser
    free = sd.wrap(embedded_pipeline())
    with torch.no_grad():
        expected = free.denoiser(noise(), t, with_guidance(cond, 7.5)).y
        for role, network in session.method.networks.items():
            found = denoiser.with_network(network)(noise(), t, cond).y
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=role)
    assert set(session.method.networks) == {"teacher", "student", "fake_score"} == {*optims(session.method), "teacher"}


# What is refused


def refuse(message: str, found: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        training.build(recipe.decode(found, "run.yaml"), CPU)


def test_without_a_scale_it_is_refused_with_the_remedy(world: Path) -> None:
    message = r"embedded: its network takes the guidance scale as an input, .* set model\.guidance_scale to the one"
    refuse(message, tree(world, "embedded"))
    maker = {key: value for key, value in tree(world, "embedded").items() if key in ("model", "data")}
    maker["pairs"] = {"out": str(world / "pairs"), "number": 2, "num_steps": 2, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        pairs.make(pairs.decode(maker, "pairs.yaml"), CPU)
    maker["model"]["guidance_scale"] = 7.5
    assert pairs.make(pairs.decode(maker, "pairs.yaml"), CPU) == 2


def test_a_scale_for_a_network_that_takes_none_is_refused(world: Path) -> None:
    """Also one that has the input, but has learnt nothing of it, as most students leave."""
    for name in ("teacher", "plain"):
        refuse(
            rf"{name}: its network takes no guidance scale as an input, so leave out model\.guidance_scale",
            (tree(world, name, guidance_scale=3.0) | {"method": {"name": "dmd2", "guidance_scale": 1.0}}),
        )
    assert training.build(recipe.decode(tree(world, "plain"), "run.yaml"), CPU).family.fix_guidance is None


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"name": "dmd2", "guidance_scale": 3.0}, r"method\.guidance_scale 3"),
        ({"name": "lcm", "guidance": {"low": 1.0, "high": 15.0}}, r"method\.guidance\.high 15"),
        ({"name": "lcm", "guidance": {"low": 2.0, "high": 2.0, "embed": False}}, r"method\.guidance\.low 2"),
    ],
)
def test_it_is_not_guided_twice(world: Path, method: dict[str, Any], key: str) -> None:
    found = tree(world, "embedded", guidance_scale=7.5) | {"method": method}
    refuse(rf"^{key} would guide a teacher again that is guided by model\.guidance_scale 7\.5 already; set ", found)


def test_pairs_are_not_guided_twice(world: Path) -> None:
    maker = {
        key: value for key, value in tree(world, "embedded", guidance_scale=2.0).items() if key in ("model", "data")
    }
    maker["pairs"] = {"out": str(world / "twice"), "number": 2}
    with pytest.raises(ValueError, match=r"^pairs\.guidance_scale 7\.5 would guide .*; set pairs\.guidance_scale=1$"):
        pairs.make(pairs.decode(maker, "pairs.yaml"), CPU)
    assert not (world / "twice").exists()


def test_an_adapter_of_it_is_refused_before_training(world: Path) -> None:
    found = tree(world, "embedded", guidance_scale=2.0) | {"method": {"name": "dmd2", "guidance_scale": 1.0}}
    found["student"] = {"lora": {"rank": 2}}
    refuse(
        r"student\.lora: an adapter would fit no pipeline but this teacher's at its fixed model\.guidance_scale", found
    )


def test_a_family_says_whether_its_network_takes_the_scale() -> None:
    def takes(pipeline: Any) -> bool:
        family: Family = sd.wrap(pipeline)
        return family.fix_guidance is not None

    assert takes(embedded_pipeline())
    assert not takes(embedded_pipeline(learnt=False))
    assert not takes(tiny.pipeline())
