"""Real PEFT folders of a tiny network with every kind of layer that LoRA knows."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    """Embedding, convolution, linear layers and a head; the output depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.lin1 = nn.Linear(8, 9)
        self.lin2 = nn.Linear(9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        x = self.emb(tokens).mean(1) + self.conv(image).mean((2, 3))
        return self.head(self.lin2(torch.tanh(self.lin1(x))))


def base_model() -> Net:
    torch.manual_seed(7)
    return Net()


def adapted(seed: int, dtype: torch.dtype = torch.float32, **kw: Any) -> PeftModel:
    """The network with a LoRA adapter of random factors (B not zero)."""
    kw = {"r": 4, "lora_alpha": 8, "target_modules": ["lin1", "lin2"], **kw}
    return randomised(get_peft_model(base_model(), LoraConfig(**kw)), seed).to(dtype)


@torch.no_grad()
def randomised(model: PeftModel, seed: int, scale: float = 0.5) -> PeftModel:
    """The model with noise on all that its adapters train."""
    gen = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if value.requires_grad or "lora_" in key:
            value.add_(scale * torch.randn(value.shape, generator=gen))
    return model


def saved(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        # PEFT takes the 1-D bias of lora_B for a shard that was not gathered.
        warnings.filterwarnings("ignore", message=r".*lora_B\.bias.*")
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save(name, seed, **lora_config)`: such a network's adapter, saved by PEFT."""

    def save_adapter(name: str, seed: int, dtype: torch.dtype | None = None, **kw: Any) -> Path:
        folder = saved(adapted(seed, **kw), tmp_path / name)
        if dtype is not None:
            rewrite(folder, lambda t: {k: v.to(dtype) for k, v in t.items()})
        return folder

    return save_adapter


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(tensors(folder)), folder / WEIGHTS, metadata={"format": "pt"})


def output_of(folder: Path) -> Tensor:
    """What the network with this adapter, loaded by PEFT, says about fixed inputs."""
    return says(PeftModel.from_pretrained(base_model(), str(folder)))


def says(model: PeftModel) -> Tensor:
    """What a network says about fixed inputs."""
    gen = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (5, 4), generator=gen)
    image = torch.randn(5, 2, 4, 4, generator=gen)
    with torch.no_grad():
        return model.eval()(tokens, image)


@pytest.fixture
def regauge(tmp_path: Path) -> Callable[..., Path]:
    """`regauge(folder, name, seed)`: the same adapter, every layer in another random basis."""

    def regauge_adapter(folder: Path, name: str, seed: int) -> Path:
        copy = tmp_path / name
        copy.mkdir()
        (copy / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
        save_file(in_other_bases(tensors(folder), seed), copy / WEIGHTS, metadata={"format": "pt"})
        return copy

    return regauge_adapter


def in_other_bases(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same adapter, every layer in another random basis."""
    gen = torch.Generator().manual_seed(seed)
    for key_A in [k for k in sorted(state) if "lora_A" in k or "embedding_A" in k]:
        key_B = key_A.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        A, B = state[key_A], state[key_B]
        Q = rotation(A.shape[0], gen)
        state[key_A] = (Q.T @ A.double().flatten(1)).reshape(A.shape).to(A.dtype)
        state[key_B] = (B.double().flatten(1) @ Q).reshape(B.shape).to(B.dtype)
    return state


def rotation(r: int, gen: torch.Generator) -> Tensor:
    """Haar-distributed rotation (determinant +1), float64."""
    Q, R = torch.linalg.qr(torch.randn(r, r, generator=gen, dtype=torch.float64))
    Q = Q * R.diagonal().sign()
    Q[:, 0] *= torch.linalg.det(Q).sign()
    return Q


def hand_merge(
    factors: list[tuple[Tensor, Tensor]], ref: tuple[Tensor, Tensor], weights: list[float]
) -> tuple[Tensor, Tensor]:
    """`sum w_i R_i^T A_i`, `sum w_i B_i R_i` with the best rotations (SVD), float64, lam = 1."""
    A_sum, B_sum = torch.zeros_like(ref[0]), torch.zeros_like(ref[1])
    for (A, B), weight in zip(factors, weights, strict=True):
        U, _, Vh = torch.linalg.svd(B.T @ ref[1] + A @ ref[0].T)
        U[:, -1] *= torch.linalg.det(U @ Vh)
        R = U @ Vh
        A_sum += weight * R.T @ A
        B_sum += weight * B @ R
    return A_sum, B_sum


@pytest.fixture
def tools() -> Any:
    """The functions above for tests: `tools.tensors`, `tools.rewrite`, `tools.output_of`, ..."""

    class Tools:
        tensors = staticmethod(tensors)
        rewrite = staticmethod(rewrite)
        output_of = staticmethod(output_of)
        says = staticmethod(says)
        base_model = staticmethod(base_model)
        adapted = staticmethod(adapted)
        randomised = staticmethod(randomised)
        saved = staticmethod(saved)
        in_other_bases = staticmethod(in_other_bases)
        rotation = staticmethod(rotation)
        hand_merge = staticmethod(hand_merge)

    return Tools
