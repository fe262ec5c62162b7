"""Estimates: counted products against torch's own counter and by hand, memory against what autograd really keeps, hours
by arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from visling import config as configs
from visling import models
from visling.cli.app import app
from visling.data.corpora.base import Typical
from visling.data.corpora.readers import find_reader
from visling.errors import ConfigError
from visling.models.cvlp import Cvlp, KeyNetwork
from visling.nn.momentum import DependsOnValues
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.scenes import TASKS
from visling.recipes.tables import FINETUNING, PRETRAINING, PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.runs import estimate as estimates
from visling.runs import pretrain as pretraining
from visling.runs.count_products import MatrixProducts, trace
from visling.runs.typical_batch import typical_batch
from visling.runs.typical_task import typical_task_batch, untrained_task

ROWS = 5
RECIPES = [
    "visualbert-coco",
    "visualbert-nlvr2",
    "vlbert-base-prec",
    "vlbert-base-e2e",
    "vilbert-conceptual",
    "lxmert-20epochs-qa",
    "cvlp-paper",
]
"""One of each family, one with two images per row, and one with a region extractor."""


def tiny(name: str) -> PretrainConfig:
    """A published recipe on its family's smallest preset, without anything drawn."""
    run = PUBLISHED_PRETRAINING[name]()
    preset = models.spec(run.model).presets["tiny"]
    preset = dataclasses.replace(
        preset, attention_dropout_rate=0.0, vocab_size=500, **({"key_drop_rate": 0.0} if run.model == "cvlp" else {})
    )
    losses = run.region_losses and dataclasses.replace(
        run.region_losses, feature_size=preset.feature_size, num_classes=50, num_attributes=20
    )
    settings: dict[str, Any] = {
        "image_qa": {"num_answers": 30},
        "region_contrast": {"queue_size": 2000, "projection_size": 24},
    }
    given = {objective: settings[objective] for objective in run.objective_settings}
    extractor = run.extractor and dataclasses.replace(
        run.extractor, blocks=(1, 1, 2), stem_size=4, widths=(4, 4, 6, 4), shorter_side=32
    )
    if extractor is not None:
        preset = dataclasses.replace(
            preset, feature_size=extractor.feature_size, whiten_features=False, masks_features=False
        )
    return dataclasses.replace(
        run, encoder=preset, extractor=extractor, region_losses=losses, objective_settings=given, batch_size=ROWS
    )


def real(run: PretrainConfig) -> tuple[PretrainModel, list[Any]]:
    """The model of a run and typical batches, with values."""
    model = pretraining.untrained_model(run)
    for objective in model.objectives.children():
        if isinstance(objective, RegionContrast):
            size = objective.queue.rows.shape
            objective.queue.push(F.normalize(torch.randn(size), dim=-1), torch.ones(size[0], dtype=torch.bool))
    batches = [typical_batch(run, find_reader(corpus.kind).typical, ROWS) for corpus in run.corpora]
    for batch, _ in batches:
        batch.validate()
    return model, batches


@contextmanager
def torch_counter() -> Iterator[FlopCounterMode]:
    """torch's own counter, and attention by plain products, which it knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


# ----------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("name", RECIPES)
def test_operations_equal_torchs_count_of_a_real_step(name: str) -> None:
    run = tiny(name)
    model, batches = real(run)
    with torch_counter() as counter:
        torch.stack([estimates.loss_of(model, *pair) for pair in batches]).sum().backward()
    expected = counter.get_total_flops()
    if run.model == "cvlp":
        # the mean of the negatives, which is gathered in place: torch's counter does not know the operation
        expected += 2 * ROWS * run.encoder.max_regions * 2000 * 24
    assert trace(model, lambda *pair: estimates.loss_of(model, *pair), batches).flops == expected
    assert estimates.estimate(run).flops_per_update == expected


def test_key_layers_are_left_out_half_of_the_time() -> None:
    with torch.device("meta"):
        network = KeyNetwork(Cvlp(models.spec("cvlp").presets["base"]))
    assert isinstance(network, DependsOnValues)
    network.use_typical_path()
    network.draw_path(1)  # as training does; the typical path stays
    left_out = [stream for (stream, _), shortened in zip(network.pairs, network.path, strict=True) if shortened]
    assert sorted(left_out) == ["cross_layers", "region_layers", "text_layers", "text_layers"]  # of 2, 2 and 4 pairs


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1)])
def test_products_are_counted_one_by_one(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b, batch = torch.ones(m, k), torch.ones(k, n), torch.ones(2, m, k)
    with MatrixProducts() as products:
        _ = a @ b
        assert products.flops == 2 * m * k * n
        _ = torch.addmm(torch.ones(n), a, b)
        torch.zeros(m, n).addmm_(a, b)
        _ = batch @ b.expand(2, k, n)
        _ = torch.baddbmm(torch.ones(n), batch, b.expand(2, k, n))
        _ = a + a
    assert products.flops == 2 * m * k * n * (1 + 1 + 1 + 2 + 2)


def test_fused_and_plain_attention_cost_the_same() -> None:
    def cost(kernel: SDPBackend) -> int:
        query, key, value = (torch.rand(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
        with sdpa_kernel(kernel), MatrixProducts() as products:
            F.scaled_dot_product_attention(query, key, value).sum().backward()
        return products.flops

    assert cost(SDPBackend.FLASH_ATTENTION) == cost(SDPBackend.MATH) == 3 * (2 * 2 * 2 * 3 * 5 * 7 * 8)


def forward_multiplications(name: str, preset: str, tokens: int, regions: int) -> float:
    """Of the encoder for one row, in thousand millions."""
    config = dataclasses.replace(models.spec(name).presets[preset], max_tokens=tokens, max_regions=regions)
    run = PretrainConfig(
        recipe="any", model=name, encoder=config, corpora=PUBLISHED_PRETRAINING["lxmert-paper"]().corpora,
        objectives={"masked_lm": 1.0},
        train=PUBLISHED_PRETRAINING["lxmert-paper"]().train,
    )  # fmt: skip
    with torch.device("meta"):
        model = models.build(name, config)
        batch, _ = typical_batch(run, Typical(tokens=tokens), 1)
        with torch.no_grad(), MatrixProducts() as products:
            model(batch)
    return products.flops / 2 / 1e9


def test_lxmert_costs_what_its_layers_cost() -> None:
    # 20 tokens, 36 regions: language 1.28, relationship 1.28, cross-modality 2.67, visual encoder 0.057; the pooler is
    # small
    assert forward_multiplications("lxmert", "base", 20, 36) == pytest.approx(1.28 + 1.28 + 2.67 + 0.057, rel=3e-3)


def test_vilbert_costs_what_is_known_of_it() -> None:
    # 30 tokens, 101 regions with the whole image
    assert forward_multiplications("vilbert", "connect6", 30, 100) == pytest.approx(12.0, rel=5e-3)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "vlbert-base-e2e" else ()) for name in RECIPES]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_traced_without_values_as_with_them(name: str, precision: Any) -> None:
    run = tiny(name)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision))
    model, batches = real(run)
    found = trace(model, lambda *pair: estimates.loss_of(model, *pair), batches, precision=precision)
    said = estimates.estimate(run)
    # Without values torch is a little wrong about what norms keep under autocast.
    lost = (
        0 if run.extractor is None else ROWS * 64
    )  # which regions are real, a byte each: all are, where they have no values
    assert said.memory.activations == pytest.approx(found.kept, rel=0.0 if precision == "fp32" else 0.02, abs=lost)
    assert found.kept > 0
    assert said.memory.weights == 4 * sum(p.numel() for p in model.parameters())
    assert said.memory.gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert said.memory.buffers == sum(b.numel() * b.element_size() for b in model.buffers())


def test_what_is_kept_for_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh())
    given = torch.rand(3, 4)
    found = trace(model, lambda batch, _: model(batch).sum(), [(given, None)])  # type: ignore[arg-type, list-item]
    assert found.kept == 4 * (
        3 * 4 + 3 * 8
    )  # the input for the weights, the output of tanh; the weights are not counted
    assert found.flops == 2 * (2 * 3 * 4 * 8)  # forward and for the weights; nothing asks for the gradient of the input


def test_the_queue_and_the_key_network_take_room() -> None:
    found = estimates.estimate(tiny("cvlp-release"))
    assert found.memory.buffers == pytest.approx(
        2000 * 24 * 4, abs=100 + 4 * 2 * (16 + 16 * 16)
    )  # and what whitens features, twice
    assert found.memory.weights > 1.9 * found.memory.gradients
    assert found.parameters == found.trained == found.memory.gradients // 4
    total = found.memory
    assert total.total == total.weights + total.gradients + total.optimiser + total.activations + total.buffers


def test_averaged_weights_take_room_and_momentum_less_than_two_moments() -> None:
    run = tiny("visualbert-coco")
    optim = dataclasses.replace(run.train.optim, name="sgd")
    changed = dataclasses.replace(run, train=dataclasses.replace(run.train, average=0.9, optim=optim))
    plain, averaged = estimates.estimate(run).memory, estimates.estimate(changed).memory
    assert averaged.weights == plain.weights + plain.gradients
    assert averaged.optimiser * 2 == plain.optimiser
    assert estimates.estimate(configs.override(changed, ["train.optim.momentum=0.0"])).memory.optimiser == 0


def test_half_precision_keeps_less() -> None:
    run = dataclasses.replace(tiny("visualbert-coco"), batch_size=100)
    halved = dataclasses.replace(run, train=dataclasses.replace(run.train, precision="bf16"))
    full, half = estimates.estimate(run), estimates.estimate(halved)
    assert half.flops_per_update == full.flops_per_update
    assert 0.4 < half.memory.activations / full.memory.activations < 0.9
    assert half.memory.weights == full.memory.weights


# ------------------------------------------------------------------------------------------------------ steps and hours


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        ("lxmert-20epochs-qa", 35_027 * 20),  # "~670-700K"
        ("vlbert-base-prec", 250_000),  # paper
        ("vilbert-conceptual", 3_136_161 // 512 * 10),
        ("cvlp-release", 35_027 * 40),
    ],
)
def test_updates_of_the_published_runs(name: str, updates: int) -> None:
    assert estimates.updates(PUBLISHED_PRETRAINING[name]()) == pytest.approx(
        updates, rel=0.04 if name.startswith("vlbert") else 0
    )


def test_hours() -> None:
    found = dataclasses.replace(
        estimates.estimate(tiny("visualbert-coco")), flops_per_update=10**13, updates=1000
    )  # 10 TFLOP, a thousand times
    assert found.flops == 10**16
    seconds = {"bf16": 1e16 / (312e12 * 0.4), "tf32": 1e16 / (156e12 * 0.4), "fp32": 1e16 / (19.5e12 * 0.4)}
    assert found.hours("A100") == pytest.approx({name: time / 3600 for name, time in seconds.items()})
    assert found.hours("T4") == pytest.approx(
        {"fp16": 1e16 / (65e12 * 0.4) / 3600, "fp32": 1e16 / (8.1e12 * 0.4) / 3600}
    )
    assert list(found.hours("V100")) == ["fp16", "fp32"]


COSTS = ("parameters", "TFLOP", "updates", "EFLOP", "GB", "bf16", "tf32")
"""Columns of the table of costs."""


PUBLISHED: Mapping[str, Mapping[str, Callable[[], PretrainConfig | FinetuneConfig]]] = {
    "recipes.md": PUBLISHED_PRETRAINING,
    "finetuning.md": PUBLISHED_FINETUNING,
}
"""Page with a table of costs -> its recipes."""
DIGITS = {"recipes.md": (1, 2), "finetuning.md": (2, 3)}
"""Page -> decimals of TFLOP and EFLOP; updates of fine-tuning are small."""
EVERY = [(page, name) for page, recipes in PUBLISHED.items() for name in sorted(recipes)]


def told(page: str) -> dict[str, dict[str, str]]:
    """Recipe -> what the page says it costs."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    table = text.partition("## What they cost")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]
    return {name.strip("`"): dict(zip(COSTS, cells, strict=True)) for name, *cells in rows}


def costs(page: str, name: str) -> dict[str, str]:
    """A row of the table as the estimate fills it."""
    found = estimates.estimate(PUBLISHED[page][name]())
    assert found.flops is not None
    tera, exa = DIGITS[page]
    hours = {precision: f"{float(f'{value:.2g}'):g}" for precision, value in found.hours("A100").items()}
    return {
        "parameters": f"{found.parameters / 1e6:.1f}",
        "TFLOP": f"{found.flops_per_update / 1e12:.{tera}f}",
        "updates": f"{found.updates:,}",
        "EFLOP": f"{found.flops / 1e18:.{exa}f}",
        "GB": f"{found.memory.total / 1e9:.1f}",
        "bf16": hours["bf16"],
        "tf32": hours["tf32"],
    }


@pytest.mark.parametrize("page", PUBLISHED)
def test_the_page_tells_what_recipes_cost(page: str) -> None:
    rows = told(page)
    missing = [f"| `{name}` | {' | '.join(costs(page, name).values())} |" for name in PUBLISHED[page].keys() - rows]
    assert not missing, "rows to be added:\n" + "\n".join(missing)
    assert rows.keys() == PUBLISHED[page].keys()
    for name, row in rows.items():
        run = PUBLISHED[page][name]()
        assert row["updates"] == f"{estimates.updates(run):,}", name
        total = float(row["TFLOP"]) * int(row["updates"].replace(",", "")) / 1e6
        assert float(row["EFLOP"]) == pytest.approx(total, rel=0.03, abs=0.006), name  # from rounded numbers
        for precision, rate in (("bf16", 312), ("tf32", 156)):
            hours = total * 1e6 / (rate * estimates.UTILISATION * 3600)
            assert float(row[precision]) == pytest.approx(hours, rel=0.06), name


@pytest.mark.parametrize(("page", "name"), [("recipes.md", "visualbert-vqa"), ("finetuning.md", "lxmert-nlvr2")])
def test_the_estimate_is_what_the_page_says(page: str, name: str) -> None:
    assert costs(page, name) == told(page)[name]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "name"), EVERY)
def test_every_published_recipe_costs_what_the_page_says(page: str, name: str) -> None:
    assert costs(page, name) == told(page)[name]


def test_micro_batches_cost_time_and_no_memory() -> None:
    run = tiny("visualbert-coco")
    twice = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation=2))
    once, both = estimates.estimate(run), estimates.estimate(twice)
    assert both.flops_per_update == 2 * once.flops_per_update
    assert both.memory == once.memory
    assert once.updates == 591_757 // ROWS * 10
    assert both.updates == 591_757 // ROWS // 2 * 10


@pytest.mark.parametrize("name", sorted(PRETRAINING.keys() - PUBLISHED_PRETRAINING.keys()))
def test_our_own_recipes_have_an_estimate(name: str) -> None:
    """They take features of any width; LXMERT's predicts them, too."""
    assert estimates.estimate(PRETRAINING[name]()).flops_per_update > 0


def test_our_own_recipes_have_no_known_size() -> None:
    run = PRETRAINING["visualbert-scenes"]()
    found = estimates.estimate(run)
    assert found.updates is None
    assert found.flops is None
    assert found.hours("A100") == {}
    assert found.described(("A100",))["hours"] == {}
    assert estimates.estimate(configs.override(run, ["train.max_steps=7"])).updates == 7


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        ("visualbert-vqa", 658_111 // 64 * 10),  # train2014 and val2014
        ("lxmert-vqa", 632_117 // 32 * 4),  # what the release's log counts in train and nominival
        ("cvlp-gqa", 1_075_062 // 32 * 6),
        ("lxmert-nlvr2", 86_373 // 32 * 4),
        ("visualbert-vqa-scenes", None),
    ],
)
def test_updates_of_fine_tuning(name: str, updates: int | None) -> None:
    assert estimates.updates(FINETUNING[name]()) == updates


def test_updates_follow_the_splits_and_the_limit() -> None:
    run = FINETUNING["lxmert-nlvr2"]()
    assert estimates.updates(configs.override(run, ["train_split=dev"])) == 6_982 // 32 * 4
    assert estimates.updates(configs.override(run, ["train_limit=64"])) == 2 * 4
    assert estimates.updates(configs.override(run, ["train_split=train+mine"])) is None
    large = configs.override(FINETUNING["lxmert-vqa"](), ["task_settings.min_count=9", "train_split=train"])
    assert estimates.updates(large) == 443_757 // 32 * 4


def tiny_task(name: str, **changes: Any) -> FinetuneConfig:
    """A recipe of ours on its family's smallest preset, without dropout of attention."""
    run = FINETUNING[name]()
    preset = models.spec(run.model).presets["tiny"]
    preset = dataclasses.replace(preset, attention_dropout_rate=0.0, vocab_size=500)
    return dataclasses.replace(run, encoder=preset, batch_size=ROWS, **changes)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["visualbert", "vlbert", "vilbert", "lxmert"])
def test_operations_of_a_task_equal_torchs_count_of_a_real_step(model: str, task: str) -> None:
    run = tiny_task(f"{model}-{task}-scenes")
    network, kind = untrained_task(run)
    batch, targets = typical_task_batch(run, kind, ROWS)
    batch.validate()
    assert len(batch.text.ids) == ROWS * kind.group
    with torch_counter() as counter:
        kind.loss(network(batch), targets).value.backward()
    found = estimates.estimate(run)
    assert found.flops_per_update == counter.get_total_flops()
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_a_task_of_another_package_is_estimated_by_its_encoder() -> None:
    run = tiny_task("visualbert-vqa-scenes", task="fixtures.toy_tasks", task_settings={})
    encoder = models.build(run.model, run.encoder)
    assert estimates.estimate(run).parameters == sum(p.numel() for p in encoder.parameters())


def test_an_unknown_gpu() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'A100'"):
        estimates.find_gpu("A10")


def test_rates_make_sense() -> None:
    for name, gpu in estimates.GPUS.items():
        rates = [rate for rate in (gpu.bf16, gpu.fp16, gpu.tf32, gpu.fp32) if rate is not None]
        assert rates == sorted(rates, reverse=True), name
        assert (gpu.bf16 is None) != (gpu.fp16 is None), f"{name}: rates of half precision"


# --------------------------------------------------------------------------------------------------------- command line


def shown(*words: str) -> Any:
    result = CliRunner().invoke(app, ["recipes", "show", "--json", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_show_adds_an_estimate() -> None:
    assert "estimate" not in shown("lxmert-paper", "--no-estimate")["pretrain"]
    found = shown("lxmert-paper", "--gpu", "H100", "--set", "encoder=tiny", "--set", "region_losses.feature_size=16")[
        "pretrain"
    ]["estimate"]
    assert 10**6 < found["parameters"] < 10**7
    assert "not a measurement" in found["note"]
    assert set(found["hours"]) == set(found["fits"]) == {"H100"}
    assert found["GB"]["total"] == pytest.approx(
        sum(size for name, size in found["GB"].items() if name != "total"), rel=0.01
    )
    assert found["assumed"]["tokens"] == {"lxmert": 12}
    both = shown("visualbert-vqa", "--set", "encoder=tiny")
    assert set(both) == {"pretrain", "finetune"}
    assert set(both["finetune"]["estimate"]["hours"]) == {estimates.DEFAULT_GPU}
    named = shown("visualbert-nlvr2", "--gpu", "T4", "--gpu", "V100", "--set", "encoder=tiny")
    assert set(named["finetune"]["estimate"]["hours"]) == {"T4", "V100"}
    assert named["finetune"]["estimate"]["assumed"]["regions"] == {"nlvr2": 72}


def test_show_says_where_the_paper_differs() -> None:
    found = shown("cvlp-release", "--no-estimate", "--set", "train.epochs=2")["pretrain"]
    assert found["paper"]["encoder.key_layers"] == {"here": "replace", "paper": "drop"}
    assert found["paper"]["objective_settings.region_contrast.clip"] == {"here": 10.0, "paper": None}
    assert found["changed"] == {"train.epochs": {"here": 2, "recipe": 40}}
    assert "release" in found["release"]["queue"]
