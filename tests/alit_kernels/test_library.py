"""Registration: every op through opcheck and torch.compile, and what happens when something is missing or asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import alit_kernels as ak
from alit_kernels import _library
from alit_kernels._library import Op, ops
from alit_kernels.attention import cases as attention_cases
from alit_kernels.nn import SelfAttention, VectorQuantizer
from alit_kernels.testing import assert_within_budget, nan_filled_empty

PACKED = attention_cases.make(attention_cases.Case((3, 0, 5), 2, 8, spare=1))
OFFSETS, LENGTHS = PACKED.offsets, torch.tensor([3, 0, 5])


def leaf(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def samples() -> dict[str, tuple[Any, ...]]:
    """Positional arguments of every op, without ``implementation``; more than one kind of call in brackets."""
    q, k, v = (leaf(9, 2, 8) for _ in range(3))
    dense = tuple(leaf(2, 4, 2, 8) for _ in range(3))
    mask, index = torch.tensor([True, False, True, True, True, True]), torch.arange(6) % 5
    target, select = torch.arange(6) % 5, torch.tensor([True, False, True])
    lse, dense_lse = torch.randn(2, 9), torch.randn(2, 2, 4)
    return {
        "append": (leaf(9, 4), OFFSETS, leaf(2, 4), select, 13),
        "append_backward": (
            torch.randn(13, 4),
            OFFSETS,
            OFFSETS + torch.tensor([0, 2, 2, 4], dtype=torch.int32),
            select,
            9,
            2,
            True,
        ),
        "attention": (q, k, v, OFFSETS, None, 5, 5, None, 0.3),
        "attention (dense)": (*dense, None, None, 4, 4, torch.ones(2, 4) > 0, 0.3),
        "attention_backward": (
            *(q.detach(), k.detach(), v.detach(), OFFSETS, None, 5, 5, None, 0.3),
            *(torch.randn(9, 2, 8), lse, q.detach(), lse),
        ),
        "attention_backward (dense)": (
            *(*(d.detach() for d in dense), None, None, 4, 4, None, 0.3),
            *(torch.randn(2, 4, 2, 8), dense_lse, dense[0].detach(), dense_lse),
        ),
        "attention_map": (q.detach(), k.detach(), lse, OFFSETS, 1, 4, 0, 2, 5, 0.3),
        "codebook_statistics": (index, torch.randn(6, 4), 5, mask),
        "compact": (leaf(9, 4), OFFSETS, torch.arange(9) % 2 == 0, 7),
        "cumulative_offsets": (LENGTHS,),
        "nearest_codeword": (torch.randn(6, 4), torch.randn(5, 4), "cosine", "ieee"),
        "pack": (leaf(3, 6, 4), OFFSETS, 9),
        "scatter_rows": (torch.randn(4, 3), torch.tensor([2, -1, 0, 5], dtype=torch.int32), 6),
        "soft_codebook": (leaf(6, 5), leaf(5, 4), target),
        "soft_codebook_backward": (
            torch.randn(6, 4),
            torch.randn(6),
            torch.randn(6),
            torch.randn(6, 5),
            torch.randn(5, 4),
            target,
            torch.randn(6, 4),
            torch.rand(2, 6) + 1,
            True,
        ),
        "tail_mask": (leaf(3, 6, 4), LENGTHS, leaf(4)),
        "tail_mask_backward": (torch.randn(3, 6, 4), LENGTHS),
        "unpack": (leaf(9, 4), OFFSETS, 6, 0.5),
        "vector_quantize": (leaf(6, 4), leaf(5, 4), mask, "cosine", 0.25, "ieee"),
        "vector_quantize_backward": (
            *(torch.randn(6, 4), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)),
            torch.randn(6, 4),
            torch.randn(5, 4),
            index,
            mask,
            "cosine",
            0.25,
            True,
        ),
    }


def op_of(sample: str) -> str:
    return sample.partition(" ")[0]


def test_every_op_has_a_sample() -> None:
    assert {*map(op_of, samples())} == {name for name in ops() if not name.startswith("test_")}


@pytest.mark.parametrize("implementation", ("reference", "auto"))
@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str, implementation: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.alit_kernels, op_of(name)).default, (*samples()[name], implementation)
    )


@pytest.mark.parametrize("name", sorted(samples()))
def test_shows_in_the_profiler(name: str) -> None:
    with torch.profiler.profile() as profile:
        ops()[op_of(name)](*samples()[name])
    names = {event.key for event in profile.key_averages()}
    event = f"alit_kernels::{op_of(name)}"
    assert event in names and any(seen.startswith(f"{event}[") for seen in names)


@pytest.mark.parametrize("name", sorted(samples()))
def test_a_direct_call_is_the_dispatched_one(name: str) -> None:
    """Results, what requires a gradient, and gradients; one goes through torch's dispatcher, the other does not."""
    seen, sample = [], samples()[name]
    for call in (ops()[op_of(name)], getattr(torch.ops.alit_kernels, op_of(name))):
        arguments = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in sample
        ]
        dispatched = () if isinstance(call, Op) else ("auto",)
        results = call(*arguments, *dispatched)
        results = list(results) if isinstance(results, tuple) else [results]
        wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        differentiable = [x for x in results if x.requires_grad]
        total = sum((x * x.detach().cos()).sum() for x in differentiable)
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
        flags = [(x.requires_grad, x.is_leaf, x.dtype) for x in results]
        seen.append((flags, [x.detach() for x in results], list(gradients)))
    assert seen[0][0] == seen[1][0]
    for direct, dispatched in zip(seen[0][1] + seen[0][2], seen[1][1] + seen[1][2], strict=True):
        assert (direct is None) == (dispatched is None)
        if direct is not None:
            torch.testing.assert_close(direct, dispatched, rtol=0, atol=0, equal_nan=True)


def test_who_looks_at_a_call_sees_an_op() -> None:
    """Modes, transforms and tensors of other types get what the dispatcher would give them."""
    q = torch.randn(1, 3, 1, 4)

    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Names():
        ak.attention(q, q, q)
    assert "alit_kernels::attention" in seen
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert isinstance(ak.attention(fake, fake, fake), FakeTensor)
    graph = make_fx(lambda x: ak.attention(x, x, x))(q).graph
    assert any("alit_kernels.attention" in str(node.target) for node in graph.nodes)
    assert ak.attention(q.to("meta"), q.to("meta"), q.to("meta")).is_meta


def test_autocast_outside_an_op_stays() -> None:
    op = Op(
        "test_autocast(Tensor x) -> Tensor",
        reference=lambda x: x @ x,
        fake=torch.empty_like,
    )
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            op(torch.ones(2, 3))
        assert (x @ x).dtype == torch.bfloat16


PUBLIC: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "attention": (lambda q, k, v: ak.attention(q, k, v), tuple(leaf(2, 4, 2, 8) for _ in range(3))),
    "varlen_attention": (
        lambda q, k, v: ak.varlen_attention(q, k, v, OFFSETS, max_length=5),
        tuple(leaf(9, 2, 8) for _ in range(3)),
    ),
    "nearest_codeword": (
        lambda z, c: ak.nearest_codeword(z, c) + 0 * z.sum(),
        (leaf(6, 4), leaf(5, 4)),
    ),
    "codebook_statistics": (
        lambda z: ak.codebook_statistics(torch.arange(6) % 5, z, 5)[1] + 0 * z.sum(),
        (leaf(6, 4),),
    ),
    "vector_quantize": (
        lambda z, c: sum(x.to(z.dtype).sum() for x in ak.vector_quantize(z, c)[:5]),
        (leaf(6, 4), leaf(5, 4)),
    ),
    "soft_codebook": (
        lambda x, c: sum(y.sum() for y in ak.soft_codebook(x, c, torch.arange(6) % 5)),
        (leaf(6, 5), leaf(5, 4)),
    ),
    "attention_map": (
        lambda q: (
            ak.attention_map(
                q, q, torch.zeros(2, 9), OFFSETS, queries=range(1, 3), keys=range(2), max_length=5
            ).detach()
            + 0 * q.sum()
        ),
        (leaf(9, 2, 8),),
    ),
    "pack": (lambda x: ak.pack(x, LENGTHS, capacity=9)[0], (leaf(3, 6, 4),)),
    "unpack": (lambda x: ak.unpack(x, OFFSETS, max_length=6), (leaf(9, 4),)),
    "compact": (
        lambda x: ak.compact(x, OFFSETS, torch.arange(9) % 2 == 0, capacity=7)[0],
        (leaf(9, 4),),
    ),
    "append": (lambda x, r: ak.append(x, OFFSETS, r, capacity=15)[0], (leaf(9, 4), leaf(2, 4))),
    "tail_mask": (lambda x, f: ak.tail_mask(x, LENGTHS, f), (leaf(3, 6, 4), leaf(4))),
    "SelfAttention": (lambda x: SELF_ATTENTION(x, OFFSETS, max_length=5), (leaf(9, 16),)),
    "VectorQuantizer": (lambda z: QUANTIZER(z).loss, (leaf(6, 4),)),
}
SELF_ATTENTION, QUANTIZER = SelfAttention(16, 2), VectorQuantizer(5, 4).eval()


@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_without_graph_break(name: str) -> None:
    function, inputs = PUBLIC[name]

    def run(f: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        out.sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    eager = run(function)
    torch._dynamo.reset()
    for ours, expected in zip(
        run(torch.compile(function, fullgraph=True, backend="aot_eager")), eager, strict=True
    ):
        torch.testing.assert_close(ours, expected)


def in_another_order(x: Any) -> Any:
    """The same values, with dimensions in memory the other way round."""
    if not isinstance(x, Tensor) or x.ndim < 2:
        return x
    dims = tuple(reversed(range(x.ndim)))
    return x.detach().permute(dims).contiguous().permute(dims)


def with_gaps(x: Any) -> Any:
    """The same values, every other element of the memory."""
    if not isinstance(x, Tensor) or x.ndim < 1:
        return x
    return x.detach().repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("implementation", ("reference", "auto"))
@pytest.mark.parametrize("layout", (in_another_order, with_gaps))
@pytest.mark.parametrize("name", sorted(samples()))
def test_strides_are_those_that_compiled_code_expects(
    name: str, layout: Callable[[Any], Any], implementation: str
) -> None:
    arguments = tuple(map(layout, samples()[name]))
    op = getattr(torch.ops.alit_kernels, op_of(name))
    found = op(*arguments, implementation)
    with FakeTensorMode() as mode:
        fake = (mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
        expected = op(*fake, implementation)
    alone = isinstance(found, Tensor)
    for a, e in zip(*((found,), (expected,)) if alone else (found, expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        where = [i for i, size in enumerate(a.shape) if size > 1 and a.numel()]
        assert [a.stride(i) for i in where] == [e.stride(i) for i in where]


def test_missing_backward_fails() -> None:
    """An op without a backward must not be differentiated through its reference."""
    op = Op(
        "test_no_backward(Tensor x) -> Tensor", reference=lambda x: x * 2, fake=torch.empty_like
    )
    x = torch.ones(2, requires_grad=True)
    out = op(x)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="test_no_backward"):
        out.sum().backward()
    assert x.grad is None


def test_double_backward_vmap_and_forward_mode_raise_by_name() -> None:
    q = torch.randn(1, 3, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(ak.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"alit_kernels.attention_backward"):
        gradient.sum().backward()
    with pytest.raises(
        NotImplementedError, match=r"alit_kernels.attention does not support torch.vmap"
    ):
        torch.vmap(lambda x: ak.attention(x, x, x))(torch.randn(2, 1, 3, 1, 4))
    with pytest.raises(
        NotImplementedError, match=r"alit_kernels.attention does not support forward-mode"
    ):
        torch.func.jvp(lambda x: ak.attention(x, x, x), (q.detach(),), (torch.ones_like(q),))


@pytest.mark.parametrize(
    "gradients_of_many",
    (
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.vmap(torch.func.grad(lambda y: f(y).sum()))(x[None]),
    ),
)
def test_batched_gradients_are_refused_by_name(gradients_of_many: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"alit_kernels.attention.* torch.vmap"):
        gradients_of_many(lambda x: ak.attention(x, x, x), torch.randn(1, 3, 1, 4))


@pytest.mark.parametrize(
    "name", [n for n in sorted(samples()) if any(isinstance(x, Tensor) and x.requires_grad for x in samples()[n])]
)  # fmt: skip
def test_functional_gradients_are_the_usual_ones(name: str) -> None:
    arguments = list(samples()[name])
    places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]

    def loss(*leaves: Tensor) -> Tensor:
        for place, value in zip(places, leaves, strict=True):
            arguments[place] = value
        results = ops()[op_of(name)](*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        return sum(x.float().square().sum() for x in results if x.is_floating_point())

    leaves = [arguments[place] for place in places]
    expected = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    found = torch.func.grad(loss, tuple(range(len(leaves))))(*(x.detach() for x in leaves))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


DIFFERENTIABLE = (
    *("attention", "varlen_attention", "vector_quantize", "soft_codebook"),
    *("pack", "unpack", "compact", "append", "tail_mask"),
)


@pytest.mark.parametrize("name", (*DIFFERENTIABLE, "SelfAttention", "VectorQuantizer"))
def test_gradients_after_a_transform_has_ended(name: str) -> None:
    """What ``torch.func.vjp`` returns is called outside of it, once and within another; what an op makes of the inputs
    (offsets, say) is of the transform too.
    """
    function, leaves = PUBLIC[name]
    out = function(*leaves)
    cotangent = torch.randn(out.shape)
    expected = torch.autograd.grad(out, leaves, cotangent)
    inputs = tuple(x.detach() for x in leaves)

    def outer(*x: Tensor) -> Tensor:
        return torch.func.vjp(function, *x)[0]

    for transformed in (function, outer):
        found, pullback = torch.func.vjp(transformed, *inputs)
        torch.testing.assert_close(found, out.detach())
        for _ in range(2):
            for ours, theirs in zip(pullback(cotangent), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    with pytest.raises(NotImplementedError, match=r"alit_kernels\.\w+ .*torch\.vmap"):
        torch.func.jacrev(lambda *x: function(*x).flatten().expand(2, -1))(*inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    """pack and unpack are each other's derivatives; of the others none has a second one."""
    function, leaves = PUBLIC[name]
    inputs = tuple(x.detach().double().requires_grad_() for x in leaves)
    if name in ("pack", "unpack"):
        assert torch.autograd.gradgradcheck(function, inputs)
        return
    out = function(*inputs)
    weights = torch.randn(out.shape, dtype=out.dtype, requires_grad=True)
    gradients = torch.autograd.grad(out, inputs, weights, create_graph=True)
    for gradient in gradients:
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"alit_kernels\W+(\w+_backward|scatter_rows)\b"):
            torch.autograd.grad(gradient.square().sum(), (*inputs, weights), retain_graph=True)


@pytest.mark.parametrize("name", (*DIFFERENTIABLE, "nearest_codeword"))
def test_double_precision_stays_under_autocast(name: str) -> None:
    function, leaves = PUBLIC[name]
    inputs = tuple(x.detach().double() for x in leaves)
    expected = function(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(*inputs)
    assert found.dtype == expected.dtype == torch.float64
    assert torch.equal(found, expected)


def test_double_and_single_precision_do_not_mix_under_autocast() -> None:
    x, double = torch.randn(4, 4), torch.randn(4, 4, dtype=torch.float64)
    heads = x[None, :, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (ak.nearest_codeword, ak.vector_quantize, ak.soft_codebook):
            with pytest.raises(TypeError, match="codebook: expected dtype"):
                call(double, x)
        with pytest.raises(TypeError, match="k: expected dtype"):
            ak.attention(heads.double(), heads, heads)


def test_transforms_within_other_modes() -> None:
    """Of fake tensors there is nothing to compute; a trace sees the op; functionalize has nothing to do."""

    def loss(z: Tensor, codebook: Tensor) -> Tensor:
        return ak.vector_quantize(z, codebook).loss

    real = torch.randn(5, 4), torch.randn(6, 4)
    expected = torch.func.grad(loss)(*real)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        assert torch.func.grad(loss)(*fake).shape == (5, 4)
        assert torch.vmap(lambda x: x + loss(*fake))(fake[0]).shape == (5, 4)
    graph = make_fx(torch.func.grad(loss), tracing_mode="fake")(*real)
    torch.testing.assert_close(graph(*real), expected)
    assert "vector_quantize_backward" in graph.code
    torch.testing.assert_close(torch.func.functionalize(loss)(*real), loss(*real))


def test_zeros_without_memory() -> None:
    """Which torch's forward-mode differentiation makes."""
    zeros, q = torch._efficientzerotensor((2, 4, 2, 8)), torch.randn(2, 4, 2, 8)
    torch.testing.assert_close(ak.attention(q, q, zeros), torch.zeros_like(q))


def test_elements_that_begin_between_addresses() -> None:
    data = torch.randn(32).numpy().tobytes()
    odd = torch.frombuffer(bytearray(b"x" + data), dtype=torch.float32, offset=1).view(1, 2, 2, 8)
    even = odd.clone()
    torch.testing.assert_close(ak.attention(odd, odd, odd), ak.attention(even, even, even))


def test_a_sign_that_is_still_to_be_applied() -> None:
    """A tensor with the lazy negative bit, whose memory holds the opposite."""
    q, v = torch.randn(2, 1, 3, 1, 4)
    torch.testing.assert_close(ak.attention(q, q, torch._neg_view(v)), ak.attention(q, q, -v))


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def other(x: Tensor) -> Tensor:
        calls.append("cpp")
        return x * 2

    op = Op(
        "test_choice(Tensor x) -> Tensor",
        reference=lambda x: x * 2,
        fake=torch.empty_like,
        others={"cpp": other},
    )
    monkeypatch.setattr(
        _library, "available", lambda name, device: "" if name == "cpp" else "not here"
    )
    op(torch.ones(2))
    assert calls == ["cpp"], "auto takes C++ on the CPU"
    op(torch.ones(2), implementation="reference")
    op(torch.ones(2, dtype=torch.float64))
    assert calls == ["cpp"], "float64 and an explicit choice take the reference"
    monkeypatch.setenv("ALIT_KERNELS_IMPLEMENTATION", "reference")
    op(torch.ones(2))
    assert calls == ["cpp"], "the environment variable replaces auto"
    with pytest.raises(
        ValueError,
        match=r"implementation='triton' of alit_kernels.test_choice cannot run: this op has",
    ):
        op(torch.ones(2), implementation="triton")
    monkeypatch.setattr(_library, "available", lambda name, device: "broken")
    with pytest.raises(ValueError, match="cannot run: broken"):
        op(torch.ones(2), implementation="cpp")


def test_gpus_that_the_kernels_are_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    capabilities = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    available = _library.available.__wrapped__  # without its cache
    assert available("triton", "cuda") == ""
    capabilities[1] = (7, 5)
    assert "8.0 or later, and GPU 1 is older" in available("triton", "cuda")
    capabilities[1] = (12, 0)
    assert available("triton", "cuda") == ""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in available("triton", "cuda")


BLOCKED = """
import sys
sys.modules["triton"] = sys.modules["alit_kernels._C"] = None
import torch, alit_kernels as ak
assert "alit" not in sys.modules, "alit_kernels imports alit"
q = torch.randn(1, 3, 2, 4)
assert ak.attention(q, q, q).shape == q.shape
assert ak.nearest_codeword(torch.randn(3, 2), torch.randn(5, 2)).shape == (3,)
try:
    ak.attention(q, q, q, implementation="triton")
except ValueError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("an explicit choice that cannot run was accepted")
print("fine")
"""


def test_imports_without_triton_and_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_a_source_folder_without_a_core_says_so(tmp_path: Path) -> None:
    """Once in a process that falls to the reference on the CPU; a package that was installed without says nothing."""
    package = Path(ak.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(package, tmp_path / "alit_kernels", ignore=ignored)
    script = (
        "import sys\n"  # an editable installation would find its core all the same
        "sys.meta_path = [x for x in sys.meta_path if 'editable' not in repr(x).lower()]\n"
        "import torch, alit_kernels as ak\n"
        "for _ in range(2): ak.nearest_codeword(torch.ones(3, 2), torch.ones(5, 2))\n"
    )
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "always"}
    for source in (False, True):
        if source:
            (tmp_path / "csrc").mkdir()
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        )
        assert done.stderr.count("has no compiled core") == source, done.stderr
        assert ("pip install -e ." in done.stderr) == source


def test_broken_extension_raises() -> None:
    script = (
        "import sys, types, importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.Loader):\n"
        "    def create_module(self, spec): raise ImportError('undefined symbol')\n"
        "    def exec_module(self, module): pass\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'alit_kernels._C': return importlib.machinery.ModuleSpec(name, Broken())\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from alit_kernels._library import extension\n"
        "extension()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "undefined symbol" in done.stderr


def test_report_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alit_kernels"], capture_output=True, text=True, check=True
    )
    assert "what implementation='auto' runs" in done.stdout and "attention_backward" in done.stdout


def test_nan_filled_empty() -> None:
    with nan_filled_empty():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty(4, dtype=torch.int32).eq(-(2**31)).all()


def test_budget_can_fail() -> None:
    exact = torch.randn(50, dtype=torch.float64)
    eager = exact.float()
    assert_within_budget(eager, eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(eager + 1e-5, eager, exact)
    with pytest.raises(AssertionError, match="finite in other places"):
        assert_within_budget(torch.where(eager > 0, eager, torch.nan), eager, exact)
