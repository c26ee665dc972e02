"""Every attention kernel of this machine against two plain matrix products, in each number format that it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen import attention, derivative, recipe
from tests.gpu import world
from tests.gpu.report import note

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
"""Of outputs and gradients, |difference| / |expected| of all together; bfloat16 has 8 binary digits, float16 11."""
SHAPES = {"self": (256, 256), "cross": (256, 77)}
"""Numbers of queries and of keys; 77 is a text's."""


def inputs(shape: str, heads: int = 4, width: int = 64) -> list[Tensor]:
    """q, k, v: [2, tokens, heads, width], float32."""
    queries, keys = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, heads, width, generator=g).to(world.CUDA) for n in (queries, keys, keys)]


def results(call: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of q, k and v for a fixed gradient of the output."""
    given = [x.to(dtype).requires_grad_() for x in given]
    y = call(*given)
    assert y.requires_grad, "it has no backward pass"
    to = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, given, to)]


def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By matrix products: [B, L, heads, width]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def test_the_kernels_of_this_machine() -> None:
    found = attention.available(world.CUDA)
    note("attention", "available", {name: reason or "works" for name, reason in found.items()})
    assert not found["eager"], found["eager"]
    assert not found["sdpa"], found["sdpa"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", attention.NAMES)
def test_a_kernel_computes_what_matrix_products_do(name: str, dtype: str, shape: str, full_float32: None) -> None:
    """Output and gradients, against float64."""
    try:
        attention._probe(name, world.CUDA, DTYPES[dtype])
    except Exception as error:  # of several libraries
        pytest.skip(f"{name} does not work here: {attention._line(error)}")
    backend = AttentionBackendName(attention._BACKENDS.get(name, name))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch_attention_fn(q, k, v, backend=backend)

    exact = results(plainly, inputs(shape), torch.float64)
    mine = results(call, inputs(shape), DTYPES[dtype])
    off = {what: world.distance([m], [e]) for what, m, e in zip(("y", "q", "k", "v"), mine, exact, strict=True)}
    note("attention", f"{name} {dtype} {shape}", off)
    assert all(one < TOLERANCE[dtype] for one in off.values()), off


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_pytorch_s_own(dtype: str, full_float32: None) -> None:
    """Those among which "sdpa" chooses: which work, and that these compute the same."""
    exact, found = results(plainly, inputs("self"), torch.float64), dict[str, Any]()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for kernel in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                mine = results(call, inputs("self"), DTYPES[dtype])
        except RuntimeError as error:
            found[kernel] = f"does not work: {attention._line(error)}"
        else:
            found[kernel] = max(world.distance([m], [e]) for m, e in zip(mine, exact, strict=True))
    note("attention", f"pytorch {dtype}", found)
    # cuDNN's, which fastgen leaves out, is right in some cases only
    numbers = {kernel: off for kernel, off in found.items() if isinstance(off, float) and kernel != "CUDNN_ATTENTION"}
    assert "MATH" in numbers
    assert all(off < TOLERANCE[dtype] for off in numbers.values()), found


@pytest.mark.parametrize("tokens", [77, 205, 256])
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_gradients_in_either_layout(kernel: str, tokens: int, full_float32: None) -> None:
    """Of bfloat16; the output's gradient in the output's layout, and by heads. cuDNN's is only noted."""
    g = torch.Generator().manual_seed(0)
    q, k, v, to = (torch.randn(2, tokens, 4, 64, generator=g).to(world.CUDA, torch.bfloat16) for _ in range(4))
    found = {}
    for layout, given in (("as the output", to), ("by heads", to.transpose(1, 2).contiguous().transpose(1, 2))):
        sides = []
        for backend, dtype in ((getattr(SDPBackend, kernel), torch.bfloat16), (SDPBackend.MATH, torch.float64)):
            x = [one.to(dtype).requires_grad_() for one in (q, k, v)]
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in x)).transpose(1, 2)
            sides.append(torch.autograd.grad(y, x, given.to(dtype)))
        found[layout] = world.distance(*sides)
    note("attention", f"{kernel} {tokens} tokens, gradient", found)
    if kernel != "CUDNN_ATTENTION":
        assert all(off < TOLERANCE["bf16"] for off in found.values()), found


# Whole networks


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    made: Any = UNet2DConditionModel
    folder = Path(recipe.locate("assets:emoji/teacher"))
    network: nn.Module = made.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    return network.eval().to(world.CUDA)


def flux() -> nn.Module:
    """A network whose attention goes through Diffusers' dispatcher, with heads as wide as all kernels take."""
    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    return made.eval().to(world.CUDA)


def called(network: Any, x: Tensor) -> Tensor:
    """x: [2, 4, 8, 8] of the U-Net, [2, 128, 16] of the transformer."""
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(world.CUDA)

    if x.ndim == 4:
        text = draw(2, 16, network.config.cross_attention_dim)
        return network(x, torch.tensor([5.0, 900.0]).to(world.CUDA), encoder_hidden_states=text, return_dict=False)[0]
    return network(
        hidden_states=x,
        encoder_hidden_states=draw(2, 77, 64),
        pooled_projections=draw(2, 64),
        timestep=torch.tensor([0.1, 0.9]).to(world.CUDA),
        img_ids=torch.zeros(128, 3).to(world.CUDA),
        txt_ids=torch.zeros(77, 3).to(world.CUDA),
        return_dict=False,
    )[0]


def learnt(network: Any, autocast: torch.dtype | None) -> list[Tensor]:
    """The output, and the gradients of the input and of all weights."""
    shape = (2, 128, 16) if isinstance(network, FluxTransformer2DModel) else (2, network.config.in_channels, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(world.CUDA).requires_grad_()
    network.zero_grad(set_to_none=True)
    with torch.autocast(world.CUDA.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = called(network, x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", attention.NAMES)
@pytest.mark.parametrize("make", [unet, flux])
def test_a_network_trains_by_a_kernel_as_it_does_by_matrix_products(
    make: Callable[[], nn.Module], name: str, dtype: str, full_float32: None
) -> None:
    """No further from float32 than matrix products in the same format are, but for a little."""
    autocast = None if dtype == "fp32" else DTYPES[dtype]
    network = make()
    attention.set_attention([network], "eager", world.CUDA)
    exact, products = learnt(network, None), learnt(network, autocast)
    try:
        attention.set_attention([network], name, world.CUDA, autocast)
    except ValueError as error:
        note("attention", f"{make.__name__} {name} {dtype}", str(error))
        pytest.skip(str(error))
    mine = learnt(network, autocast)
    off = {
        "output": world.distance(mine[:1], exact[:1]),
        "gradients": world.distance(mine[1:], exact[1:]),
        "output of products": world.distance(products[:1], exact[:1]),
        "gradients of products": world.distance(products[1:], exact[1:]),
    }
    note("attention", f"{make.__name__} {name} {dtype}", off)
    assert len(mine) > 20
    for what in ("output", "gradients"):
        assert off[what] < 2 * off[f"{what} of products"] + 1e-4, off


@pytest.mark.parametrize("choice", ["auto", "xformers"])
def test_a_session_trains(choice: str, tmp_path: Path) -> None:
    options = ("run.batch_size=4", "method.student_every=1", f"model.attention={choice}")
    try:
        session = world.built("dmd2_prompts", tmp_path, *options)
    except ValueError as error:
        pytest.skip(str(error))
    assert session.attention == ("sdpa" if choice == "auto" else choice)
    before = world.weights(session)
    logs = world.turns(session, range(2))
    note("attention", choice, {"used": session.attention, **logs[-1]})
    after = world.weights(session)
    assert any(name.startswith("student") and not torch.equal(before[name], after[name]) for name in before)


# Exact derivatives


@pytest.mark.parametrize("choice", ["auto", *attention.NAMES])
@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_methods_with_exact_derivatives_train_whatever_the_kernel(
    name: str, choice: str, tmp_path: Path, full_float32: None
) -> None:
    """Losses and norms of gradients equal the CPU's, where attention is plain products."""
    options = (
        "method.derivative=jvp",
        "method.warmup=0",
        "run.precision=fp32",
        "run.batch_size=4",
        "optim.student.warmup=0",
    )
    try:
        session = world.built(name, tmp_path, *options, f"model.attention={choice}")
    except ValueError as error:
        pytest.skip(str(error))
    alone = world.built(name, tmp_path, *options, device=world.CPU)
    [mine], [theirs] = world.turns(session, range(1)), world.turns(alone, range(1))
    off = world.apart(mine, theirs)
    note("derivatives", f"{name} {choice}", {"used": session.attention, **off})
    assert all(one < 2e-3 for one in off.values()), (mine, theirs)


@pytest.mark.parametrize("choice", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("how", ["jvp", "finite_differences"])
def test_a_derivative_is_the_cpu_s(
    how: derivative.Derivative, choice: str, tmp_path: Path, full_float32: None
) -> None:
    """Of the student of scm, at four times."""
    sides = []
    for device, kernel in ((world.CUDA, choice), (world.CPU, "eager")):
        session = world.built("scm", tmp_path, "method.derivative=jvp", f"model.attention={kernel}", device=device)
        method: Any = session.method
        cond = session.family.encode_prompts(["a red apple", "a dog", "a cat", "a rose"])
        g = torch.Generator().manual_seed(3)
        x_t, dx = (torch.randn(4, *session.family.latent_shape, generator=g).to(device) for _ in range(2))
        t = torch.tensor([50.0, 300.0, 600.0, 950.0], dtype=torch.float64).to(device)
        dt, span = torch.full_like(t, 100.0), 0.1
        found = derivative.along(method.target.denoiser, lambda p: p.y, x_t, t, cond, dx, dt, how, span)
        sides.append([value.cpu() for value in found])
    off = [world.distance([mine], [theirs]) for mine, theirs in zip(*sides, strict=True)]
    note("derivatives", f"{how} {choice}", {"value": off[0], "derivative": off[1]})
    assert off[0] < 1e-4
    assert off[1] < 1e-3
