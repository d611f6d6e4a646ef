"""Attention as projections: the same outputs as `nn.MultiheadAttention`, inside torch's layers, for any method."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pquant_lightning import (
    LayerAdapter,
    LowRankCompression,
    PTQCompression,
    QATCompression,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.core.attention import UnfusedAttention
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CheckpointError, ModelError
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.splitting import split_view

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
N, L, S, E, H = 3, 5, 7, 16, 4


def _attention(**options):
    attention = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3)
    return attention


def _unfused(attention):
    """The same attention with projections that compute what they did."""
    model = nn.ModuleDict({"attention": copy.deepcopy(attention)})
    method = LowRankCompression(rank=100, min_saving=0)
    method.apply(model, method.plan(model))
    assert isinstance(model["attention"], UnfusedAttention)
    return model["attention"].train(attention.training)


def _close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=tolerance)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=tolerance)


STRUCTURES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "other_sizes": {"kdim": 12, "vdim": 10},
    "other_sizes_batch_first": {"kdim": 12, "vdim": 10, "batch_first": True, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 10},
}


def _causal(rows, columns):
    return torch.ones(rows, columns).triu(1).bool()


def _masks():
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    some = torch.rand(L, S) < 0.3
    some[:, 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": some},
        "float": {"attn_mask": torch.randn(L, S)},
        "both": {"attn_mask": some, "key_padding_mask": padding & (torch.arange(S) > 0)},
        "per_head": {"attn_mask": torch.randn(N * H, L, S)},
        "float_both": {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.randn(N, S)},
        "causal": {"attn_mask": _causal(L, S), "is_causal": True},
        "causal_padding": {"attn_mask": _causal(L, S), "is_causal": True, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("mask", list(_masks()))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_outputs_are_torchs(structure, mask):
    attention = _attention(**STRUCTURES[structure]).train()  # without dropout; in eval the fast path is taken
    unfused = _unfused(attention)
    sizes = (attention.embed_dim, attention.kdim, attention.vdim)
    inputs = [torch.randn(N, length, size) for length, size in zip((L, S, S), sizes, strict=True)]
    if not attention.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        options = {**_masks()[mask], **weights}
        torch.manual_seed(0)
        expected = attention(*inputs, **options)
        torch.manual_seed(0)
        _close(unfused(*inputs, **options), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_a_batch_dimension(structure):
    attention = _attention(**STRUCTURES[structure])
    unfused = _unfused(attention)
    sizes = (attention.embed_dim, attention.kdim, attention.vdim)
    inputs = [torch.randn(length, size) for length, size in zip((L, S, S), sizes, strict=True)]
    padding = torch.arange(S) > 4
    for need in (True, False):
        expected = attention(*inputs, key_padding_mask=padding, need_weights=need)
        _close(unfused(*inputs, key_padding_mask=padding, need_weights=need), expected)


def test_dropout_is_that_of_torch():
    attention = _attention(dropout=0.5, batch_first=True)
    unfused, x = _unfused(attention), torch.randn(N, L, E)
    for need in (True, False):
        torch.manual_seed(0)
        expected = attention(x, x, x, need_weights=need)[0]
        torch.manual_seed(0)
        torch.testing.assert_close(unfused(x, x, x, need_weights=need)[0], expected, rtol=1e-4, atol=2e-5)
        assert (unfused.eval()(x, x, x)[0] - expected).abs().max() > 0.01
        unfused.train()


def test_gradients_are_those_of_the_fused_weight():
    attention, x = _attention(batch_first=True), torch.randn(N, L, E)
    unfused = split_view(nn.ModuleList([attention]))[0]
    attention(x, x, x)[0].square().sum().backward()
    fused = attention.in_proj_weight.grad
    unfused(x, x, x)[0].square().sum().backward()
    found = torch.cat([getattr(unfused, name).weight.grad for name in PROJECTIONS[:3]])
    torch.testing.assert_close(found, fused, rtol=1e-4, atol=1e-3)


def test_wrong_masks_are_errors():
    unfused, x = _unfused(_attention(batch_first=True)), torch.randn(N, L, E)
    with pytest.raises(ModelError, match=r"shape \(1, 5\); it must be \(5, 5\), or \(12, 5, 5\)"):
        unfused(x, x, x, attn_mask=torch.zeros(1, L))
    with pytest.raises(ModelError, match="is_causal says that attn_mask is the causal mask"):
        unfused(x, x, x, is_causal=True)


class Stock(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self, **options):
        super().__init__()
        options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, **options}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, **options), 1)

    def forward(self, x, y, padding):
        memory = self.encoder(x, src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        out = self.decoder(y, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)
        return out, memory.masked_fill(padding[..., None], 0.0)


def _stock_inputs():
    padding = torch.arange(S) >= torch.tensor([[7], [4], [2]])
    return torch.randn(N, S, E), torch.randn(N, L, E), padding


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}])
def test_inside_torchs_encoder_and_decoder_layers(options):
    model, inputs = Stock(**options), _stock_inputs()
    only_attention = LowRankCompression(rank=100, min_saving=0, include=["*attn*"])
    small = only_attention.compress(model)
    attentions = [layer for layer in compressed_layers(small).values() if isinstance(layer, UnfusedAttention)]
    assert len(attentions) == 4  # two in the encoder, self and cross attention in the decoder
    for training in (True, False):
        with torch.no_grad():  # where torch would take its fast path
            found, expected = small.train(training)(*inputs), model.train(training)(*inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_eval_output_is_that_of_the_compressed_projections():
    """The fast path would take the fused weight; here there is none, and a low rank changes the output."""
    model, inputs = Stock(), _stock_inputs()
    small = LowRankCompression(rank=2, include=["*attn*"]).compress(model)
    with torch.no_grad():
        trained, evaluated = small.train()(*inputs), small.eval()(*inputs)
        original = model.eval()(*inputs)
    for one, other, plain in zip(trained, evaluated, original, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert (one - plain).abs().max() > 0.1


class TestPlanning:
    def test_the_projections_are_layers_like_any_other(self):
        plan = LowRankCompression(rank=2, include=["*.self_attn.q_proj", "*.0.self_attn.out_proj"]).plan(Stock())
        names = [entry.name for entry in plan.layers]
        first = "encoder.layers.0.self_attn"
        assert names[:2] == [f"{first}.q_proj", f"{first}.out_proj"]
        splits = [entry.name for entry in plan.splits]
        assert splits == [first, "encoder.layers.1.self_attn", "decoder.layers.0.self_attn"]
        assert CompressionPlan.from_json(plan.to_json()) == plan

    def test_an_attention_whose_projections_all_stay_is_left_as_it_was(self):
        model = Stock()
        small = LowRankCompression(rank=2, exclude=["encoder.layers.0.self_attn", "*.multihead_attn"]).compress(model)
        assert type(small.encoder.layers[0].self_attn) is nn.MultiheadAttention
        assert type(small.decoder.layers[0].multihead_attn) is nn.MultiheadAttention
        assert isinstance(small.encoder.layers[1].self_attn, UnfusedAttention)

    def test_planning_copies_no_weight_and_leaves_the_model_alone(self):
        model = Stock()
        view = split_view(model)
        fused, parts = model.encoder.layers[0].self_attn, view.encoder.layers[0].self_attn
        assert type(fused) is nn.MultiheadAttention
        assert not fused._forward_pre_hooks
        assert parts.q_proj.weight.data_ptr() == fused.in_proj_weight.data_ptr()
        assert parts.out_proj.weight is fused.out_proj.weight
        assert model.encoder.use_nested_tensor
        assert split_view(view) is view

    def test_a_plan_without_the_attention_has_none_of_its_projections(self):
        plan = LowRankCompression(rank=2, include=["*attn*"]).plan(Stock())
        fewer = plan.without("encoder.layers.0.self_attn")
        assert len(fewer.layers) == len(plan.layers) - 4
        model = Stock()
        LowRankCompression(rank=2).apply(model, fewer)
        assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention

    def test_a_shared_fused_weight_is_left_alone_with_the_reason(self):
        model = nn.Sequential(_attention(), _attention(), nn.Linear(E, E))
        model[1].in_proj_weight = model[0].in_proj_weight
        plan = LowRankCompression(rank=2, include=["*"]).plan(model)
        reasons = {skip.name: skip.reason for skip in plan.skipped}
        assert "shares a parameter with '1'" in reasons["0"]
        assert [entry.name for entry in plan.layers] == ["2"]

    def test_a_pruned_one_is_left_alone_with_the_reason(self):
        model = nn.Sequential(_attention(), nn.Linear(E, E))
        nn.utils.prune.l1_unstructured(model[0], "in_proj_weight", 0.5)
        reasons = {skip.name: skip.reason for skip in LowRankCompression(rank=2).plan(model).skipped}
        assert "come from a hook" in reasons["0"]

    def test_what_another_method_keeps_track_of_stays_whole(self):
        model = nn.Sequential(_attention(), nn.Linear(E, E))
        context = CompressionContext(by="test", kept=frozenset({"0.in_proj_weight"}))
        plan = LowRankCompression(rank=2, include=["*"]).plan(model, context)
        assert [entry.name for entry in plan.layers] == ["1"]
        assert "keeps track of its in_proj_weight" in {skip.name: skip.reason for skip in plan.skipped}["0"]

    def test_one_attention_in_two_places_is_split_once(self):
        attention = _attention()
        model = nn.ModuleList([attention, attention])
        small = LowRankCompression(rank=2).compress(model)
        assert small[0] is small[1]
        assert isinstance(small[0], UnfusedAttention)

    def test_frozen_parameters_stay_frozen(self):
        model = nn.Sequential(_attention())
        model[0].in_proj_weight.requires_grad_(False)
        out = model[0].out_proj.weight
        small = compress_model(model, "qat", inplace=True, min_saving=0)[0]
        assert not small.q_proj.weight.requires_grad
        assert small.q_proj.bias.requires_grad
        assert small.out_proj.weight is out

    def test_the_adapter_describes_it(self):
        info = LayerAdapter().get_layer_info(_attention(kdim=12))
        assert LayerAdapter().is_compressible(_attention())
        assert (info["type"], info["num_heads"], info["kdim"]) == ("multiheadattention", H, 12)
        assert info["shape"] == (E, E)


class TestKeeping:
    METHOD = LowRankCompression(rank=3, include=["*attn*"])

    def test_the_state_dict_alone_rebuilds(self):
        small = self.METHOD.compress(Stock())
        fresh = prepare(Stock())
        fresh.load_state_dict(small.state_dict())
        inputs = _stock_inputs()
        with torch.no_grad():
            assert torch.equal(fresh.eval()(*inputs)[0], small.eval()(*inputs)[0])

    def test_a_fused_file_does_not_fit_and_the_error_says_so(self):
        small = self.METHOD.compress(Stock())
        with pytest.raises(CheckpointError, match="holds 4 uncompressed layer.*self_attn"):
            small.load_state_dict(Stock().state_dict())

    def test_copies_and_pickles(self):
        small, inputs = self.METHOD.compress(Stock()).eval(), _stock_inputs()
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(*inputs)[0], small(*inputs)[0])

    def test_finalize_keeps_it_and_deploys_the_projections(self, tmp_path):
        model, inputs = Stock().eval(), _stock_inputs()
        small = PTQCompression(scheme="dynamic", include=["*attn*"], min_saving=0).compress(model)
        final = finalize(small)
        attention = final.encoder.layers[0].self_attn
        assert isinstance(attention, UnfusedAttention)
        assert {type(getattr(attention, name)).__name__ for name in PROJECTIONS} == {"IntLinear"}
        with torch.no_grad():
            expected = model(*inputs)[0]
            assert (final(*inputs)[0] - expected).norm() < 0.05 * expected.norm()
        loaded = load_compressed(Stock, save_compressed(small, tmp_path / "model.safetensors"))
        assert torch.equal(loaded(*inputs)[0], final(*inputs)[0])

    def test_a_second_method_finds_the_projections(self):
        model = self.METHOD.compress(Stock())
        small = QATCompression(include=["*attn*"], min_saving=0).compress(model)
        kinds = {name: layer.kind for name, layer in compressed_layers(small).items() if "layers.0.self_attn.q" in name}
        assert list(kinds.values()) == ["low_rank_linear", "quant_linear", "quant_linear"] * 2

    def test_the_report_has_a_row_for_each_projection(self):
        model = Stock()
        report = compression_report(model, self.METHOD.compress(model), _stock_inputs())
        rows = {row.name: row for row in report.layers}
        assert len(rows) == 16
        row = rows["encoder.layers.0.self_attn.k_proj"]
        assert row.params == (E * E + E, 2 * 3 * E + E)
        assert row.macs == (S * E * E, S * 2 * 3 * E)  # per sample
        assert 0.3 < row.error < 1
        saved = sum(before - after for before, after in (row.params for row in report.layers))
        assert report.params[0] == sum(p.numel() for p in model.parameters())
        assert report.params[0] - report.params[1] == saved

    def test_it_exports_with_a_dynamic_batch(self):
        model = nn.ModuleDict({"attention": _attention(batch_first=True)})
        small = LowRankCompression(rank=2, min_saving=0).compress(model)["attention"].eval()

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = small

            def forward(self, x, padding):
                return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]

        batch = torch.export.Dim("batch", min=2, max=64)
        example = (torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool))
        program = torch.export.export(Net(), example, dynamic_shapes=({0: batch}, {0: batch}))
        x, padding = torch.randn(6, L, E), torch.arange(L).expand(6, -1) > 3
        torch.testing.assert_close(program.module()(x, padding), Net()(x, padding), rtol=1e-5, atol=1e-5)
