"""The rank of a merge chosen by the energy of the exact average: hand-made and dense spectra."""

import json
import math

import pytest
import torch
from peft import LoraConfig

import fedrot
from fedrot.adapters import gather, measure_spectrum, read
from fedrot.errors import FedrotError
from fedrot.methods import FedIT, FedRot, FlexLoRA

KEY = "base_model.model.{}.lora_{}.weight"


def adapter(layers: dict[str, tuple[torch.Tensor, torch.Tensor]], **config):
    """A state dict of `(A, B)` by layer and its configuration."""
    state = {
        KEY.format(name, side): t
        for name, f in layers.items()
        for side, t in zip("AB", f, strict=True)
    }
    return state, LoraConfig(target_modules=list(layers), **config)


def diagonal(*values: float, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, B)` of rank `len(values)` with `B A = diag(values)`, A orthonormal."""
    A, B = torch.eye(len(values), size), torch.zeros(size, len(values))
    B[: len(values)] = torch.diag(torch.tensor(values))
    return A, B


def spectrum(adapters, energy=None, weights=None):
    found = [read(a, str(i)) for i, a in enumerate(adapters)]
    return measure_spectrum(gather(found, found[0], weights, {}), energy)


def updates(merged_or_pair):
    """`dW = s B A` of every layer in float64."""
    state, config = merged_or_pair
    out = {}
    found = read((state, config), "x")
    for name, layer in found.keys.layers.items():
        A, B = state[layer.key_A].double(), state[layer.key_B].double()
        out[name] = layer.scaling * B.flatten(1) @ A.flatten(1)
    return out


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.5, 1), (0.64, 1), (0.65, 2), (0.89, 2), (0.9, 3), (0.98, 3), (0.999, 4), (1.0, 4)],
)
def test_by_hand(energy, rank):
    """s = 3, B A = diag(8, 5, 3, 1): 64, 89, 98, 99 of 99 squares are .646, .899, .990, 1."""
    one = adapter({"q": diagonal(8.0, 5.0, 3.0, 1.0)}, r=4, lora_alpha=12)
    found = spectrum([one], energy)
    torch.testing.assert_close(found.values["q"], torch.tensor([24.0, 15, 9, 3]).double())
    assert found.ranks == {"q": rank}
    assert found.kept({"q": 2}) == pytest.approx(89 / 99)
    assert found.summary() == {
        "energy": energy,
        "kept": pytest.approx({1: 64, 2: 89, 3: 98, 4: 99}[rank] / 99),
        "ranks": {"q": rank},
    }


def test_a_share_that_is_met_exactly_is_enough():
    """9 of 9 + 1 is .9, whatever 1 - .9 rounds to."""
    assert spectrum([adapter({"q": diagonal(3.0, 1.0)}, r=2, lora_alpha=2)], 0.9).ranks["q"] == 1


def test_layers_have_ranks_of_their_own_and_all_together_a_share():
    """By hand: q keeps 100 of 101, v 9 of 18; together 109 of 119."""
    one = adapter({"q": diagonal(10.0, 1.0), "v": diagonal(3.0, 3.0)}, r=2, lora_alpha=2)
    found = spectrum([one], 0.5)
    assert found.ranks == {"q": 1, "v": 1}
    assert found.summary()["kept"] == pytest.approx(109 / 119)
    assert spectrum([one], 0.95).ranks == {"q": 1, "v": 2}


def test_weights_and_scalings_enter():
    """3/4 * 2 * diag(4, 0) + 1/4 * 1 * diag(0, 4) = diag(6, 1), in two clients of rank 1."""
    A = [torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])]
    a = adapter({"q": (A[0], 4 * A[0].T)}, r=1, lora_alpha=2)
    b = adapter({"q": (A[1], 4 * A[1].T)}, r=1, lora_alpha=1)
    torch.testing.assert_close(
        spectrum([a, b], weights=[3, 1]).values["q"], torch.tensor([6.0, 1.0]).double()
    )
    merged = fedrot.aggregate([a, b], weights=[3, 1], rank="auto", energy=1.0)
    assert merged.spectrum.ranks == {"q": 2}
    expected = torch.diag(torch.tensor([6.0, 1.0, 0.0])).double()
    torch.testing.assert_close(
        updates((merged.tensors, merged.config))["q"], expected, rtol=0, atol=1e-5
    )


CLIENTS = (
    {"r": 2, "lora_alpha": 5},
    {"r": 5, "lora_alpha": 3},
    {"r": 3, "use_rslora": True, "rank_pattern": {"lin2": 1}},
)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("reference", [0, 1])
def test_mixed_ranks_against_the_dense_svd(tools, tmp_path, energy, reference):
    """Ranks, values and the merged update of every kind of layer; PEFT loads what is written."""
    targets = ["emb", "conv", "lin1", "lin2"]
    models = [tools.adapted(i, target_modules=targets, **kw) for i, kw in enumerate(CLIENTS)]
    folders = [tools.saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    weights = [1, 2, 3]
    merged = fedrot.aggregate(
        models, models[reference], weights=weights, rank="auto", energy=energy
    )
    dense: dict[str, torch.Tensor] = {}
    for weight, folder in zip(weights, folders, strict=True):
        state = tools.tensors(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        for name, update in updates((state, config)).items():
            dense[name] = dense.get(name, 0) + weight / 6 * update
    got = updates((merged.tensors, merged.config))
    assert dense.keys() == got.keys() == merged.spectrum.ranks.keys()
    for name, D in dense.items():
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        held = S.square().cumsum(0) / S.square().sum()
        rank = merged.spectrum.ranks[name]
        n = int(torch.linalg.matrix_rank(D, rtol=1e-5))
        torch.testing.assert_close(merged.spectrum.values[name], S[:n], rtol=1e-5, atol=1e-6)
        if energy < 1:
            assert held[rank - 1] >= energy and (rank == 1 or held[rank - 2] < energy)
        else:
            assert rank == n
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(got[name], best, rtol=0, atol=2e-5 * float(S[0]))
        lost = math.sqrt(float(S[rank:].square().sum()))
        assert merged.misalignment.aligned[name] == pytest.approx(lost, abs=1e-5 * float(S[0]))

    # The network says what it says with the dense average's truncation, at the reference's scale.
    merged.save(tmp_path / "merged")
    loaded = read(tmp_path / "merged", "merged").keys.layers
    kept = read(models[reference], "reference").keys.layers
    for name, rank in merged.spectrum.ranks.items():
        assert loaded[name].rank == rank
        assert loaded[name].scaling == pytest.approx(kept[name].scaling, rel=1e-12)
    added = tools.adapted(9)
    merged.add_to(added, "merged")
    added.set_adapter("merged")
    torch.testing.assert_close(
        tools.says(added), tools.output_of(tmp_path / "merged"), rtol=0, atol=1e-5
    )
    provenance = json.loads((tmp_path / "merged" / "fedrot_provenance.json").read_text())
    assert provenance["spectrum"] == json.loads(json.dumps(merged.spectrum.summary()))


def test_angles_and_the_plain_error_are_of_the_whole_adapters(tools):
    """They do not depend on the ranks of the result, smaller or larger than the reference's."""
    models = [tools.adapted(i, r=r) for i, r in enumerate((3, 5, 2))]
    few, many = (fedrot.aggregate(models, rank="auto", energy=e).misalignment for e in (0.5, 1.0))
    rotated = fedrot.aggregate(models, rank=5).misalignment
    assert float(few.angles[0].max()) < 1e-3 < float(few.angles[1:].min())
    for merge in (many, rotated):
        torch.testing.assert_close(few.angles, merge.angles, rtol=0, atol=1e-4)
        assert few.plain == pytest.approx(merge.plain, rel=1e-6)
    assert few.aligned["lin1"] > 0.1 > 1e-4 > many.aligned["lin1"]

    large = tools.adapted(3, r=6)
    cut = fedrot.aggregate(models, large, rank="auto", energy=0.5)
    whole = fedrot.aggregate(models, large).misalignment
    assert set(cut.spectrum.ranks.values()) <= {1, 2}
    torch.testing.assert_close(cut.misalignment.angles, whole.angles, rtol=0, atol=1e-4)


def test_small_singular_values_come_out_as_they_are(tools):
    """Four orders of magnitude in float32, whose Gram matrices hold three and a half."""
    g = torch.Generator().manual_seed(1)
    U, V, turn = (tools.rotation(n, g) for n in (6, 6, 3))
    A, B = (t.double() for t in diagonal(1.0, 1e-2, 1e-4))
    factors = (turn.T @ A @ V.T, U @ B @ turn), (V.T[:1], U[:, :1])
    clients = [
        adapter({"q": tuple(t.float().contiguous() for t in f)}, r=r, lora_alpha=r)
        for f, r in zip(factors, (3, 1), strict=True)
    ]
    merged = fedrot.aggregate(clients, clients[1], rank="auto", energy=1.0)
    assert merged.spectrum.ranks == {"q": 3}
    expected = U @ torch.diag(torch.tensor([1.0, 0.005, 0.00005, 0, 0, 0]).double()) @ V.T
    got = updates((merged.tensors, merged.config))["q"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_in_other_bases_have_the_rank_of_one(tools, dtype):
    """Rounding of the factors is no energy: with energy 1, six copies of an adapter of rank 4 have
    rank 4 and come back."""
    a = tools.adapted(1, dtype=dtype)
    config = a.peft_config["default"]
    state = read(a, "a").tensors
    copies = [(tools.in_other_bases(dict(state), seed), config) for seed in range(6)]
    merged = fedrot.aggregate(copies, a, rank="auto", energy=1.0)
    assert merged.spectrum.ranks == {"lin1": 4, "lin2": 4}
    assert merged.config["r"] == 4 and merged.config["rank_pattern"] == {}
    for name, update in updates((merged.tensors, merged.config)).items():
        torch.testing.assert_close(update, updates((state, config))[name], rtol=0, atol=2e-5)


def test_adapters_that_cancel_have_no_energy(tools):
    """D = 0 up to rounding: nothing to choose from, so rank 1, and zero comes out."""
    state, config = read(tools.adapted(1), "a").tensors, tools.adapted(1).peft_config["default"]
    turned = tools.in_other_bases(dict(state), 3)
    opposite = {k: -v if "lora_B" in k else v for k, v in turned.items()}
    merged = fedrot.aggregate([(dict(state), config), (opposite, config)], rank="auto")
    assert merged.spectrum.ranks == {"lin1": 1, "lin2": 1}
    assert [len(v) for v in merged.spectrum.values.values()] == [0, 0]
    assert merged.spectrum.kept({"lin1": 1}) == 1.0
    for update in updates((merged.tensors, merged.config)).values():
        assert float(update.abs().max()) < 1e-5


def test_experts_of_a_layer_have_one_rank_for_all_their_energy():
    """Two experts, diag(4, 1) and diag(3, 3): squares 25 and 10 of 35 in the first and the second
    direction."""
    A = torch.eye(2).repeat(2, 1)  # (E r, in)
    B = torch.zeros(2, 2, 2)  # (out, r, E)
    B[:, :, 0], B[:, :, 1] = torch.diag(torch.tensor([4.0, 1])), 3 * torch.eye(2)
    key = "base_model.model.experts.lora_{}.weight"
    state = {key.format("A"): A, key.format("B"): B.flatten(1)}
    config = LoraConfig(target_parameters=["experts.weight"], r=2, lora_alpha=2)
    found = spectrum([(state, config)], 0.7)
    torch.testing.assert_close(found.values["experts"], torch.tensor([5.0, 10**0.5]).double())
    assert found.ranks == {"experts": 1}  # 25 / 35 = .714
    merged = fedrot.aggregate([(state, config)], rank="auto", energy=0.7)
    assert merged.tensors[key.format("A")].shape == (2, 2)
    A, B = merged.tensors[key.format("A")].view(2, 1, 2), merged.tensors[key.format("B")]
    products = [B.view(2, 1, 2)[:, :, e] @ A[e] for e in range(2)]
    torch.testing.assert_close(products[0], torch.diag(torch.tensor([4.0, 0])), rtol=0, atol=1e-6)
    assert float(torch.linalg.matrix_norm(products[1], 2)) == pytest.approx(3, rel=1e-6)


def test_two_parameters_that_the_configuration_cannot_tell_apart_share_a_rank():
    """`experts` and `experts.base_layer` are one entry of the rank pattern each would need."""
    state = {}
    for name, values in (("experts", (2.0, 2.0)), ("experts.base_layer", (5.0, 0.1))):
        A, B = diagonal(*values, size=3)
        state |= {KEY.format(name, "A"): A, KEY.format(name, "B"): B}
    config = LoraConfig(target_parameters=["experts.up", "experts.down"], r=2, lora_alpha=2)
    merged = fedrot.aggregate([(state, config)], rank="auto", energy=0.9)
    assert merged.spectrum.ranks == {"experts": 2, "experts.base_layer": 2}


def test_a_number_is_the_rank_of_a_truncation_and_pads_for_a_rotation(tools):
    large, small = tools.adapted(1, r=5), tools.adapted(2, r=2)
    merged = fedrot.aggregate([large, small], method=FlexLoRA("reference"), rank=3)
    D = {
        name: sum(
            updates((r.tensors, r.config))[name] for r in (read(large, "l"), read(small, "s"))
        )
        / 2
        for name in ("lin1", "lin2")
    }
    for name, got in updates((merged.tensors, merged.config)).items():
        U, S, Vh = torch.linalg.svd(D[name])
        torch.testing.assert_close(
            got, (U[:, :3] * S[:3]) @ Vh[:3], rtol=0, atol=1e-5 * float(S[0])
        )
    assert merged.spectrum is None
    with pytest.raises(FedrotError, match="rank must be at least 5, that of the reference, got 3"):
        fedrot.aggregate([large, small], rank=3)


def test_refused(tools):
    a, b = tools.adapted(1), tools.adapted(2, r=2)
    cases = [
        ({"rank": "large"}, "rank must be a whole number or 'auto', got 'large'"),
        ({"rank": 8.0}, "rank must be a whole number or 'auto', got 8.0"),
        ({"rank": "auto", "energy": "all"}, "energy must be a number, got 'all'"),
        ({"rank": "auto", "energy": 0.0}, "energy must be above 0 and at most 1, got 0.0"),
        ({"rank": "auto", "energy": 1.01}, "energy must be above 0 and at most 1, got 1.01"),
        ({"rank": "auto", "energy": math.nan}, "energy must be above 0 and at most 1, got nan"),
        ({"energy": 0.9}, "energy must go with rank='auto', got energy=0.9 and rank=None"),
        ({"rank": 4, "energy": 0.9}, "got energy=0.9 and rank=4"),
        ({"rank": "auto", "method": FedRot()}, "which FedRot-LoRA does not give"),
        ({"rank": "auto", "method": FedIT()}, "which FedIT does not give"),
        ({"method": FlexLoRA(energy=0.9)}, "with an energy is for rounds; here rank='auto'"),
        ({"rank": 0, "method": FlexLoRA()}, "rank must be at least 1, got 0"),
        ({"rank": "auto", "weights": [1, -1]}, "weights must be finite, not negative"),
    ]
    for options, message in cases:
        with pytest.raises(FedrotError, match=message):
            fedrot.aggregate([a, b], **options)
    pissa = [tools.adapted(i, init_lora_weights="pissa") for i in (1, 2)]
    with pytest.raises(FedrotError, match="changed the base weights for rank 4"):
        fedrot.aggregate(pissa, rank="auto", energy=0.3)
