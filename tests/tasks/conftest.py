"""Tiny model folders as the hub lays them out: random weights, a tokenizer made here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fedrot.tasks.cache import quiet

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]


def byte_tokenizer(*, pair: bool) -> PreTrainedTokenizerFast:
    """A token a byte. ``pair``: closes sequences as RoBERTa; else opens them only, as Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        {"single": "<s> $A </s>", "pair": "<s> $A </s> </s> $B </s>"}
        if pair
        else {"single": "<s> $A"}
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **tokens, **({"pad_token": "<pad>"} if pair else {})
    )


def saved(factory, name, kind, config, tokenizer):
    """The folder of a model of random weights."""
    folder = factory.mktemp(name)
    torch.manual_seed(0)
    with quiet():
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    # Without a classifier, as the hub's.
    tokenizer = byte_tokenizer(pair=True)
    return saved(tmp_path_factory, "roberta", RobertaForMaskedLM, config, tokenizer)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = byte_tokenizer(pair=False)
    return saved(tmp_path_factory, "llama", LlamaForCausalLM, config, tokenizer)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """Its tokenizer adds nothing to a text."""
    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    tokenizer = byte_tokenizer(pair=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return saved(tmp_path_factory, "gpt2", GPT2LMHeadModel, config, tokenizer)


@pytest.fixture(scope="session")
def deberta(tmp_path_factory):
    """Its query projection is also applied to embeddings of positions, one for all examples."""
    config = DebertaV2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        initializer_range=0.5,
    )
    tokenizer = byte_tokenizer(pair=True)
    return saved(tmp_path_factory, "deberta", DebertaV2ForSequenceClassification, config, tokenizer)
