"""Rules for the layers, embeddings and heads that the releases inherited from BERT, and for BERT's own text weights.

Our names are those of the blocks in `nn`: TransformerLayer, TextEmbeddings, FirstTokenPooler, the "bert" vocabulary
head.
Source: google-research/bert as converted by pytorch-pretrained-bert and transformers (`bert-base-uncased`).
"""

from __future__ import annotations

from visling.checkpoints.keymap import Rule, drop, rename, repair, tie

REPAIRS: tuple[Rule, ...] = (
    repair("**.gamma", "**.weight"),  # norms in early PyTorch conversions of BERT
    repair("**.beta", "**.bias"),
    drop("**.position_ids", "a constant 0, 1, 2, ... that transformers up to 4.30 stored"),
)
"""Old spellings of norm weights, and a buffer that is no parameter."""


def layer(theirs: str, ours: str) -> tuple[Rule, ...]:
    """One BERT layer under their prefix -> a TransformerLayer under ours."""
    return (
        rename(f"{theirs}.attention.self.query.*", f"{ours}.self_attention.attention.query.*"),
        rename(f"{theirs}.attention.self.key.*", f"{ours}.self_attention.attention.key.*"),
        rename(f"{theirs}.attention.self.value.*", f"{ours}.self_attention.attention.value.*"),
        rename(f"{theirs}.attention.output.dense.*", f"{ours}.self_attention.output.*"),
        rename(f"{theirs}.attention.output.LayerNorm.*", f"{ours}.self_attention.norm.*"),
        rename(f"{theirs}.intermediate.dense.*", f"{ours}.feed_forward.up.*"),
        rename(f"{theirs}.output.dense.*", f"{ours}.feed_forward.down.*"),
        rename(f"{theirs}.output.LayerNorm.*", f"{ours}.feed_forward.norm.*"),
    )


def text_embeddings(theirs: str, ours: str) -> tuple[Rule, ...]:
    """BERT's three tables -> TextEmbeddings; the norm belongs to the model."""
    return (
        rename(f"{theirs}.word_embeddings.weight", f"{ours}.words.weight"),
        rename(f"{theirs}.position_embeddings.weight", f"{ours}.positions.weight"),
        rename(f"{theirs}.token_type_embeddings.weight", f"{ours}.segments.weight"),
    )


def vocabulary(theirs: str, ours: str, *, words: str, second_bias: bool = False) -> tuple[Rule, ...]:
    """BERT's word prediction -> the "bert" vocabulary head, whose output matrix is the word table.

    Args:
        words: their key of the word table.
        second_bias: the file stores the output bias twice (transformers).
    """
    rules = (
        rename(f"{theirs}.transform.dense.*", f"{ours}.dense.*"),
        rename(f"{theirs}.transform.LayerNorm.*", f"{ours}.norm.*"),
        rename(f"{theirs}.bias", f"{ours}.bias"),
        tie(f"{theirs}.decoder.weight", words, part=ours),
    )
    return (*rules, tie(f"{theirs}.decoder.bias", f"{theirs}.bias", part=ours)) if second_bias else rules


RELEASE: tuple[Rule, ...] = (
    *REPAIRS,
    *text_embeddings("bert.embeddings", "encoder.embeddings"),
    rename("bert.embeddings.LayerNorm.*", "encoder.norm.*"),
    *layer("bert.encoder.layer.*", "encoder.layers.*"),
    rename("bert.pooler.dense.*", "encoder.pooler.dense.*"),
    *vocabulary("cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight", second_bias=True),
    # The next-sentence head keeps its two outputs although class 1, "random" in BERT, then learns to mean "matches"
    # (VisualBERT release).
    rename("cls.seq_relationship.*", "matching.linear.*"),
)
"""BERT's pre-trained text weights -> a single-stream encoder, word prediction and matching head."""
