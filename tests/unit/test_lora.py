"""Adapters: what they are, that switching them is the same as having several networks, and how they leave."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastgen import checkpoint, config, export, lora, recipe
from fastgen import train as training
from fastgen.denoiser import Denoiser
from fastgen.discriminator import features
from fastgen.ema import EMA
from fastgen.engine import Engine
from fastgen.family import Family
from fastgen.lora import Lora, View
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.trainers import dmd2, sid
from tests import command, tiny
from tests.oracle import Samples, conv_family, gaussian_family, labels, optims, same, states, train

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = Lora(rank=4, alpha=6)
CONV = Samples((2, 8, 8))


def shaken(view: nn.Module, by: float = 0.1, seed: int = 0) -> Any:
    """Parameters that are no longer those at the start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.parameters():
            p += by * torch.randn(p.shape, generator=g)
    return view


def called(network: nn.Module, seed: int = 0) -> Tensor:
    """What a toy network makes of some input."""
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, 2, 8, 8, generator=g), torch.tensor([10.0, 900.0])
    return network(x, t, labels(["left", "right"])["label"])  # type: ignore[no-any-return]


def toy(share: bool = True, options: Lora = LORA) -> Family:
    return lora.adapted(conv_family(), options, share)


# A view


def test_a_new_adapter_changes_nothing_to_the_bit() -> None:
    family = toy()
    teacher = conv_family().denoiser.network
    with torch.no_grad():
        for network in (family.denoiser.network, family.student(), copy.deepcopy(family.denoiser.network)):
            assert torch.equal(called(network), called(teacher))


def test_a_view_shows_the_parameters_of_its_role_alone() -> None:
    family = toy()
    teacher, student = family.denoiser.network, family.student()
    assert set(teacher.state_dict()) == set(conv_family().denoiser.network.state_dict())
    layers = ["enter", "label", "time", "down.0", "mid.0", "leave"]
    assert set(student.state_dict()) == {f"{n}.lora_{ab}.weight" for n in layers for ab in "AB"}
    assert student.state_dict()["enter.lora_A.weight"].shape[0] == LORA.rank
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    later = lora.view(teacher, LORA)  # made when there are adapters already
    assert same(later.state_dict(), teacher.state_dict())


def test_each_role_is_called_with_its_own_adapter_whatever_was_called_before() -> None:
    """y = W x + (alpha / rank) B A x, checked on one layer."""
    family = toy(options=Lora(rank=2, alpha=6, targets=["leave"]))
    teacher, student = family.denoiser.network, shaken(family.student(), seed=1)
    other = shaken(copy.deepcopy(teacher), seed=2)
    with torch.no_grad():
        alone = [called(n) for n in (teacher, student, other)]
        assert torch.equal(alone[0], called(conv_family().denoiser.network))
        for i in (2, 0, 1, 1, 0, 2):
            assert torch.equal(called((teacher, student, other)[i]), alone[i])
        for view, found in ((student, alone[1]), (other, alone[2])):
            plain = conv_family().denoiser.network
            a, b = view.state_dict()["leave.lora_A.weight"], view.state_dict()["leave.lora_B.weight"]
            plain.leave.weight += 3 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
            torch.testing.assert_close(called(plain), found)


def test_a_copy_of_a_view_has_an_adapter_of_its_own_of_the_same_values() -> None:
    student = shaken(toy().student())
    target = copy.deepcopy(student).requires_grad_(False)
    assert same(student.state_dict(), target.state_dict())
    before = {k: v.clone() for k, v in target.state_dict().items()}
    shaken(student)
    assert same(before, target.state_dict())
    assert lora.plain(target) is lora.plain(student)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in target.parameters())


def test_there_is_one_copy_of_the_weights() -> None:
    family = conv_family()
    own = {p.data_ptr() for p in family.denoiser.network.parameters()}
    for share in (True, False):
        made = lora.adapted(family, LORA, share)
        views = [made.student(), made.student(), *([copy.deepcopy(made.denoiser.network)] if share else [])]
        backbone = lora.plain(views[0])
        assert {p.data_ptr() for n, p in backbone.named_parameters() if ".lora_" not in n} == own
        assert all(lora.plain(view) is backbone for view in views)
    assert isinstance(toy(False).denoiser.network, nn.Module)
    assert not isinstance(toy(False).denoiser.network, View)


def test_features_are_read_with_the_adapter_of_the_role() -> None:
    family = toy()
    student = family.denoiser.with_network(shaken(family.student()))
    x, t, cond = torch.randn(2, 2, 8, 8), torch.tensor([10.0, 900.0]), labels(["left", "right"])
    with torch.no_grad():
        (plain,) = features(family.denoiser, ["mid"], x, t, cond)
        (own,) = features(student, ["mid"], x, t, cond)
        fused = family.denoiser.with_network(lora.fused(student.network))
        torch.testing.assert_close(features(fused, ["mid"], x, t, cond)[0], own)
    assert (plain - own).abs().max() > 0.01


def test_fused_weights_give_what_the_adapter_gives_and_are_plain() -> None:
    family = toy()
    student = shaken(family.student())
    fused = lora.fused(student)
    with torch.no_grad():
        torch.testing.assert_close(called(fused), called(student))
        assert torch.equal(called(lora.fused(family.denoiser.network)), called(conv_family().denoiser.network))
    assert set(fused.state_dict()) == set(conv_family().denoiser.network.state_dict())
    assert {type(m) for m in fused.modules()} == {type(m) for m in conv_family().denoiser.network.modules()}
    assert not any(p.requires_grad for p in fused.parameters())
    network = nn.Linear(2, 2)
    assert lora.fused(network) is network
    assert called(student).requires_grad  # the view itself goes on learning


# One network or several


def separate(name: str, options: Any, num_steps: int) -> Any:
    """The method with a network for each role, the fake score's being a whole copy with an adapter."""
    torch.manual_seed(1)
    method: Any = METHODS[name].Method(options, toy(share=False), num_steps)
    teacher = copy.deepcopy(method.teacher.network)
    fake = lora.view(teacher, LORA).with_adapter()
    assert len({id(lora.plain(n)) for n in (method.teacher.network, method.student.network, fake)}) == 3
    method.fake_score = method.teacher.with_network(fake)
    method.networks["fake_score"] = fake
    if method.adversary:
        method.adversary.backbone = method.fake_score
    return method


def shared(name: str, options: Any, num_steps: int) -> Any:
    torch.manual_seed(1)
    method = METHODS[name].Method(options, toy(), num_steps)
    assert len({id(lora.plain(method.networks[r])) for r in ("teacher", "student", "fake_score")}) == 1
    return method


METHODS: dict[str, Any] = {"dmd2": dmd2, "sid": sid}
GAN = dmd2.Adversarial(weight=0.1, critic_weight=0.1, features="fake_score", blocks=["down", "mid"])


@pytest.mark.parametrize(
    ("name", "options", "num_steps"),
    [
        ("dmd2", dmd2.Config(student_every=2, guidance_scale=3.0), 2),
        ("dmd2", dmd2.Config(student_every=1, guidance_scale=2.0, adversarial=GAN), 1),
        ("sid", sid.Config(student_every=1, guidance_scale=2.0), 1),  # gradients pass through both scores
    ],
)
def test_one_network_with_adapters_switched_equals_a_network_for_each_role(
    name: str, options: Any, num_steps: int
) -> None:
    """The same losses, gradients and weights to rounding."""
    one, several = shared(name, options, num_steps), separate(name, options, num_steps)
    for role in several.networks:
        if role != "teacher":
            several.networks[role].load_state_dict(one.networks[role].state_dict())
    for step, phase in ((s, p) for s in range(3) for p in range(2)):
        results = []
        for method in (one, several):
            terms = method.phases[phase].loss(CONV.batch(range(4)), Noise(range(4), 0, step, "x"))
            learning = [p for r in method.phases[phase].trains for p in method.networks[r].parameters()]
            gradients = torch.autograd.grad(sum(t.sum() for t in terms.values()), learning)  # type: ignore[arg-type]
            results.append((terms, gradients))
        (terms, gradients), (expected, wanted) = results
        for key in expected:
            torch.testing.assert_close(terms[key], expected[key], rtol=1e-4, atol=1e-6)
        size = max(g.abs().max() for g in wanted)
        for g, w in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * size.item())
        for method in (one, several):  # so that the next step is not at the start, where B is 0
            for role in method.phases[phase].trains:
                shaken(method.networks[role], 0.02, seed=step)
    logs = [
        train(Engine(m, CONV, optims(m, lr=1e-3, eps=1e-4), batch_size=4, steps=6), range(6)) for m in (one, several)
    ]
    for found, wanted_logs in zip(*logs, strict=True):
        assert found == pytest.approx(wanted_logs, rel=1e-3, abs=1e-6)
    for role in ("student", "fake_score"):
        for key, value in one.networks[role].state_dict().items():
            torch.testing.assert_close(value, several.networks[role].state_dict()[key], rtol=1e-3, atol=1e-5)


def test_training_a_role_leaves_the_network_and_the_other_roles_as_they_are() -> None:
    method = shared("dmd2", dmd2.Config(student_every=1, guidance_scale=2.0), 1)
    engine = Engine(method, CONV, optims(method, lr=1e-2), batch_size=2, steps=9)
    for i, role in enumerate(("fake_score", "student")):
        before = states(method)
        engine.turn(method.phases[i], 3)
        after = states(method)
        assert {r for r in before if not same(before[r], after[r])} == {role}


def chained(method: Any, checkpointing: Callable[[Any], None] | None) -> list[Tensor]:
    """Gradients of a student whose loss passes through all three roles of one U-Net."""
    if checkpointing:
        checkpointing(method.student.network)
    family_cond = {"text": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))}
    batch = dataclasses.replace(
        CONV.batch(range(2)), cond=family_cond, uncond={k: v[:1] for k, v in family_cond.items()}
    )
    terms = method.student_loss(batch, Noise(range(2), 0, 0, "student"))
    return list(torch.autograd.grad(terms["sid"].sum(), list(method.student.network.parameters())))


def sid_on_one_unet() -> Any:
    torch.manual_seed(2)
    family = lora.adapted(sd.wrap(tiny.pipeline("v_prediction")), Lora(rank=2, targets=ATTENTION), True)
    method = sid.Method(sid.Config(guidance_scale=2.0), family, 1)
    for i, role in enumerate(("student", "fake_score")):
        shaken(method.networks[role], 0.2, seed=i)
    method.networks["fake_score"].requires_grad_(False)
    return method


def test_gradient_checkpointing_recomputes_with_the_adapter_of_the_first_pass() -> None:
    """Diffusers' own way recomputes with whichever is on when the gradient comes back."""
    expected = chained(sid_on_one_unet(), None)
    ours = chained(sid_on_one_unet(), lambda view: view.enable_gradient_checkpointing())
    size = max(g.abs().max().item() for g in expected)
    for g, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5 * size)
    with pytest.raises(CheckpointError):  # some roles keep other tensors than the one recomputed
        chained(sid_on_one_unet(), lambda view: view.backbone.network.enable_gradient_checkpointing())


# Checkpoints


def test_a_checkpoint_holds_adapters_only_and_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    def start() -> tuple[Any, Engine, dict[str, EMA]]:
        method = shared("dmd2", dmd2.Config(student_every=2, guidance_scale=2.0), 1)
        ema = {"student": EMA(method.networks["student"], 0.9)}
        return method, Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, steps=8), ema

    def go(engine: Engine, ema: dict[str, EMA], steps: range) -> None:
        for _ in engine.run(steps):
            ema["student"].update()

    method, engine, ema = start()
    go(engine, ema, range(5))
    _, first, first_ema = start()
    go(first, first_ema, range(3))
    path = checkpoint.save(tmp_path, 3, first, first_ema, 1)
    for role in ("student", "fake_score", "student.ema"):
        assert all(".lora_" in name for name in load_file(path / f"{role}.safetensors"))
    assert not (path / "teacher.safetensors").exists()
    resumed, second, second_ema = start()
    shaken(resumed.networks["student"])
    go(second, second_ema, range(checkpoint.load(path, second, second_ema), 5))
    assert all(same(one, states(resumed)[role]) for role, one in states(method).items())
    assert same(ema["student"].average, second_ema["student"].average)


# Out of the door


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def run_of(world: Path, out: Path, **student: Any) -> recipe.Recipe:
    tree = config.read(world / "run.yaml")
    tree["student"] |= {"lora": {"rank": 4, "alpha": 6}} | student
    tree["run"] |= {"out": str(out), "steps": 2, "sample_every": 0}
    return recipe.decode(tree, "run.yaml")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> training.Session:
    """A run whose three roles are one network, with the adapters moved far enough to matter, and exported."""
    run = tmp_path_factory.mktemp("run") / "run"
    session = training.build(run_of(world, run, share_backbone=True))
    for _ in session.engine.run(range(2)):
        session.ema["student"].update()
    shaken(session.method.networks["student"], 0.05)
    session.ema["student"].updates = 0
    session.ema["student"].decay = 0.0
    session.ema["student"].update()
    training.export_run(session, run / "pipeline")
    return session


def stock_call(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 1, "output_type": "latent"} | options
    return pipeline(tiny.PROMPTS[:2], generator=g, **call).images  # type: ignore[no-any-return]


def ours(session: training.Session) -> Tensor:
    """The trainer's own sampler, with the adapter unfused."""
    family, network = session.family, session.method.networks["student"]
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.full((2,), 999.0, dtype=torch.float64)
    student = Denoiser(network, family.denoiser.schedule, family.denoiser.kind, family.denoiser.call)
    with torch.no_grad():
        return student(x_t, t, family.encode_prompts(tiny.PROMPTS[:2])).x0


def close(one: Tensor, two: Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def test_the_fused_pipeline_is_stock_and_gives_what_the_adapter_gives(finished: training.Session) -> None:
    run = Path(finished.recipe.run.out)
    pipeline = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert not [name for name in pipeline.unet.state_dict() if "lora" in name]
    close(stock_call(pipeline), ours(finished))
    close(stock_call(pipeline, guidance_scale=7.5), ours(finished))


def test_the_adapter_alone_loads_in_the_stock_teacher_and_gives_the_same(
    finished: training.Session, world: Path
) -> None:
    """At guidance scale 1, as its card says: a plain teacher guides by itself, a student's pipeline does not."""
    folder = Path(finished.recipe.run.out) / "lora"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "fastgen.json",
        export.LORA,
        "samples.png",
        "scheduler",
    ]
    teacher = StableDiffusionPipeline.from_pretrained(world / "teacher")
    teacher.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    plain = stock_call(teacher, guidance_scale=1.0)
    teacher.load_lora_weights(folder)
    found = stock_call(teacher, guidance_scale=1.0)
    close(found, ours(finished))
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()
    teacher.fuse_lora()
    close(stock_call(teacher, guidance_scale=1.0), ours(finished))
    card = export.read_card(folder)
    assert card["guidance_scale"] == 1.0
    assert card["base_model"] == str(world / "teacher")
    assert "guidance_scale 1" in card["use"]


def weights_of(session: training.Session) -> dict[str, Tensor]:
    network = session.method.networks["student"]
    assert isinstance(network, View)
    return lora.weights(network, "unet")


def exported(
    session: training.Session, world: Path, weights: dict[str, Tensor], folder: Path, **options: Any
) -> float:
    pipeline = Path(session.recipe.run.out) / "pipeline"
    call = {"num_steps": 1, "prompts": tiny.PROMPTS[:2], "card": {}} | options
    opener = functools.partial(export.from_pretrained, pipeline)
    return export.export_adapter(session.family, opener, [weights], str(world / "teacher"), folder, **call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_file_may_be_in_half_precision(
    finished: training.Session, world: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    assert exported(finished, world, weights_of(finished), tmp_path / "lora", dtype=dtype) < export.HALF_TOLERANCE
    assert {v.dtype for v in load_file(tmp_path / "lora" / export.LORA).values()} == {dtype}


def test_a_file_of_which_something_would_be_dropped_is_refused_by_key(
    finished: training.Session, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = weights_of(finished)
    extra = {"unet.nowhere.lora_A.weight": torch.zeros(4, 4), "unet.nowhere.lora_B.weight": torch.zeros(4, 4)}
    for wrong, message in (
        ({**weights, **extra}, r"(drops \['unet.nowhere.lora_A.weight'|does not load it)"),
        ({f"other{name[4:]}": v for name, v in weights.items()}, r"(drops \['other\.|does not load it)"),
        ({n: 2 * v if "lora_B" in n else v for n, v in weights.items()}, "differs from the exported pipeline by"),
    ):
        with pytest.raises(export.ExportError, match=message):
            exported(finished, world, wrong, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_the_scale_is_in_the_file_so_that_it_needs_no_alpha(finished: training.Session) -> None:
    weights, network = weights_of(finished), finished.method.networks["student"]
    own = network.state_dict()
    assert weights.keys() == {f"unet.{name}" for name in own}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(weights[f"unet.{name}.lora_A.weight"], own[f"{name}.lora_A.weight"])
    assert torch.equal(weights[f"unet.{name}.lora_B.weight"], own[f"{name}.lora_B.weight"] * 1.5)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_run_trains_and_exports_both(world: Path, tmp_path: Path, share: bool, checkpointing: bool) -> None:
    chosen = run_of(world, tmp_path / "run", share_backbone=share, lora={"rank": 2, "targets": ATTENTION})
    chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, gradient_checkpointing=checkpointing))
    assert recipe.decode(recipe.encode(chosen), "again") == chosen
    run = training.train(chosen)
    assert (run / "pipeline" / "model_index.json").is_file()
    assert (run / "lora" / export.LORA).is_file()
    names = set(load_file(run / "checkpoint-2" / "student.safetensors"))
    assert names
    assert all(".lora_" in name for name in names)
    whole = set(load_file(run / "checkpoint-2" / "fake_score.safetensors"))
    assert all(".lora_" in name for name in whole) == share


def test_a_student_of_adapters_may_take_the_guidance_scale_as_an_input() -> None:
    """Its projection, zero in the frozen network, learns by an adapter; what has none is not asked for it."""
    family = lora.adapted(sd.wrap(tiny.pipeline("v_prediction")), LORA)
    plain, embedding = family.student(), shaken(family.student(embed_guidance=True))
    added = set(embedding.state_dict()) - set(plain.state_dict())
    assert added == {f"time_embedding.cond_proj.lora_{ab}.weight" for ab in "AB"}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    cond = family.encode_prompts(tiny.PROMPTS[:2])
    student = family.denoiser.with_network(embedding)
    with torch.no_grad():
        one, two = (student(x, t, {**cond, "guidance": torch.full((2,), w)}).y for w in (2.0, 7.0))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("embed", [False, True])
def test_a_file_is_read_back_on_this_checkpoint_and_on_another(tmp_path: Path, embed: bool) -> None:
    family = sd.wrap(tiny.pipeline("v_prediction"))
    view = shaken(lora.adapted(family, LORA).student(embed_guidance=embed))
    save_file(lora.weights(view, "unet"), tmp_path / "file.safetensors")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    cond = family.encode_prompts(tiny.PROMPTS[:2])
    cond = {**cond, "guidance": torch.tensor([2.0, 7.0])} if embed else cond
    with torch.no_grad():
        wanted = family.denoiser.with_network(view)(x, t, cond).y
        for other in (family, lora.adapted(family, Lora(rank=2))):
            again = lora.loaded(other, tmp_path / "file.safetensors", embed_guidance=embed)
            torch.testing.assert_close(other.denoiser.with_network(again)(x, t, cond).y, wanted, rtol=1e-4, atol=1e-5)
        elsewhere = sd.wrap(tiny.pipeline("v_prediction", seed=5))
        moved = lora.loaded(elsewhere, tmp_path / "file.safetensors", embed_guidance=embed)
        name = "mid_block.attentions.0.proj_in"
        for one, two in ((view, family), (moved, elsewhere)):
            base = two.denoiser.network.get_submodule(name).weight
            change = lora.fused(one).get_submodule(name).weight - base
            a, b = (view.state_dict()[f"{name}.lora_{ab}.weight"] for ab in "AB")
            torch.testing.assert_close(change[:, :, 0, 0], 1.5 * b[:, :, 0, 0] @ a[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_a_file_of_another_base_is_told_by_its_keys(tmp_path: Path) -> None:
    family = sd.wrap(tiny.pipeline())
    weights = lora.weights(lora.adapted(family, Lora(rank=2, targets=ATTENTION)).student(), "unet")
    first = sorted(name for name in weights if "to_q.lora_A" in name)[0]
    file = tmp_path / "file.safetensors"
    save_file({**weights, "unet.nowhere.lora_A.weight": torch.zeros(2, 4)}, file)
    with pytest.raises(
        ValueError, match=r"has no place for \['nowhere.lora_A.weight'\]; it is an adapter of another base"
    ):
        lora.loaded(family, file)
    save_file({**weights, first: torch.zeros(2, 3)}, file)
    with pytest.raises(ValueError, match=r"file.safetensors: \['.*to_q.lora_A.weight'\] do not fit this network"):
        lora.loaded(family, file)
    save_file({name: value for name, value in weights.items() if name != first}, file)
    with pytest.raises(ValueError, match="do not fit this network"):
        lora.loaded(family, file)


@pytest.mark.parametrize("embed", [False, True])
def test_adapters_that_hold_guidance_leave_too(world: Path, tmp_path: Path, embed: bool) -> None:
    """With a fixed scale as any LoRA file; with the scale as an input, which stock teachers cannot take, as ours."""
    tree = config.read(world / "run.yaml")
    tree["method"] = {"name": "agd", "states": 2, "lora": {"rank": 2, "alpha": 6}, "guidance": {"embed": embed}}
    tree["optim"] = {"student": {"lr": 0.01}}
    tree["run"] |= {"out": str(tmp_path / "run"), "steps": 2, "sample_every": 0}
    run = training.train(recipe.decode(tree, "run.yaml"))
    assert ("load_lora_weights" in export.read_card(run / "lora")["use"]) == (not embed)
    assert export.read_card(run / "lora")["guidance_scale"] == (7.5 if embed else 1.0)
    student = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    family = sd.load(world / "teacher")
    again = family.denoiser.with_network(lora.loaded(family, run / "lora" / export.LORA, embed_guidance=embed))
    fused = family.denoiser.with_network(student.unet)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    cond = family.encode_prompts(tiny.PROMPTS[:2])
    cond = {**cond, "guidance": torch.tensor([2.0, 7.0])} if embed else cond
    with torch.no_grad():
        found = again(x, t, cond).y
        torch.testing.assert_close(found, fused(x, t, cond).y, rtol=1e-4, atol=1e-4)
        assert (found - family.denoiser(x, t, family.encode_prompts(tiny.PROMPTS[:2])).y).abs().max() > 1e-3


# Mistakes


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"lora": None, "share_backbone": True}, r"student: share_backbone needs adapters; add lora: \{rank: 64\}"),
        ({"lora": {"rank": 0}}, "student.lora.rank must be at least 1"),
        ({"lora": {"alpha": 0}}, "student.lora.alpha must be above 0"),
        ({"lora": {"ranks": 4}}, "unknown key 'student.lora.ranks'; did you mean 'rank'"),
    ],
)
def test_a_recipe_says_what_is_wrong(world: Path, tmp_path: Path, student: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(world, tmp_path, **student)


def test_a_target_that_is_no_layer_is_told() -> None:
    family = sd.wrap(tiny.pipeline())
    with pytest.raises(ValueError, match=r"lora.targets: no linear or convolution layer 'to_qq'; did you mean 'to_q'"):
        lora.adapted(family, Lora(targets=["to_qq"]))
    chosen: Any = lora.adapted(family, Lora(rank=2, targets=ATTENTION)).student()
    assert {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in chosen.state_dict()} == set(ATTENTION)


def test_a_network_without_layers_for_adapters_is_told() -> None:
    with pytest.raises(ValueError, match="lora: Affine has no linear or convolution layer; train it without adapters"):
        lora.adapted(gaussian_family(), LORA)


def test_a_student_that_does_not_start_as_the_teacher_cannot_share_its_network() -> None:
    family = conv_family()
    moved = dataclasses.replace(family, student=lambda: shaken(family.student()))
    with pytest.raises(ValueError, match=r"leave out student.init or student.share_backbone"):
        lora.adapted(moved, LORA, share_backbone=True)
    apart = lora.adapted(moved, LORA)
    with torch.no_grad():
        assert torch.equal(called(apart.student()), called(moved.student()))


def test_a_method_that_trains_the_teacher_itself_cannot_take_adapters(world: Path, tmp_path: Path) -> None:
    chosen = run_of(world, tmp_path)
    tree = recipe.encode(chosen)
    tree |= {"method": {"name": "pretrain"}, "optim": {"teacher": {}}}
    tree["data"] = {"source": "images", "path": str(world / "images")}
    for share in (False, True):
        tree["student"]["share_backbone"] = share
        with pytest.raises(ValueError, match=r"student.lora: method 'pretrain' trains 'teacher' without adapters"):
            training.build(recipe.decode(tree, "tree"), torch.device("cpu"))


def test_a_shared_network_is_not_compiled(world: Path, tmp_path: Path) -> None:
    chosen = run_of(world, tmp_path, share_backbone=True)
    chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, compile=True))
    with pytest.raises(ValueError, match=r"compile anew at each switch of adapters; leave out student.share_backbone"):
        training.build(chosen, torch.device("cpu"))


def test_a_file_with_a_wrong_shape_is_not_written(finished: training.Session, world: Path, tmp_path: Path) -> None:
    weights = {n: v[..., :1].contiguous() if "to_q.lora_A" in n else v for n, v in weights_of(finished).items()}
    with pytest.raises(export.ExportError, match=f"{export.LORA} not written: .* does not load it"):
        exported(finished, world, weights, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
