"""The table between our parameters and the tensors of Qwen2, Qwen3 and Llama checkpoints, for both directions.

The three families share their names; they differ in q/k/v biases, q/k norms and tied embeddings, which the model's
configuration says. A model in this table is a list of mappings, one per parameter. Pairs of mixers and experts have
two tables: one reads the family's tensors, of which a conversion makes several parameters (`inherited`), and one gives
every parameter a name of its own (`table`), in which a model is exported and read back. Other layers have one.
"""

from __future__ import annotations

from sbtrain.config.pattern import LayerKind, parse_pattern
from sbtrain.config.schema import ModelConfig
from sbtrain.convert.attention import dropped, mixer_rows
from sbtrain.convert.mapping import Direct, Fill, Mapping, Source, Vocab
from sbtrain.convert.upcycle import ffn_rows

EMBEDDING = "embedding.word_embeddings.weight"
META = "embedding.meta_tokens"
OUTPUT = "output_layer.weight"
_HF_EMBEDDING = "model.embed_tokens.weight"
_HF_OUTPUT = "lm_head.weight"
_HF_LAYER = "model.layers."


def kinds_of(model: ModelConfig) -> tuple[LayerKind, ...]:
    """Every layer. Raises ValueError at a mixer that conversion does not know."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    for layer, kind in enumerate(kinds):
        if set(kind.mixers) - set("FSL"):
            raise ValueError(
                f"model.pattern {model.pattern!r}: layer {layer} is {kind.symbol}; import and export know F, S and L, "
                "alone or in pairs"
            )
    return kinds


def table(model: ModelConfig) -> list[Mapping]:
    """One mapping per parameter of the unsharded model, in the order of the layers; every tensor has one parameter."""
    return _table(model, from_teacher=False)


def inherited(model: ModelConfig) -> list[Mapping]:
    """The same parameters, made of the source family's tensors. Raises ValueError where these cannot become them."""
    return _table(model, from_teacher=True)


def _table(model: ModelConfig, *, from_teacher: bool) -> list[Mapping]:
    hidden = model.hidden_size
    rows = [_vocab(EMBEDDING, _HF_EMBEDDING, model)]
    if model.meta.num_tokens:
        meta = Source("model.meta_tokens", (model.meta.num_tokens, hidden))
        rows.append(Direct(META, meta.shape, (meta,), new=True, std=model.meta.init_std))
    for layer, kind in enumerate(kinds_of(model)):
        ours, theirs = f"decoder.layers.{layer}", f"{_HF_LAYER}{layer}"
        rows.append(_norm(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", hidden))
        rows += mixer_rows(layer, kind, model, from_teacher=from_teacher)
        rows.append(_norm(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight", hidden))
        rows += ffn_rows(f"{ours}.mlp", f"{theirs}.mlp", model, moe=kind.moe, from_dense=from_teacher)
    rows.append(_norm("decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not model.tie_embeddings:
        rows.append(_vocab(OUTPUT, _HF_OUTPUT, model))
    return rows


def check_names(names: list[str], rows: list[Mapping], *, model: ModelConfig, where: str) -> None:
    """Every tensor that the model should inherit is there, and nothing else is left over.

    names: tensors of the checkpoint `where`. Left behind on purpose: q/k norms of converted L layers, the output
    matrix of a tied model, rotary tables. Raises ValueError naming the first tensor that is missing or unused.
    """
    wanted = {source.name for row in rows if not row.new for source in row.sources}
    ignored = {name for layer, kind in enumerate(kinds_of(model)) for name in dropped(layer, kind, model)}
    if model.tie_embeddings:
        ignored.add(_HF_OUTPUT)
    missing = sorted(wanted - set(names))
    if missing:
        raise ValueError(f"{where} holds no tensor {missing[0]} ({len(missing)} missing); check start.path and model.*")
    unused = sorted(n for n in set(names) - wanted - ignored if not n.endswith("rotary_emb.inv_freq"))
    if unused:
        raise ValueError(
            f"{where} holds tensor {unused[0]}, which this model has no place for ({len(unused)} unused); "
            "check model.num_layers, qkv_bias, qk_norm and tie_embeddings against its config.json"
        )


def _norm(ours: str, theirs: str, hidden: int) -> Mapping:
    return Direct(ours, (hidden,), (Source(theirs, (hidden,)),), fill=Fill.norm)


def _vocab(ours: str, theirs: str, model: ModelConfig) -> Mapping:
    source = Source(theirs, (model.vocab_size, model.hidden_size))
    return Vocab(ours, (model.padded_vocab_size, model.hidden_size), (source,), 0)
