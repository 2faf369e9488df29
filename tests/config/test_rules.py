"""Cross-field rules: one table of refusals, and the world sizes that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.load import load
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig
from sbtrain.config.rules import check, check_evaluation, check_training, check_world, layout_problem, smallest_world
from sbtrain.config.schema import OnSpike


@pytest.fixture(scope="module")
def recipe():
    return load(["recipe=7b_cpt", "dry_run=true"])


@pytest.fixture(scope="module")
def demo():
    return load(["recipe=demo", "dry_run=true"])


def changed(value, path: str, new):
    """`value` with the field at the dotted path replaced; Dict entries by name."""
    name, _, rest = path.partition(".")
    if isinstance(value, dict):
        return {**value, name: changed(value[name], rest, new) if rest else new}
    return replace(value, **{name: changed(getattr(value, name), rest, new) if rest else new})


S = "stages.ctx_8k"
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
HEADS = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
REFUSALS = [
    ({"model.hidden_size": 0}, ["model.hidden_size=0"]),
    ({"model.window": 0}, ["model.window=0"]),
    ({"model.num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=28"]),
    ({"model.head_dim": 127}, ["model.head_dim=127"]),
    ({"model.gla.gate_rank": 0}, ["model.gla.gate_rank"]),
    ({"model.pattern": "LSX"}, ["model.pattern", "position 3"]),
    ({"model.pattern": "LB x 14"}, ["layer 1 is B", "not trainable yet", "F, S, L"]),
    ({"model.pattern": "LE"}, ["layer 1 is E"]),
    ({"model.pattern": "(SF)"}, ["layer 0 is (SF)", "(LS), (LF)"]),
    ({"model.pattern": "(SL)"}, ["layer 0 is (SL)", "(LS), (LF)"]),
    ({"model.gla.gate": Gate.tied}, ["model.gla.gate=tied", "model.gla.feature_map=sigmoid"]),
    ({"model.gla.lower_bound": 0.5}, ["model.gla.lower_bound=0.5", "model.gla.gate=tied"]),
    ({"model.gla": replace(TIED, lower_bound=1.0)}, ["model.gla.lower_bound=1.0", "less than 1"]),
    ({"model.meta.num_tokens": -1}, ["model.meta.num_tokens", "0 or more"]),
    ({"model.pair.calibration_tokens": 0}, ["model.pair.calibration_tokens=0"]),
    ({"model.pattern": "L B:m"}, ["layer 1 is B:m"]),
    ({"dry_run": False}, ["start.path=models/Qwen2.5-7B does not exist"]),
    ({"optim.beta1": 1.0}, ["optim.beta1=1.0"]),
    ({"optim.eps": 0.0}, ["optim.eps=0.0"]),
    ({"optim.weight_decay": -0.1}, ["optim.weight_decay=-0.1"]),
    ({"seed": -1}, ["seed=-1"]),
    ({"log.every_steps": 0}, ["log.every_steps=0"]),
    ({"checkpoint.every_steps": 3, "checkpoint.keep_every_steps": 10}, ["keep_every_steps=10", "give 12 or 0"]),
    ({"checkpoint.snapshot_every_steps": -1}, ["checkpoint.snapshot_every_steps=-1"]),
    (
        {"checkpoint.snapshot_every_steps": 2, "checkpoint.asynchronous": False},
        ["checkpoint.snapshot_every_steps=2", "checkpoint.asynchronous=true"],
    ),
    ({"log.wandb_mode": "on"}, ["log.wandb_mode=on", "offline, online, disabled"]),
    ({"cluster.num_gpus": 0}, ["cluster.num_gpus=0"]),
    ({"runtime.timeout_s": 0.0}, ["runtime.timeout_s=0.0", "at least 1"]),
    ({"runtime.timeout_s": -5.0}, ["runtime.timeout_s=-5.0"]),
    ({"runtime.timeout_s": float("inf")}, ["runtime.timeout_s=inf"]),
    ({"runtime.timeout_s": float("nan")}, ["runtime.timeout_s=nan"]),
    ({"watch.max_skipped_steps": -1}, ["watch.max_skipped_steps=-1", "give 0 or more"]),
    ({"watch.max_skipped_steps": 100}, ["watch.max_skipped_steps=100", "watch.window_steps=100", "less than that"]),
    ({"watch.window_steps": 5}, ["watch.window_steps=5", "20 or more"]),
    ({"watch.spike_score": float("nan")}, ["watch.spike_score=nan"]),
    ({"watch.max_rollbacks": 0}, ["watch.max_rollbacks=0", "give 1 or more"]),
    ({"watch.on_spike": OnSpike.rollback, "watch.spike_score": 0.0}, ["watch.on_spike=rollback", "watch.spike_score"]),
    ({"watch.measure_every_steps": -2}, ["watch.measure_every_steps=-2"]),
    ({"watch.slow_ratio": 1.0}, ["watch.slow_ratio=1.0", "1.01 or more"]),
    ({"watch.memory_share": 95.0}, ["watch.memory_share=95.0", "more than 0, up to 1"]),
    ({"watch.clock_skew_s": float("inf")}, ["watch.clock_skew_s=inf"]),
    ({"stages": {}}, ["stages is empty"]),
    ({"data.sources.pretrain.path": ""}, ["data.sources.pretrain.path is empty"]),
    ({"data.sources.pretrain.weight": -1.0}, ["data.sources.pretrain.weight=-1.0"]),
    ({"data.sources.pretrain.weight": float("nan")}, ["data.sources.pretrain.weight=nan"]),
    ({"data.sources.pretrain.weight": 0.0}, ["data.sources: all weights are 0"]),
    ({"evaluation.tokens": 5}, ["evaluation.tokens", "data.sources.NAME.valid"]),
    ({f"{S}.seq_len": 0}, [f"{S}.seq_len=0"]),
    ({f"{S}.micro_batch": 0}, [f"{S}.micro_batch=0"]),
    ({f"{S}.tokens": 0}, [f"{S}.tokens=0"]),
    ({f"{S}.global_batch_tokens": 10_000}, [f"{S}.global_batch_tokens=10000", "the nearest is 8192"]),
    ({f"{S}.tokens": 8192}, [f"{S}.tokens=8192 is less than one step"]),
    ({f"{S}.schedule.lr": -1.0}, [f"{S}.schedule.lr=-1.0 is negative"]),
    ({f"{S}.schedule.min_lr": 1.0}, [f"{S}.schedule.min_lr=1.0 exceeds"]),
    ({f"{S}.schedule.warmup_tokens": 10**12}, [f"{S}.schedule.warmup_tokens", f"{S}.tokens"]),
    ({f"{S}.schedule.decay_fraction": 1.5}, [f"{S}.schedule.decay_fraction=1.5"]),
    ({f"{S}.blend": {"pretrian": 1.0}}, [f"{S}.blend.pretrian", "did you mean pretrain?"]),
    ({f"{S}.blend": {"pretrain": 0.0}}, [f"{S}.blend: all weights are 0"]),
    ({"ops": {"glaa": "cuda"}}, ["ops.glaa: there is no such op", "did you mean gla?"]),
    ({f"{S}.layout.tp": 0}, [f"{S}.layout.tp=0"]),
    ({f"{S}.layout.tp": 3}, [f"{S}.layout.tp=3", "model.num_heads=28"]),
    ({f"{S}.layout.tp": 7}, [f"{S}.layout.tp=7", "model.num_kv_heads=4"]),
    ({f"{S}.layout.tp": 4, "model.ffn_size": 18942}, [f"{S}.layout.tp=4", "model.ffn_size=18942"]),
    ({f"{S}.layout.tp": 4, "model.vocab_size": 101, "model.vocab_multiple": 1}, ["padded vocabulary of 101"]),
    ({f"{S}.layout.pp": 29}, [f"{S}.layout.pp=29", "model.num_layers=28"]),
    ({f"{S}.layout.vpp": 0}, [f"{S}.layout.vpp=0 must be 1 or more"]),
    ({f"{S}.layout.vpp": 2}, [f"{S}.layout.vpp=2 needs layout.pp of 2 or more; set vpp=1 or raise pp"]),
    (
        {f"{S}.layout": Layout(pp=4, vpp=8)},
        [f"{S}.layout.pp=4 x vpp=8 exceeds model.num_layers=28; lower vpp"],
    ),
    (
        {f"{S}.layout": Layout(pp=2, vpp=2, pp_layers=(14, 14))},
        [f"{S}.layout.pp_layers=[14,14] has 2 entries; layout.pp=2 x vpp=2 needs 4, or [] for a balanced split"],
    ),
    (
        {f"{S}.layout": Layout(pp=2, pp_layers=(28, 0))},
        [f"{S}.layout.pp_layers=[28,0] leaves a stage without layers; give every one at least 1"],
    ),
    (
        {f"{S}.layout": Layout(pp=2, pp_layers=(14, 15))},
        [f"{S}.layout.pp_layers=[14,15] are 29 layers, model.num_layers=28; make them add up"],
    ),
    ({f"{S}.layout.ep": 2}, [f"{S}.layout.ep=2", "mixture-of-experts"]),
    ({f"{S}.layout.tp_sequence_parallel": True}, [f"{S}.layout.tp_sequence_parallel=true needs"]),
    ({f"{S}.layout.sp": 3}, [f"{S}.layout.sp=3", "seq_len=8192"]),
    ({f"{S}.layout.sp": 16384}, [f"{S}.layout.sp=16384 does not divide seq_len=8192"]),  # more ranks than tokens
    (
        {f"{S}.layout": Layout(sp=6, sp_algorithm=HEADS), f"{S}.seq_len": 6144, f"{S}.global_batch_tokens": 6144},
        ["layout.sp=6", "multiple of 4"],
    ),
    (
        {f"{S}.layout": Layout(tp=2, sp=3, sp_algorithm=HEADS), f"{S}.seq_len": 6144, f"{S}.global_batch_tokens": 6144},
        ["layout.sp=3", "the 2 key/value heads", "multiple of 2"],
    ),
    ({f"{S}.layout.sp_algorithm.S": SequenceAlgorithm.lasp2}, [f"{S}.layout.sp_algorithm.S=lasp2", "choose halo or"]),
    (
        {f"{S}.layout.sp_algorithm.L": SequenceAlgorithm.halo},
        [f"{S}.layout.sp_algorithm.L=halo", "lasp2 or zeco"],
    ),
    (
        {f"{S}.layout.sp": 2, "model.window": 8193, f"{S}.layout.sp_algorithm.S": SequenceAlgorithm.halo},
        [f"{S}.layout.sp_algorithm.S=halo", "window of 8193 tokens is longer than seq_len=8192", "choose ulysses"],
    ),
    (
        {f"{S}.layout": Layout(tp=4, tp_sequence_parallel=True), f"{S}.seq_len": 6, f"{S}.global_batch_tokens": 6},
        ["tp=4 under tp_sequence_parallel", "row of 6 tokens"],
    ),
    (
        {f"{S}.layout": Layout(tp=4, tp_sequence_parallel=True), "model.meta.num_tokens": 3},
        [
            "tp=4 under tp_sequence_parallel", "model.meta.num_tokens=3 before each", "tp 4 holds equal parts",
            "choose a seq_len, micro_batch or model.meta.num_tokens that they divide",
        ],
    ),
    ({"model.meta.num_tokens": -1}, ["model.meta.num_tokens=-1 must be 0 or more"]),
    ({"model.meta.init_std": -0.5}, ["model.meta.init_std=-0.5 must be 0 or more"]),
    ({"model.gla.gate_rank": 0}, ["model.gla.gate_rank=0 must be greater than 0"]),
    ({"model.gla.gate_normalizer": -2.0}, ["model.gla.gate_normalizer=-2.0 must be greater than 0"]),
    ({"model.moe.num_experts": 0}, ["model.moe.num_experts=0 is too small; give 1 or more"]),  # the 7B has none
]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"model.pattern": "(LS) x 6 (LF)", "model.gla": TIED},
        {"model.meta.num_tokens": 128, f"{S}.layout": Layout(tp=4, sp=2, tp_sequence_parallel=True)},
        {  # neither the tokens of a shard nor the meta tokens go evenly to 4 ranks, together they do
            "model.meta.num_tokens": 2, f"{S}.layout": Layout(tp=4, tp_sequence_parallel=True), f"{S}.seq_len": 8190,
            f"{S}.global_batch_tokens": 8190,
        },
    ],
)  # fmt: skip
def test_pairs_and_meta_tokens_are_trainable(recipe, changes):
    for path, new in changes.items():
        recipe = changed(recipe, path, new)
    check(recipe)


@pytest.mark.parametrize(("changes", "parts"), REFUSALS, ids=[" ".join(changes) for changes, _ in REFUSALS])
def test_refusals_are_one_line_with_key_and_reason(recipe, changes, parts):
    for path, new in changes.items():
        recipe = changed(recipe, path, new)
    with pytest.raises(ValueError) as caught:
        check(recipe)
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text, text


def test_objectives_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="stages.ctx_8k.objective=kd is not available yet; available: ce"):
        load(["recipe=7b_cpt", "dry_run=true", "stages.ctx_8k.objective=kd"])


def test_wsd_may_not_decay_during_warmup(demo):
    args = ["stages.ctx_256.schedule.decay=wsd", "stages.ctx_256.schedule.decay_fraction=0.95"]
    with pytest.raises(ValueError, match="stages.ctx_256.schedule: warmup_tokens=.* overlap"):
        load(["recipe=demo", "dry_run=true", *args])


def test_a_corpus_is_listed_once(demo):
    with pytest.raises(ValueError, match="data.sources.shakespeare.path=.*wiki_train is already the path of wiki"):
        check(changed(demo, "data.sources.shakespeare.path", demo.data.sources["wiki"].path))


@pytest.mark.parametrize(
    ("sp", "tp", "legal"),
    [(1, 1, True), (2, 1, True), (3, 1, True), (4, 1, True), (8, 1, True), (12, 1, True), (6, 1, False),
     (10, 1, False), (2, 2, True), (4, 2, True), (5, 2, False), (5, 4, True)],
)  # fmt: skip
def test_ulysses_rule_of_4_kv_heads(recipe, sp, tp, legal):
    stage = replace(recipe.stages["ctx_8k"], seq_len=120, global_batch_tokens=120)
    assert (layout_problem(recipe.model, stage, Layout(sp=sp, tp=tp, sp_algorithm=HEADS)) is None) == legal


def test_states_and_halos_need_no_rule_of_heads(recipe):
    stage = replace(recipe.stages["ctx_8k"], seq_len=8196, global_batch_tokens=8196)
    algorithms = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
    assert layout_problem(recipe.model, stage, Layout(sp=6, sp_algorithm=algorithms)) is None
    assert layout_problem(recipe.model, stage, Layout(sp=6)) is None, "auto finds what is possible"
    wide = replace(recipe.model, window=8197)
    assert "multiple of 4" in layout_problem(wide, stage, Layout(sp=6)), "neither by heads nor by a halo"
    assert layout_problem(wide, stage, Layout(sp=4)) is None
    half = replace(algorithms, S=SequenceAlgorithm.ulysses)
    assert "multiple of 4" in layout_problem(recipe.model, stage, Layout(sp=6, sp_algorithm=half))
    full = replace(recipe.model, pattern="LF")
    assert "multiple of 4" in layout_problem(full, stage, Layout(sp=6, sp_algorithm=algorithms))


def test_worlds_of_the_7b_recipe(recipe):
    check_world(recipe, 256)
    check_world(recipe, 8)
    assert smallest_world(recipe) == 8
    with pytest.raises(ValueError, match=r"stages.ctx_32k: .*sp 4 = 4 ranks do not divide the world of 2; .* 8"):
        check_world(recipe, 2)
    with pytest.raises(ValueError, match="stages.ctx_8k: global_batch_tokens=4194304 are 512 rows .* dp 6 "):
        check_world(recipe, 6)
    with pytest.raises(ValueError, match=r"stages.ctx_128k: .*sp 8 = 8 ranks do not divide the world of 4; .* is 8"):
        check_world(recipe, 4)
    with pytest.raises(ValueError, match=r"ctx_128k: global_batch_tokens=4194304 are 32 rows .* dp 64 .* is 8"):
        check_world(recipe, 512)


def test_chunks_want_rows_in_multiples_of_the_stages(recipe):
    chunked = changed(recipe, "stages.ctx_8k.layout", Layout(pp=4, vpp=2))
    check_world(chunked, 256)
    with pytest.raises(ValueError) as caught:
        check_world(changed(chunked, "stages.ctx_8k.global_batch_tokens", 510 * 8192), 8)
    assert "stages.ctx_8k: layout.vpp=2 takes rows pp=4 at a time" in str(caught.value)
    assert "are 255 rows a data-parallel rank (dp 2); set layout.vpp=1 or make them a multiple" in str(caught.value)


def test_worlds_of_the_demo(demo):
    check_world(demo, 2)
    with pytest.raises(ValueError, match=r"stages.ctx_512: .*pp 2.* do not divide the world of 1; .* is 2"):
        check_world(demo, 1)
    with pytest.raises(ValueError, match="stages.ctx_512.layout.tp=2 does not divide model.num_heads=9"):
        check(changed(demo, "stages.ctx_512.layout", Layout(tp=2)))
    check(changed(demo, "stages.ctx_512.layout", Layout(tp=3)))


def test_smallest_world_counts_the_batch(demo):
    three = changed(demo, "stages.ctx_256.layout", Layout(tp=3))
    assert smallest_world(three) is None  # 6 ranks are dp 3 in ctx_512 and ctx_1024, whose batches 3 does not divide
    with pytest.raises(ValueError, match="no world fits all stages as they are"):
        check_world(three, 6)
    for stage in ("ctx_512", "ctx_1024"):
        three = changed(three, f"stages.{stage}.global_batch_tokens", 3072)
    assert smallest_world(three) == 6


def test_a_weight_of_0_leaves_a_source_out(demo):
    check(changed(demo, "stages.ctx_256.blend", {"wiki": 0.0}))
    with pytest.raises(ValueError, match="stages.ctx_256.blend: all weights are 0"):
        check(changed(demo, "stages.ctx_256.blend", {"wiki": 0.0, "shakespeare": 0.0}))


@pytest.mark.parametrize("key", ["optim.eps", "stages.ctx_256.schedule.lr", "model.rope_theta", "optim.clip_grad"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(key, value):
    with pytest.raises(ValueError, match=rf"{key}={value} is not a finite number"):
        load(["recipe=demo", "dry_run=true", f"{key}={value}"])


def test_held_out_rows_must_fit_every_layout(demo):
    """Without evaluation.seq_len they are as long as the longest stage."""
    short = replace(demo.stages["ctx_256"], seq_len=128, global_batch_tokens=512, layout=Layout(sp=2))
    odd = replace(short, seq_len=129, global_batch_tokens=516, layout=Layout())
    recipe = changed(replace(demo, stages={"short": short}), "evaluation.seq_len", 63)
    with pytest.raises(ValueError, match="evaluation.seq_len: 63 tokens .* the 2 shards of stages.short.layout"):
        check(recipe)
    recipe = changed(replace(demo, stages={"short": short, "odd": odd}), "evaluation.seq_len", 0)
    for rule in (check, lambda recipe: check_world(recipe, 2)):
        with pytest.raises(ValueError, match="evaluation.seq_len: 129 tokens .* the 2 shards of stages.short.layout"):
            rule(recipe)
    check(changed(recipe, "evaluation.tokens", 0))


def test_held_out_rows_must_fit_the_teacher(demo):
    """It has no meta tokens: 63 tokens behind one are cut in two, without it they are not."""
    layout = Layout(tp=2, tp_sequence_parallel=True)
    stage = replace(demo.stages["ctx_256"], seq_len=63, global_batch_tokens=63, layout=layout)
    recipe = replace(demo, stages={"odd": stage}, model=replace(demo.model, meta=MetaConfig(num_tokens=1)))
    recipe = changed(recipe, "evaluation.seq_len", 63)
    with pytest.raises(ValueError, match="evaluation.seq_len: 63 tokens of the teacher cannot be cut"):
        check_evaluation(recipe, "odd", layout)
    check_evaluation(changed(recipe, "evaluation.teacher", False), "odd", layout)
    check_evaluation(changed(recipe, "evaluation.tokens", 0), "odd", layout)


def test_training_needs_data_and_a_tokenizer(demo):
    check_training(demo)
    with pytest.raises(ValueError, match="data.sources is empty"):
        check_training(changed(demo, "data.sources", {}))
    with pytest.raises(ValueError, match="data.tokenizer is empty"):
        check_training(changed(demo, "data.tokenizer", ""))
